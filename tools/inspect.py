"""`logitstore inspect`: look into a store, one of its records, or a single shard."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tools.logs import Quiet, Verbose, set_up_logs

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tools.position_filter import PositionFilter


def command(
    store: Annotated[str, typer.Argument(metavar="STORE|SHARD.parquet", help="URL or path of a store, or of a shard.")],
    record: Annotated[
        str | None, typer.Option(metavar="N|UNIT/INDEX", help="Show one record, token by token; N counts from 0.")
    ] = None,
    positions: Annotated[
        str | None, typer.Option(metavar="START:STOP", help="Positions of the record to show; the first 32 otherwise.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Candidates to show at each position.")] = 5,
    min_entropy: Annotated[
        float | None, typer.Option(min=0.0, help="Of the record, only positions with this entropy in nats, or more.")
    ] = None,
    min_surprise: Annotated[
        float | None, typer.Option(min=0.0, help="Only positions whose next token surprises the teacher so many nats.")
    ] = None,
    matching: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Only positions whose next token's text has a match.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Tokenizer for the record's text; the teacher's otherwise.")
    ] = None,
    dead_letters: Annotated[
        bool, typer.Option("--dead-letters", help="List the documents that could not be used, and why.")
    ] = False,
    manifest: Annotated[
        int | None, typer.Option(min=1, help="Look at this manifest, not at what is committed now.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Look into a store, a record or a shard.

    What it holds, what it costs, how the teacher did; also while a capture fills it. Of a damaged store what is whole
    is shown, what is not is named, and the exit code is 3.

    \b
    Example:
      logitstore inspect runs/store
      logitstore inspect s3://bucket/stores/docs --json
      logitstore inspect runs/store --record 3/17 --positions 100:140 --top 8
      logitstore inspect runs/store --record 12 --min-surprise 6
      logitstore inspect runs/store/data/0000003-5f0c1b2a3d4e5f60.parquet
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from logitstore.errors import ConfigError
    from tools.look import print_error, print_json, print_result
    from tools.position_filter import build_filter

    only = build_filter(min_entropy, min_surprise, matching)
    if record is None and (positions or tokenizer or only):
        raise ConfigError(
            "logitstore inspect: --positions, --tokenizer and what chooses positions: expected --record beside them, "
            "found none"
        )
    if record is not None and dead_letters:
        raise ConfigError("logitstore inspect: expected one of --record and --dead-letters, found both")
    if record is not None:
        result, parts = look_at_record(
            store, record, positions, top=top, manifest=manifest, tokenizer=tokenizer, only=only
        )
    else:
        result, parts = look_at_store(store, manifest, dead_letters=dead_letters)
    if as_json:
        print_json(result)
    else:
        print_result(*parts)
    for trouble in getattr(result, "unreadable", ()):
        print_error(f"not counted: {trouble}")
    if getattr(result, "unreadable", ()):
        raise typer.Exit(3)


def look_at_store(url: str, manifest: int | None, *, dead_letters: bool) -> tuple[object, list[RenderableType]]:
    """A store, its dead letters or a single shard: the figures, and how they are shown.

    Raises:
        ConfigError: a shard has no manifests, and no dead letters either.
    """
    if url.endswith(".parquet"):
        from logitstore.errors import ConfigError
        from tools.shard_view import read_shard_view, render_shard_view

        if dead_letters or manifest is not None:
            raise ConfigError(f"{url}: expected a store for --dead-letters and --manifest, found a shard")
        shard = read_shard_view(url)
        return shard, render_shard_view(shard)
    if dead_letters:
        from tools.dead_letters import read_dead_letters, render_dead_letters

        letters = read_dead_letters(url, manifest)
        return letters, render_dead_letters(letters)
    from tools.store_overview import read_overview, render_overview

    overview = read_overview(url, manifest)
    return overview, render_overview(overview)


def look_at_record(
    url: str,
    record: str,
    positions: str | None,
    *,
    top: int,
    manifest: int | None,
    tokenizer: str | None,
    only: PositionFilter | None,
) -> tuple[object, list[RenderableType]]:
    """Positions of a record of a store or shard, and how they are shown; see `tools.record_view.read_record_view`."""
    from logitstore.errors import ConfigError
    from tools.record_text import render_record_view
    from tools.record_view import read_record_view
    from tools.shard_record import read_shard_record_view

    if not url.endswith(".parquet"):
        view = read_record_view(url, record, positions, top=top, manifest=manifest, tokenizer=tokenizer, only=only)
    elif manifest is None:
        view = read_shard_record_view(url, record, positions, top=top, tokenizer=tokenizer, only=only)
    else:
        raise ConfigError(f"{url}: expected a store for --manifest, found a shard")
    return view, render_record_view(view)


if __name__ == "__main__":
    from tools.cli import main

    main("inspect")
