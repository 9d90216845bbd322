"""`logitstore plan`: what a capture will take, before it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tools.logs import AsJson, Quiet, Verbose, set_up_logs

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tools.estimate import Cost, Estimate
    from tools.probe import CaptureOutlook


def command(
    settings_file: Annotated[Path, typer.Argument(metavar="CAPTURE.yaml", help="Settings of the capture.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    prices: Annotated[
        Path | None, typer.Option(help="Your price table; the shipped one, tools/prices.yaml, is there to be copied.")
    ] = None,
    price_per_hour: Annotated[
        float | None, typer.Option(min=0, help="What one actor (its GPU, say) costs in an hour, not the table's price.")
    ] = None,
    machine: Annotated[
        str | None, typer.Option(help="What the capture runs on, as the price table names it: H100, cpu, ….")
    ] = None,
    positions_per_second: Annotated[
        float | None, typer.Option(min=1e-9, help="Of one actor, where this machine is not like those of the capture.")
    ] = None,
    upload_mbytes_per_second: Annotated[
        float | None, typer.Option(min=1e-9, help="What one actor uploads, in 10^6 bytes per second.")
    ] = None,
    probe_positions: Annotated[int, typer.Option(min=1, help="Positions to run through the teacher.")] = 32_768,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Say what a capture will take, before it runs.

    That is units, tokens, bytes, hours and money. Lists the corpus, runs a sample of it through the teacher on this
    machine, and writes the sample into a shard in a temporary folder; the store is left alone.

    \b
    Example:
      logitstore plan capture.yaml
      logitstore plan capture.yaml method.k=32 actors.count=16 --prices my-prices.yaml --upload-mbytes-per-second 200
      logitstore plan capture.yaml teacher.device=cpu --machine H100 --positions-per-second 30000
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from cluster.settings import ClusterCaptureSettings
    from logitstore.settings import read_settings
    from tools.look import print_json, print_result, show_progress
    from tools.prices import SHIPPED_PRICES, read_prices
    from tools.probe import PlanOptions, run_plan

    settings = read_settings(ClusterCaptureSettings, settings_file, overrides or [])
    options = PlanOptions(
        prices=read_prices(prices or SHIPPED_PRICES),
        prices_file=prices or SHIPPED_PRICES,
        probe_positions=probe_positions,
        price_per_hour=price_per_hour,
        machine=machine,
        positions_per_second=positions_per_second,
        upload_bytes_per_second=upload_mbytes_per_second and 1e6 * upload_mbytes_per_second,
    )
    with show_progress("probe", quiet=quiet) as report:
        outlook = run_plan(settings, options, report=report)
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
    per_byte = probe.text_bytes / probe.tokenized_positions
    support = probe.support_entries / probe.scored_positions
    error = f", give or take {format_share(2 * estimate.positions_error)}" if estimate.positions_error else ""
    speed = f"{format_count(estimate.positions_per_second)} positions per second"
    is_measured = not outlook.is_speed_given
    rows = [
        ("files", f"{format_count(corpus.files)}, {format_bytes(corpus.stored_bytes)} as stored", listed),
        ("text", f"{format_bytes(corpus.text_bytes)} in {count_things(corpus.units, 'unit')}", listed),
        ("tokens", f"one in {per_byte:.2f} bytes, {format_count(probe.tokenized_positions)} tokenized", scored),
        ("unusable documents", f"{format_share(estimate.dead_letter_share)} of those looked at", scored),
        ("loading the teacher", format_seconds(probe.load_seconds), scored),
        ("one actor", f"{speed} ({probe.device})" if is_measured else speed, scored if is_measured else "given"),
        ("a position", f"{estimate.bytes_per_position:.1f} bytes, {support:.1f} support entries", scored),
        ("teacher's loss", format_loss(probe.teacher_loss), scored),
        ("positions", format_count(estimate.positions) + error, guessed),
        ("store", f"{format_bytes(estimate.store_bytes)} of shards", guessed),
        ("actor time", format_seconds(3600 * estimate.actor_hours), guessed),
        (_name_actors(estimate), format_seconds(3600 * estimate.hours), guessed),
        *((name, text, guessed) for name, text in _list_costs(estimate.cost)),
    ]
    if estimate.upload_hours:
        rows.insert(-5, ("of it uploading", format_seconds(3600 * estimate.upload_hours), guessed))
    where = f"{format_count(probe.scored_positions)} positions of {count_things(probe.units, 'unit')}"
    return [
        build_table(f"{outlook.store}, taught by {outlook.teacher}", ["", "", ""], rows),
        f"Measured on {where}. Extrapolated in proportion to the bytes of text"
        + ("." if estimate.upload_hours else "; uploading is not in it (--upload-mbytes-per-second)."),
        f"Prices as of {estimate.cost.as_of} in {outlook.prices_file}: edit a copy, and pass it with --prices.",
    ]


def _name_actors(estimate: Estimate) -> str:
    from tools.look import count_things

    gpus = f", {estimate.gpus:g} GPUs" if estimate.gpus else ""
    return f"with {count_things(estimate.actors, 'actor')}{gpus}"


def _list_costs(cost: Cost) -> list[tuple[str, str]]:
    def money(amount: float) -> str:
        return f"{amount:,.2f} {cost.currency}"

    if cost.capture is None:
        computing = "unknown: the price table does not have this device; give --machine or --price-per-hour"
    else:
        computing = f"{money(cost.capture)}: actors at {cost.actor_hour:,.2f} an hour, requests {cost.requests:,.2f}"
        if cost.endpoint is not None:
            computing += f", answers {cost.endpoint:,.2f}"
    return [
        ("cost", computing),
        ("keeping it", f"{money(cost.storage_month)} a month"),
        ("reading it once", f"{money(cost.read_once)} from outside of its region"),
    ]


if __name__ == "__main__":
    from tools.cli import main

    main("plan")
