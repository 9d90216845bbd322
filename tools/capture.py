"""`logitstore capture`: run the teacher over a corpus and keep what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.logs import AsJson, Quiet, Verbose, set_up_logs


def command(
    settings_file: Annotated[Path, typer.Argument(metavar="CAPTURE.yaml", help="Settings of the capture.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings that replace the file's.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Ray cluster: auto, host:port or ray://host:port; one on this machine otherwise."),
    ] = None,
    retry_quarantined: Annotated[
        bool, typer.Option("--retry-quarantined", help="Try units again that were set aside.")
    ] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Add corpus files that the store does not have to it.")
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Capture what is not in the store yet.

    Stop it and run it again as you like: what is committed stays. Ends with exit code 3 when units had to be set
    aside because the teacher failed on them.

    A store may grow: with --extend, files that the settings list and the store does not have become new units, and a
    new manifest lists them after the others. Nothing that is there changes, and readers of earlier manifests see no
    difference.

    \b
    Example:
      logitstore capture capture.yaml
      logitstore capture capture.yaml method.k=32 store=runs/top32
      logitstore capture capture.yaml --extend
      logitstore capture capture.yaml --address ray://head:10001
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from cluster.settings import ClusterCaptureSettings
    from logitstore.errors import CaptureError
    from logitstore.settings import read_settings

    settings = read_settings(ClusterCaptureSettings, settings_file, overrides or [])
    from tools.capture_summary import render_summary, run_capture
    from tools.look import print_json, print_result

    summary = run_capture(settings, address=address, retry_quarantined=retry_quarantined, extend=extend, quiet=quiet)
    if as_json:
        print_json(summary)
    else:
        print_result(*render_summary(summary))
    if summary.store.units_quarantined:
        units = ", ".join(str(entry.unit) for entry in summary.store.quarantine)
        raise CaptureError(
            f"{summary.store.store}: expected every unit to be captured, found units set aside: {units}; look at their "
            "errors above, then run the command again with --retry-quarantined"
        )


if __name__ == "__main__":
    from tools.cli import main

    main("capture")
