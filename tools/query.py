"""`logitstore query`: SQL over a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.logs import Quiet, Verbose, set_up_logs

_MOST_ROWS_SHOWN = 200


def command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="URL or folder of the store.")],
    sql: Annotated[str, typer.Argument(metavar="SQL", help="One query in DuckDB's dialect; '-' reads it from stdin.")],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write all rows to a .csv, .json or .parquet file, and replace an earlier one."
        ),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print all rows as CSV.")] = False,
    manifest: Annotated[int | None, typer.Option(min=1, help="Query this manifest, not what is committed now.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Tokenizer for text(id); the teacher's otherwise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print all rows as one JSON document.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Ask a store with SQL.

    Views: positions (one row each), supports (tokens of positions, logprobs decoded), records, documents, row_groups
    (sums and sizes), dead_letters, vocabulary; text(id) is the text of a token. Logprobs and entropies are in nats.
    DESCRIBE positions lists the columns of a view. A query may do what you may: read other files to join them, and
    with COPY write some. It reads shards without comparing them with their digests: 'logitstore verify' does.

    \b
    Example:
      logitstore query runs/store "SELECT unit, record, position, text(next_token_id) AS next, next_token_logprob
        FROM positions ORDER BY next_token_logprob LIMIT 10"
      logitstore query s3://bucket/docs "SELECT * FROM row_groups" --output row_groups.parquet
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    import sys

    from logitstore.errors import ConfigError
    from tools.look import count_things, print_note, print_result
    from tools.query_output import check_output, render_rows, write_csv, write_json, write_rows
    from tools.store_query import run_query

    if sum((as_csv, as_json, output is not None)) > 1:
        raise ConfigError("logitstore query: expected one of --csv, --json and --output, found more")
    query = sys.stdin.read() if sql == "-" else sql
    if not query.strip():
        raise ConfigError("logitstore query: expected a query, found none; try 'SELECT * FROM positions LIMIT 5'")
    if output is not None:
        check_output(output)
    with run_query(store, query, manifest=manifest, tokenizer=tokenizer) as result:
        if output is not None:
            num_rows = write_rows(result, output)
            print_note(f"{count_things(num_rows, 'row')} written to {output}")
        elif as_csv:
            write_csv(result, sys.stdout.buffer)
        elif as_json:
            write_json(result, sys.stdout.buffer)
        else:
            table, is_cut = render_rows(result, _MOST_ROWS_SHOWN)
            print_result(table)
            if is_cut:
                print_note(f"only the first {_MOST_ROWS_SHOWN} rows: --csv, --json and --output give all of them")


if __name__ == "__main__":
    from tools.cli import main

    main("query")
