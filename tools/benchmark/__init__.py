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
from tools.benchmark.vocabularies import vocabularies

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def describe() -> None:
    """Measure on this machine what BENCHMARKS.md tells of others: always beside an alternative, in one run.

    Results are tables in Markdown, with the machine above them.

    \b
    Example:
      logitstore benchmark codec
    """


app.command()(capture)
app.command("capture-vllm")(capture_vllm)
app.command()(codec)
app.command()(driver)
app.command()(loss)
app.command()(method_cost)
app.command()(methods)
app.command()(scale)
app.command()(storage)
app.command()(stream)
app.command()(vocabularies)
app.command()(train)
