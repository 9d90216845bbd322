"""`logitstore plan`: what a capture will take, before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.logs import Quiet, Verbose, set_up_logs

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tools.probe import CaptureOutlook


def command(
    settings_file: Annotated[Path, typer.Argument(metavar="CAPTURE.yaml", help="Settings of the capture.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="What one actor (its GPU, say) costs in an hour, in any currency.")
    ] = None,
    probe_positions: Annotated[int, typer.Option(min=1, help="Positions to run through the teacher.")] = 20_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what a capture will take, before it runs.

    That is units, tokens, bytes, hours and, given a price, money. Lists the corpus, runs a sample of it through the
    teacher on this machine, and writes the sample into a shard in a temporary folder; the store is left alone.

    \b
    Example:
      logitstore plan capture.yaml
      logitstore plan capture.yaml method.k=32 --price-per-hour 2.49
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from cluster.settings import ClusterCaptureSettings
    from logitstore.settings import read_settings
    from tools.look import print_json, print_result, show_progress
    from tools.probe import run_plan

    settings = read_settings(ClusterCaptureSettings, settings_file, overrides or [])
    with show_progress("probe", quiet=quiet) as report:
        outlook = run_plan(settings, probe_positions=probe_positions, price_per_hour=price_per_hour, report=report)
    if as_json:
        print_json(outlook)
    else:
        print_result(*render_plan(outlook))


def render_plan(outlook: CaptureOutlook) -> list[RenderableType]:
    """What `logitstore plan` shows, each figure with where it comes from."""
    from tools.look import (
        build_table,
        count_things,
        format_bytes,
        format_count,
        format_loss,
        format_seconds,
        format_share,
    )

    corpus, probe, estimate = outlook.corpus, outlook.probe, outlook.estimate
    scored, listed, guessed = "measured", "listed", "extrapolated"
    dead = format_share(estimate.dead_letter_share)
    per_byte = probe.text_bytes / probe.tokenized_positions
    support = probe.support_entries / probe.scored_positions
    rows = [
        ("files", f"{format_count(corpus.files)}, {format_bytes(corpus.stored_bytes)} as stored", listed),
        ("text", f"{format_bytes(corpus.text_bytes)} in {count_things(corpus.units, 'unit')}", listed),
        ("tokens", f"one in {per_byte:.2f} bytes, {format_count(probe.tokenized_positions)} tokenized", scored),
        ("unusable documents", f"{dead} of {format_count(probe.documents)} looked at", scored),
        ("loading the teacher", format_seconds(probe.load_seconds), scored),
        ("one actor", f"{format_count(estimate.positions_per_second)} positions per second ({probe.device})", scored),
        ("a position", f"{estimate.bytes_per_position:.1f} bytes, {support:.1f} support entries", scored),
        ("teacher's loss", format_loss(probe.teacher_loss), scored),
        ("positions", format_count(estimate.positions), guessed),
        ("store", f"{format_bytes(estimate.store_bytes)} of shards", guessed),
        ("actor time", format_seconds(3600 * estimate.actor_hours), guessed),
        (f"with {count_things(estimate.actors, 'actor')}", format_seconds(3600 * estimate.hours), guessed),
    ]
    if estimate.cost is not None:
        rows.append(("cost", f"{estimate.cost:,.2f}", guessed))
    where = f"{format_count(probe.scored_positions)} positions of {count_things(probe.units, 'unit')}"
    return [
        build_table(f"{outlook.store}, taught by {outlook.teacher}", ["", "", ""], rows),
        f"Measured on {where}; time to upload is not in it. Extrapolated in proportion to the bytes of text.",
    ]


if __name__ == "__main__":
    from tools.cli import main

    main("plan")
