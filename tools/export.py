"""`logitstore export`: a student in fewer bits, for small machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.logs import AsJson, Quiet, Verbose, offer, set_up_logs


def command(
    student: Annotated[Path, typer.Argument(metavar="STUDENT_FOLDER", help="Folder of a finished student.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder (int8) or file (gguf) to make.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="int8, gguf-f16 or gguf-q8_0.",
            autocompletion=offer("int8", "gguf-f16", "gguf-q8_0"),
        ),
    ],
    converter: Annotated[
        Path | None,
        typer.Option(metavar="FILE.py", help="gguf: llama.cpp's convert_hf_to_gguf.py; an installed one otherwise."),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a student by another library, load what came of it, and compare the two on a few tokens.

    int8 is a folder that transformers and vLLM load (torchao); gguf is a file for llama.cpp.

    \b
    Example:
      logitstore export runs/small/student runs/small/int8 --to int8
      logitstore export runs/small/student small.gguf --to gguf-q8_0 --converter llama.cpp/convert_hf_to_gguf.py
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from dataclasses import asdict
    from typing import cast

    from logitstore.errors import ConfigError
    from tools.look import build_facts, format_bytes, format_share, print_json, print_result

    if not student.is_dir():  # transformers would take it for a name on the hub, and ask there for most of a minute
        raise ConfigError(f"{student}: expected the folder of a student, found none; check the path")
    from trainer.export import ExportFormat, export_student

    report = export_student(student, path, cast("ExportFormat", to), converter=converter)
    if as_json:
        print_json({**asdict(report), "path": str(report.path)})
        return
    facts = [
        ("written", report.path),
        ("weights", f"{format_bytes(report.bytes)}, of {format_bytes(report.student_bytes)}"),
        (
            "largest difference",
            f"{report.largest_difference:.4f} of a logit; the largest logit is {report.largest_logit:.2f}",
        ),
        ("same likeliest token", f"{format_share(report.top1_agreement)} of 64 positions of arbitrary tokens"),
    ]
    print_result(build_facts(facts))


if __name__ == "__main__":
    from tools.cli import main

    main("export")
