"""`logitstore verify`: hold a store to its word, and mend what can be mended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tools.logs import AsJson, Quiet, Verbose, set_up_logs

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tools.store_check import StoreCheck


def command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="URL or folder of the store.")],
    quick: Annotated[
        bool, typer.Option("--quick", help="Look at commits, sizes and manifests; read no shard.")
    ] = False,
    repair: Annotated[
        bool, typer.Option("--repair", help="Take damaged units back and write a manifest of the others.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Shards checked at once, each in memory; by default one per core.")
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Hold a store to its word.

    Recomputes all that the store says of itself from its bytes; exit code 3 when something is wrong. --repair takes
    back the commits of damaged units, so that the next capture does them again, and writes a new manifest. It deletes
    no shard: 'logitstore gc --delete' does.

    \b
    Example:
      logitstore verify runs/store
      logitstore verify s3://bucket/stores/docs --repair
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from logitstore.errors import CorruptShardError
    from logitstore.store.files import StoreFiles
    from tools.look import print_json, print_result, show_progress
    from tools.store_check import run_verify

    with show_progress("verify", quiet=quiet) as report:
        check = run_verify(StoreFiles(store), quick=quick, repair=repair, workers=workers, report=report)
    if as_json:
        print_json(check)
    else:
        print_result(*render_check(check))
    if not check.is_good:
        raise CorruptShardError(describe_damage(check))


def render_check(check: StoreCheck) -> list[RenderableType]:
    """What `logitstore verify` shows."""
    from rich.text import Text

    from tools.look import build_facts, count_things, format_bytes, format_count

    set_aside = f"; {format_count(check.quarantined)} set aside after too many failures" if check.quarantined else ""
    read = "commits, sizes and manifests; no shard was read" if check.is_quick else "every byte of every shard"
    parts: list[RenderableType] = [
        build_facts(
            [
                ("store", check.store),
                ("looked at", read),
                ("units", f"{format_count(check.units)} of {format_count(check.units_planned)} committed{set_aside}"),
                ("found right", f"{format_count(check.records)} records, {format_count(check.positions)} positions"),
                ("", f"{format_bytes(check.bytes)} of shards"),
            ]
        )
    ]
    for problem in check.problems:
        parts.append(Text(f"{problem.path}: {problem.what}\n  → {problem.what_to_do}", style="red"))
    if check.is_clean:
        parts.append(Text("The store is what it says it is.", style="green"))
    elif not check.is_repaired:
        parts.append(Text(f"{count_things(len(check.problems), 'problem')}.", style="bold red"))
    else:
        parts.append(Text(_describe_repair(check), style="green" if check.is_good else "bold red"))
    return parts


def describe_damage(check: StoreCheck) -> str:
    """What is wrong, in the line with which the command ends."""
    from tools.look import count_things

    left = check.remaining if check.is_repaired else check.problems
    advice = "see what each of them asks for"
    if not check.is_repaired:
        advice = (
            f"'logitstore verify {check.store} --repair' takes damaged units back, 'logitstore capture' does them anew"
        )
    found = count_things(len(left), "problem")
    return f"{check.store}: expected what the store says of itself, found {found}; {advice}"


def _describe_repair(check: StoreCheck) -> str:
    from tools.look import count_things

    lines = [f"{count_things(len(check.problems), 'problem')}; manifest {check.manifest} was written without them."]
    if check.units_to_capture:
        units = ", ".join(map(str, check.units_to_capture))
        lines.append(f"To be captured again with 'logitstore capture': units {units}.")
    lines += [f"Still wrong: {problem.path}: {problem.what}" for problem in check.remaining]
    return "\n".join(lines)


if __name__ == "__main__":
    from tools.cli import main

    main("verify")
