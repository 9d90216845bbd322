"""`logitstore benchmark …`: the measurements behind BENCHMARKS.md, each printed as the table that stands there."""

from __future__ import annotations

import typer

from tools.benchmark.capture import capture
from tools.benchmark.capture_vllm import capture_vllm
from tools.benchmark.codec import codec
from tools.benchmark.driver import driver
from tools.benchmark.loss import loss
from tools.benchmark.method_cost import method_cost
from tools.benchmark.methods import methods
from tools.benchmark.scale import scale
from tools.benchmark.storage import storage
from tools.benchmark.stream import stream
from tools.benchmark.train import train
from tools.benchmark.verbs import as_verb
from tools.benchmark.vocabularies import vocabularies

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def describe() -> None:
    """Measure on this machine what BENCHMARKS.md tells of others: always beside an alternative, in one run.

    Results are tables in Markdown, as they stand there, with the machine above them; --json has the same cells.

    \b
    Example:
      logitstore benchmark codec
    """


for measure in (
    capture,
    capture_vllm,
    codec,
    driver,
    loss,
    method_cost,
    methods,
    scale,
    storage,
    stream,
    vocabularies,
    train,
):
    app.command(measure.__name__.replace("_", "-"))(as_verb(measure))
