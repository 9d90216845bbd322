"""`logitstore status`: how far a capture has come, told from its store alone."""

from __future__ import annotations

from typing import Annotated

import typer

from tools.logs import AsJson, Quiet, Verbose, set_up_logs


def command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="URL or folder of the store.")],
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Look again and again until nothing is left to wait for.")
    ] = False,
    every: Annotated[float, typer.Option(min=1, metavar="SECONDS", help="Time between two looks.")] = 10.0,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say how far a capture has come.

    Reads the store and nothing else, from wherever the store can be read: a capture that runs is not disturbed. What is
    committed, set aside and dead is told by the store itself; what is in flight, how fast, on how many actors and with
    what trouble is told by captures at work, which leave a word in the store every few seconds.

    With --watch, a terminal shows it in place, and a log gets a line for every look.

    \b
    Example:
      logitstore status s3://bucket/stores/docs
      logitstore status s3://bucket/stores/docs --watch
      logitstore status runs/store --json
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from logitstore.errors import ConfigError
    from logitstore.store.files import StoreFiles
    from tools.look import print_json, print_result
    from tools.status_view import render_status
    from tools.store_status import read_status

    if watch and as_json:
        raise ConfigError("logitstore status: expected --json or --watch, found both; --json prints one document")
    if watch:
        from tools.status_watch import watch_status

        watch_status(StoreFiles(store), seconds=every)
        return
    status = read_status(StoreFiles(store))
    if as_json:
        print_json(status)
    else:
        print_result(*render_status(status))


if __name__ == "__main__":
    from tools.cli import main

    main("status")
