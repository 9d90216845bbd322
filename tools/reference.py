"""docs/commands.md: every command with its arguments and options, written from the commands themselves.

`python -m tools.reference` prints the page; a test holds the file to it.
"""

from __future__ import annotations

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

_HEAD = """# Commands

What `logitstore VERB --help` says, in one page. It is written from the commands (`python -m tools.reference >
docs/commands.md`), and a test holds it to them.

Results go to stdout, everything else to stderr. `--json` prints one document, whose unknown figures are null;
`--quiet` leaves only errors on stderr; `--verbose` says more and has tracebacks of what went wrong. Progress and
colours are for terminals: there are no colours where `NO_COLOR` is set, and with `TERM=dumb` no progress either. Exit
codes: 0 done; 1 a bug, with its traceback; 2 usage or settings; 3 a store is damaged, incompatible or beyond a bound
that was set; 4 trouble outside that may pass: run it again; 130 interrupted.

`logitstore --install-completion` makes the shell complete verbs and options.
"""


def build_reference() -> str:
    """The page."""
    import typer

    from tools.cli import app

    parts = [_HEAD]
    for name, command in _list_commands(typer.main.get_command(app), "logitstore"):
        parts.append(_describe_command(name, command))
    return "\n".join(parts)


def _list_commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Name and command of whatever can be run, in the order of --help."""
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    for verb, child in children.items():
        yield from _list_commands(child, f"{name} {verb}")


def _describe_command(name: str, command: Any) -> str:
    description, _, example = inspect.cleandoc(command.help or "").partition("\b\nExample:\n")
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    usage = " ".join([name, *(_name_argument(argument) for argument in arguments), *(["[OPTIONS]"] if options else [])])
    lines = [f"## {name}\n", f"```text\n{usage}\n```\n", description.strip() + "\n"]
    rows = [(f"`{_name_argument(argument)}`", argument.help or "", "") for argument in arguments]
    types = typing.get_type_hints(command.callback, include_extras=True)
    rows += [
        (_name_option(option, types[option.name]), option.help or "", _describe_default(option))
        for option in options
        if option.name in types  # --help is no parameter of the function
    ]
    if rows:
        lines += ["| argument, option | | default |", "|---|---|---|"]
        lines += [f"| {what} | {_escape(help_text)} | {default} |" for what, help_text, default in rows]
        lines.append("")
    if example.strip():
        lines.append("```text\n" + inspect.cleandoc(example) + "\n```\n")
    return "\n".join(lines)


def _name_argument(argument: Any) -> str:
    name = (argument.metavar or argument.name.upper()).strip("[].")
    name = f"{name}..." if argument.nargs == -1 else name
    return name if argument.required else f"[{name}]"


def _name_option(option: Any, annotation: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*option.opts, *option.secondary_opts])
    return names if option.is_flag else f"{names} {_escape(option.metavar or _name_values(annotation))}"


def _name_values(annotation: Any) -> str:
    """What a value of a type is called: of the types that options here have."""
    parts = [part for part in typing.get_args(annotation) if part is not type(None)]
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, parts))
    if typing.get_origin(annotation) is Annotated or (parts and typing.get_origin(annotation) is not tuple):
        return _name_values(parts[0])
    return {int: "N", float: "NUMBER", Path: "PATH"}.get(annotation, "TEXT")


def _describe_default(option: Any) -> str:
    if option.required:
        return "required"
    default = option.default
    if default is None or default is False or callable(default) or option.is_flag:
        return ""
    return f"`{default}`"


def _escape(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").replace("<", "&lt;").strip()


if __name__ == "__main__":
    print(build_reference(), end="")
