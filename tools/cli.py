"""The console script `logitstore`: every verb is a module of its own and loads what it needs when it runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import tools.benchmark
import tools.capture
import tools.convert
import tools.diff
import tools.evaluate
import tools.export
import tools.gc
import tools.inspect
import tools.plan
import tools.query
import tools.report
import tools.status
import tools.submit
import tools.sweep
import tools.train
import tools.verify
from tools.endings import Verbs
from tools.logs import AsJson, Quiet, Verbose, set_up_logs

_QUICK_STEPS = 100

app = typer.Typer(
    name="logitstore",
    cls=Verbs,
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they would print local variables, credentials among them
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(verb: str | None = None) -> None:
    """Run the command line of this process; with a verb, as if it stood before the arguments."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # text files, as Python opens them
    arguments = sys.argv[1:] if verb is None else [verb, *sys.argv[1:]]
    app(args=arguments, prog_name="logitstore")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        from logitstore import __version__

        print(f"logitstore {__version__}")
        raise typer.Exit


@app.callback()
def describe(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Run the teacher once, keep what it said, teach many students.

    Results go to stdout, everything else to stderr; --json prints one document, --quiet leaves only errors on stderr.
    Exit codes: 0 done, 1 bug, 2 usage or settings, 3 store damaged or incompatible, 4 trouble outside that may pass:
    run it again.

    \b
    Example:
      logitstore quickstart
    """


def quickstart(
    folder: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/quickstart"),
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier quickstart left in the folder.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Few training steps: a smoke test.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Go the whole way once, on this machine, in minutes.

    Python's standard library is captured with the teacher that ships with the project, the store is verified, and two
    students are trained and compared: one on the text alone, one that is also taught by the teacher.

    \b
    Example:
      logitstore quickstart
      logitstore quickstart --folder /tmp/first-look
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from tools.look import open_console, print_json
    from tools.quickstart.run import run_quickstart

    console = open_console(stderr=as_json, markup=True)
    console.quiet = as_json and quiet
    result = run_quickstart(
        folder, console=console, overwrite=overwrite, steps=_QUICK_STEPS if quick else None, quiet=quiet
    )
    if as_json:
        print_json(result.describe())


app.command("quickstart")(quickstart)
app.command("plan")(tools.plan.command)
app.command("capture")(tools.capture.command)
app.command("status")(tools.status.command)
app.command("verify")(tools.verify.command)
app.command("gc")(tools.gc.command)
app.command("inspect")(tools.inspect.command)
app.command("diff")(tools.diff.command)
app.command("report")(tools.report.command)
app.command("query")(tools.query.command)
app.command("train")(tools.train.command)
app.command("sweep")(tools.sweep.command)
app.command("evaluate")(tools.evaluate.command)
app.command("export")(tools.export.command)
app.add_typer(tools.submit.app, name="submit")
app.add_typer(tools.convert.app, name="convert")
app.add_typer(tools.benchmark.app, name="benchmark")


if __name__ == "__main__":
    main()
