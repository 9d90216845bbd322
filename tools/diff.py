"""`logitstore diff`: what two teachers, methods, codecs or engines say about one corpus, position by position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tools.logs import Quiet, Verbose, set_up_logs

if TYPE_CHECKING:
    from tools.store_diff import StoreDiff


def command(
    first: Annotated[str, typer.Argument(metavar="STORE", help="URL or folder of a store.")],
    second: Annotated[str, typer.Argument(metavar="STORE", help="Another one, over the same corpus.")],
    max_records: Annotated[
        int | None,
        typer.Option("--records", min=1, help="Compare about as many, evenly spread; all of them otherwise."),
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="How many of the most different positions to show.")] = 10,
    max_kl: Annotated[
        float | None, typer.Option(min=0.0, help="End with exit code 3 where the mean KL, in nats, is above.")
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Likewise where a smaller share of positions has one likeliest token."),
    ] = None,
    first_manifest: Annotated[
        int | None, typer.Option(min=1, help="Of the first store; what is committed now otherwise.")
    ] = None,
    second_manifest: Annotated[int | None, typer.Option(min=1, help="Likewise of the second.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Tokenizer for the text; the first teacher's otherwise.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say how far two stores over the same corpus are apart.

    Records are matched by address, and taught positions compared. Sparse signals do not determine a distance: what is
    printed is the least one that both allow.

    \b
    Example:
      logitstore diff runs/teacher-a runs/teacher-b
      logitstore diff s3://bucket/exact s3://bucket/compact --records 10000 --max-kl 1e-4
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from tools.diff_tables import render_diff
    from tools.look import print_json, print_result, show_progress
    from tools.store_diff import compare_stores

    with show_progress("diff", quiet=quiet) as report:
        diff = compare_stores(
            (first, second),
            (first_manifest, second_manifest),
            max_records=max_records,
            top=top,
            tokenizer=tokenizer,
            report=report,
        )
    if as_json:
        print_json(diff)
    else:
        print_result(*render_diff(diff))
    check_distances(diff, max_kl=max_kl, min_agreement=min_agreement)


def check_distances(diff: StoreDiff, *, max_kl: float | None, min_agreement: float | None) -> None:
    """Hold a comparison to bounds.

    Raises:
        IncompatibleStoreError: the stores are farther apart, or nothing says how far they are.
    """
    from logitstore.errors import IncompatibleStoreError

    distances = diff.distances
    found = []
    if max_kl is not None and (distances.infinite or distances.kl > max_kl):
        infinite = f", and {distances.infinite:,} positions where it is infinite" if distances.infinite else ""
        found.append(f"a mean KL up to {max_kl:g} nats, found {distances.kl:.3g}{infinite}")
    if min_agreement is not None and (distances.agreement is None or distances.agreement < min_agreement):
        share = "a store that keeps other tokens" if distances.agreement is None else f"{distances.agreement:.1%}"
        found.append(f"one likeliest token at {min_agreement:.1%} of positions, found {share}")
    if not distances.positions and (max_kl, min_agreement) != (None, None):
        found = ["positions with kept tokens in both stores, found none"]
    if found:
        raise IncompatibleStoreError(
            f"{diff.second.store}: compared with {diff.first.store}, expected {'; and '.join(found)}; look at the most "
            "different positions with --top"
        )


if __name__ == "__main__":
    from tools.cli import main

    main("diff")
