"""`logitstore status`: how far a capture has come, told from its store alone."""

from __future__ import annotations

from typing import Annotated

import typer

from tools.logs import Quiet, Verbose, set_up_logs


def command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="URL or folder of the store.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say how far a capture has come.

    Reads the store and nothing else: a capture that runs is not disturbed.

    \b
    Example:
      logitstore status s3://bucket/stores/docs
      watch logitstore status runs/store
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from logitstore.store.files import StoreFiles
    from tools.look import print_json, print_result
    from tools.store_status import read_status, render_status

    status = read_status(StoreFiles(store))
    if as_json:
        print_json(status)
    else:
        print_result(*render_status(status))


if __name__ == "__main__":
    from tools.cli import main

    main("status")
