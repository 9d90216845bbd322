"""`logitstore gc`: delete shards that no commit and no manifest names, and what killed writes left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tools.logs import AsJson, Quiet, Verbose, set_up_logs

if TYPE_CHECKING:
    from logitstore.store.files import StoreFiles
    from logitstore.store.garbage import Garbage


def command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="URL or folder of the store.")],
    grace_hours: Annotated[
        float, typer.Option(min=0, help="Keep younger files: a running capture uploads before it commits.")
    ] = 24.0,
    delete: Annotated[bool, typer.Option("--delete", help="Delete them; without it they are only listed.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """List shards that nothing refers to, and unfinished writes.

    Attempts that were killed or lost a race leave them behind. They are deleted only if you ask for it.

    \b
    Example:
      logitstore gc runs/store
      logitstore gc runs/store --grace-hours 1 --delete
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from logitstore.store.files import StoreFiles
    from tools.look import build_table, count_things, format_bytes, print_json, print_result

    files = StoreFiles(store)
    garbage = run_gc(files, grace_hours=grace_hours, delete=delete)
    num_bytes = sum(file.bytes for file in garbage)
    if as_json:
        listed = [{"path": file.path, "bytes": file.bytes} for file in garbage]
        print_json({"store": files.url, "deleted": delete, "files": listed, "bytes": num_bytes})
        return
    if not garbage:
        print_result(f"{files.url}: nothing to delete that is older than {grace_hours:g} hours.")
        return
    rows = [(file.path, format_bytes(file.bytes)) for file in garbage]
    done = "Deleted" if delete else "Nothing was deleted; add --delete to delete"
    print_result(
        build_table(None, ["file that nothing refers to", "#size"], rows),
        f"{done} {count_things(len(garbage), 'file')}, {format_bytes(num_bytes)}.",
    )


def run_gc(files: StoreFiles, *, grace_hours: float, delete: bool) -> list[Garbage]:
    """What nothing refers to and is older than the grace period, deleted if asked.

    Raises:
        StoreNotFoundError: there is no store.
        CorruptShardError: a damaged manifest or commit has to be repaired first.
    """
    from logitstore.store.garbage import delete_garbage, find_garbage

    garbage = find_garbage(files, grace_seconds=3600 * grace_hours)
    if delete:
        delete_garbage(files, garbage)
    return garbage


if __name__ == "__main__":
    from tools.cli import main

    main("gc")
