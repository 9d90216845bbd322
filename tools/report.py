"""`logitstore report`: one page about a store, which opens from disk and needs nothing from anywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.logs import Quiet, Verbose, set_up_logs


def command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="URL or folder of the store.")],
    output: Annotated[Path, typer.Option(metavar="PAGE.html", help="The page; an earlier one is replaced.")],
    records: Annotated[int, typer.Option(min=1, help="Records whose text is shown, spread over the store.")] = 100,
    top: Annotated[int, typer.Option(min=1, max=50, help="Candidates shown at each position.")] = 5,
    against: Annotated[
        str | None, typer.Option(metavar="STORE", help="Compare with a second store over the same corpus.")
    ] = None,
    student: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER", help="Run this student over the records shown; may be given again."),
    ] = None,
    run: Annotated[
        list[str] | None,
        typer.Option(metavar="FOLDER", help="Figures and curves of a training run, or of all in a folder; again."),
    ] = None,
    manifest: Annotated[
        int | None, typer.Option(min=1, help="Look at this manifest, not at what is committed now.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Tokenizer for the text; the teacher's otherwise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a page about a store: what it holds, and text with what the teacher expected at every token.

    With --against and --student, what others said beside it; with --run, how students learned. Without --student no
    model is run.

    \b
    Example:
      logitstore report runs/store --output report.html
      logitstore report s3://bucket/stores/docs --output docs.html --records 200
      logitstore report runs/store --output two.html --against runs/other-store
      logitstore report runs/store --output student.html --student runs/small/student --run runs/sweep
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from tools.look import (
        build_facts,
        count_things,
        format_bytes,
        print_error,
        print_json,
        print_note,
        print_result,
        show_progress,
    )
    from tools.page import check_page_path
    from tools.store_report.page import ReportRequest, build_store_report

    check_page_path(output, "--output")
    request = ReportRequest(
        store=store,
        manifest=manifest,
        against=against,
        students=tuple(student or ()),
        runs=tuple(run or ()),
        records=records,
        top=top,
        tokenizer=tokenizer,
    )
    with show_progress("report", quiet=quiet) as progress:
        page = build_store_report(request, progress)
    output.write_text(page.html, encoding="utf-8")
    size = output.stat().st_size
    if as_json:
        print_json({"page": str(output), "bytes": size, "records": page.records, "positions": page.positions})
    else:
        shown = f"{count_things(page.records, 'record')}, {count_things(page.positions, 'position')}"
        print_result(build_facts([("page", output), ("bytes", format_bytes(size)), ("shows", shown)]))
    if page.tokenizer_trouble is not None:
        print_note(f"ids instead of text: {page.tokenizer_trouble}")
    for trouble in page.damaged:
        print_error(f"not shown: {trouble}")
    if page.damaged:
        raise typer.Exit(3)


if __name__ == "__main__":
    from tools.cli import main

    main("report")
