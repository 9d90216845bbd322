"""The whole way once, on this machine: corpus, capture, verify, two students, evaluation, report."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cluster.connection import connect
from cluster.driver import run_capture
from cluster.report import CaptureReport, report_finished_capture
from cluster.settings import ClusterCaptureSettings
from logitstore.errors import CaptureError, ConfigError, CorruptShardError
from logitstore.settings import read_settings
from logitstore.store.files import StoreFiles
from logitstore.store.logit_store import LogitStore
from logitstore.store.verify import verify_store
from tools.quickstart import HERE, TEACHER
from tools.quickstart.corpus import write_corpus
from tools.quickstart.students import train_students
from tools.student_results import COMPARED_FIGURES, ReportData, build_report
from trainer.evaluate import Evaluation

MARKER = ".logitstore-quickstart"
# Text enough for 300,000 positions and more, with every release of Python.
TRAIN_BYTES = 1_250_000
HELD_OUT_BYTES = 125_000


@dataclass(frozen=True, kw_only=True)
class QuickstartResult:
    """Where everything is, and what the two students reached on held-out records."""

    folder: Path
    report: Path
    positions: int
    text_only: Evaluation
    distilled: Evaluation
    seconds: float

    def describe(self) -> dict[str, object]:
        """Plain values."""
        return {
            "folder": str(self.folder),
            "report": str(self.report),
            "store": str(self.folder / "store"),
            "positions": self.positions,
            "text_only": self.text_only.to_json(),
            "distilled": self.distilled.to_json(),
            "seconds": self.seconds,
        }


def run_quickstart(
    folder: Path,
    *,
    console: Console,
    overwrite: bool = False,
    steps: int | None = None,
    quiet: bool = False,
    train_bytes: int = TRAIN_BYTES,
    held_out_bytes: int = HELD_OUT_BYTES,
) -> QuickstartResult:
    """Run the quickstart in a folder of its own; one that was interrupted goes on where it stopped.

    Args:
        folder: made if it is not there.
        console: where the session is printed.
        overwrite: delete what an earlier quickstart left in the folder.
        steps: of both students, for a shorter run; what `train.yaml` says by default.
        quiet: no progress on stderr.
        train_bytes, held_out_bytes: text to learn from and to evaluate on.
    Raises:
        ConfigError: the folder is not empty and no earlier quickstart's.
        IncompatibleStoreError: it is one of another Python or another logitstore; `overwrite` replaces it.
        KeyboardInterrupt: somebody asked the training to stop; the same call goes on from there.
        TrainingError: a student's training failed.
    """
    started = time.monotonic()
    _prepare_folder(folder, overwrite=overwrite)
    _title(console, 1, "Corpus", "source text of this interpreter's standard library")
    documents = write_corpus(folder / "corpus", train_bytes=train_bytes, held_out_bytes=held_out_bytes)
    console.print(f"  {documents['train']} documents to learn from, {documents['held_out']} held out")

    _title(console, 2, "Capture", "two Ray actors run the teacher once and write its distributions")
    capture = _capture(folder, quiet=quiet)
    store = LogitStore.open(str(folder / "store"))
    _print_store(console, store, capture)

    _title(console, 3, "Verify", "recompute every digest and invariant from the bytes")
    verification = verify_store(StoreFiles(store.url))
    if not verification.is_clean:
        raise CorruptShardError(f"{store.url}: {verification.problems[0].what}; {verification.problems[0].what_to_do}")
    console.print(f"  {verification.units} units, {verification.positions:,} positions: all as committed")

    _title(console, 4, "Train", "two students, same initial weights, same batches, no teacher in sight")
    kinds = {"text-only": "cross_entropy", "distilled": "bucket_kl"}
    text_only, distilled = train_students(
        {name: _write_training(folder, name, kind, steps) for name, kind in kinds.items()},
        {name: folder / name for name in kinds},
        console,
    )

    _title(console, 5, "Result", f"on {distilled.evaluation.positions:,} held-out positions")
    console.print(build_table(text_only.evaluation, distilled.evaluation))
    report = folder / "report.html"
    statistics = store.compute_statistics()
    data = ReportData(
        title="logitstore quickstart",
        store=store.url,
        teacher=store.plan.teacher.architecture,
        facts={
            "positions": f"{statistics.positions:,}",
            "bytes per position": f"{statistics.bytes_per_position:.1f}",
            "store": f"{statistics.bytes / 1e6:.1f} MB",
            "teacher's loss": f"{statistics.teacher_loss:.3f} nats",
            "mean entropy": f"{statistics.mean_entropy:.3f} nats",
        },
        entropy_histogram=statistics.entropy_histogram,
        students=(text_only, distilled),
    )
    report.write_text(build_report(data), encoding="utf-8")
    seconds = time.monotonic() - started
    console.print(f"\n  report   {report}\n  store    {store.url}\n  student  {folder / 'distilled' / 'student'}")
    console.print(f"\n  {seconds:.0f} seconds. Look into the store: logitstore inspect {store.url} --record 0")
    return QuickstartResult(
        folder=folder,
        report=report,
        positions=statistics.positions,
        text_only=text_only.evaluation,
        distilled=distilled.evaluation,
        seconds=seconds,
    )


def _prepare_folder(folder: Path, *, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: expected a folder, found a file; choose another with --folder")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists():
            raise ConfigError(
                f"{folder}: expected an empty folder, found files that are not a quickstart's; "
                "choose another with --folder"
            )
        if overwrite:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()


def _title(console: Console, number: int, name: str, what: str) -> None:
    console.print(f"\n[bold]{number}. {name}[/bold]  [dim]{what}[/dim]", highlight=False)


def _capture(folder: Path, *, quiet: bool) -> CaptureReport:
    values = yaml.safe_load((HERE / "capture.yaml").read_text(encoding="utf-8"))
    values["store"] = str(folder / "store")
    values["teacher"]["model"] = str(TEACHER)
    sources = values["corpus"]["sources"]
    values["corpus"]["sources"] = {name: [str(folder / "corpus" / f"{name}.jsonl")] for name in sources}
    path = _write_settings(folder / "capture.yaml", values)
    settings = read_settings(ClusterCaptureSettings, path)
    report = report_finished_capture(settings)
    if report is None:
        with connect(None, num_cpus=2):
            report = run_capture(settings, quiet=quiet)
    if report.quarantined_units:
        raise CaptureError(
            f"{values['store']}: units {report.quarantined_units} were set aside; run 'logitstore status'"
        )
    return report


def _write_training(folder: Path, name: str, loss: str, steps: int | None) -> Path:
    values = yaml.safe_load((HERE / "train.yaml").read_text(encoding="utf-8"))
    values["store"] = str(folder / "store")
    values["output"] = str(folder / name)
    values["loss"]["kind"] = loss
    if steps is not None:
        values["steps"] = steps
        values["schedule"]["warmup_steps"] = min(values["schedule"]["warmup_steps"], steps // 2)
    return _write_settings(folder / f"train-{name}.yaml", values)


def _write_settings(path: Path, values: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path


def _print_store(console: Console, store: LogitStore, capture: CaptureReport) -> None:
    statistics = store.compute_statistics()
    dense = store.plan.teacher.vocab_size * 2
    figures = capture.figures
    speed = f"{figures.mean_positions_per_second:,.0f} positions/s" if figures.units_captured else "all captured before"
    console.print(
        f"  {len(store.manifest.units)} units, {statistics.records:,} records, "
        f"{statistics.positions:,} positions, {speed}\n"
        f"  {statistics.bytes / 1e6:.1f} MB: {statistics.bytes_per_position:.1f} bytes per position, tokens and all "
        f"(dense float16 logits: {dense:,})\n"
        f"  the teacher's own loss on this text: {statistics.teacher_loss:.3f} nats per token",
        highlight=False,
    )


def build_table(text_only: Evaluation, distilled: Evaluation) -> Table:
    """The two students side by side; the better figure of each row in bold."""
    table = Table(box=None, padding=(0, 3), header_style="bold")
    table.add_column("")
    table.add_column("text only", justify="right")
    table.add_column("distilled", justify="right")
    table.add_column("")
    for label, name, form, more_is_better in COMPARED_FIGURES:
        left, right = getattr(text_only, name), getattr(distilled, name)
        if left is None or right is None:
            continue
        cells = [format(left, form), format(right, form)]
        if left != right:
            best = int((right > left) == more_is_better)
            cells[best] = f"[bold]{cells[best]}[/bold]"
        table.add_row(label, *cells, "[dim]more is better[/dim]" if more_is_better else "[dim]less is better[/dim]")
    return table
