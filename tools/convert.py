"""`logitstore convert`: data sets of other distillation tools from a store, and stores from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tools.logs import AsJson, Quiet, Verbose, offer, set_up_logs

app: typer.Typer = typer.Typer(no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)

LayoutOption = Annotated[
    str,
    typer.Option(
        metavar="LAYOUT",
        help="Of the data set: distillkit, distillkit-compressed or axolotl.",
        autocompletion=offer("distillkit", "distillkit-compressed", "axolotl"),
    ),
]
CompressionOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE.yaml", help="distillkit-compressed: DistillKit's compression_config.yaml."),
]
AlignmentOption = Annotated[
    str,
    typer.Option(
        metavar="next|same",
        help="axolotl: whether row j speaks about token j + 1 or, of old, token j.",
        autocompletion=offer("next", "same"),
    ),
]
CheckAllOption = Annotated[
    bool, typer.Option("--check-all", help="Compare everything that was written with its source, not a sample.")
]


@app.callback()
def describe() -> None:
    """Go from a store to a data set of another distillation tool, and back.

    Layouts: 'distillkit' (token_ids, top_values), 'distillkit-compressed' (bytes, with a compression config) and
    'axolotl' (target_token_ids, target_logprobs, target_mask). After writing, distributions are read back and compared.

    \b
    Example:
      logitstore convert export --help
      logitstore convert import --help
    """


@app.command("export")
def export_command(
    store: Annotated[str, typer.Argument(metavar="STORE", help="URL or folder of the store.")],
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="URL or folder of the data set, new or begun.")],
    layout: LayoutOption,
    top_k: Annotated[int | None, typer.Option(min=1, help="Entries of a position; all that the store keeps.")] = None,
    manifest: Annotated[int | None, typer.Option(min=1, help="Number of the manifest; the newest otherwise.")] = None,
    compression: CompressionOption = None,
    alignment: AlignmentOption = "next",
    renormalize: Annotated[
        bool | None,
        typer.Option(
            "--renormalize/--no-renormalize",
            help="axolotl: logprobs over the K entries, as it trains by default, or over the vocabulary.",
        ),
    ] = None,
    trim: Annotated[
        bool, typer.Option("--trim", help="DistillKit: as many token ids as rows of signal, as it packs them.")
    ] = False,
    check_all: CheckAllOption = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write a store as a data set of Parquet files, one for each unit.

    Stop it and run it again as you like: files that are written stay, and the same export goes on. What was written is
    read back and compared with the store; exit code 3 when it differs by more than the layout's rounding.

    \b
    Example:
      logitstore convert export runs/store runs/for-distillkit --layout distillkit --top-k 32
      logitstore convert export runs/store runs/small --layout distillkit-compressed --compression config.yaml
      logitstore convert export runs/store runs/for-axolotl --layout axolotl
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from logitstore.interchange.exporting import ExportSettings
    from logitstore.settings import build_settings
    from tools.convert_export import check_agreement, read_compression, render_export, run_export
    from tools.look import print_json, print_result

    values = {
        "layout": layout,
        "top_k": top_k,
        "compression": read_compression(compression),
        "alignment": alignment,
        "renormalize": renormalize,
        "trim": trim,
    }
    settings = build_settings(ExportSettings, values, where="logitstore convert export")
    summary = run_export(store, folder, settings, manifest=manifest, check_all=check_all, quiet=quiet)
    if as_json:
        print_json(summary)
    else:
        print_result(*render_export(summary))
    check_agreement(summary.agreement, summary.folder)


@app.command("import")
def import_command(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help="URL or folder of the data set, or a pattern of Parquet files.")
    ],
    store: Annotated[str, typer.Argument(metavar="STORE", help="URL or folder of the store, new or begun.")],
    layout: LayoutOption,
    teacher: Annotated[str, typer.Option(metavar="NAME", help="Whose distributions these are: a name, for people.")],
    tokenizer: Annotated[
        str, typer.Option(metavar="FOLDER|NAME", help="The teacher's tokenizer; students are held to it.")
    ],
    vocab_size: Annotated[
        int | None, typer.Option(min=1, help="Ids of the vocabulary, where the tokenizer's own count is not right.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Entries kept of a position; as many as the first rows have.")
    ] = None,
    compression: CompressionOption = None,
    alignment: AlignmentOption = "next",
    normalization: Annotated[
        str,
        typer.Option(
            metavar="auto|vocabulary|support",
            help="What logprobs are normalized over: all ids, or the entries alone. The first rows decide otherwise.",
            autocompletion=offer("auto", "vocabulary", "support"),
        ),
    ] = "auto",
    mass_tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="How far a position may sum to more than 1: 0.01, and 0.5 for polynomials."),
    ] = None,
    codec: Annotated[
        str,
        typer.Option(
            metavar="compact|float16|float32",
            help="How the store rounds logprobs.",
            autocompletion=offer("compact", "float16", "float32"),
        ),
    ] = "compact",
    check_all: CheckAllOption = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make a store of a data set of Parquet files.

    Stop it and run it again as you like: units that are committed stay, and the same import goes on. Rows that cannot
    be used become dead letters with file and row. What the store says is compared with the data set; exit code 3 when
    it differs by more than the codec's rounding. Entropies, and logprobs of tokens outside of the entries, stay
    unknown.

    \b
    Example:
      logitstore convert import runs/logits runs/store --layout distillkit --teacher big --tokenizer ./big
      logitstore convert import 'data/*.parquet' s3://bucket/store --layout axolotl --teacher big --tokenizer ./big
    """
    set_up_logs(quiet=quiet, verbose=verbose)
    from logitstore.interchange.import_plan import ImportSettings
    from logitstore.settings import build_settings
    from tools.convert_export import check_agreement
    from tools.convert_import import find_compression, load_foreign_teacher, render_import, run_import
    from tools.look import print_json, print_result

    values = {
        "layout": layout,
        "compression": find_compression(folder, layout, compression),
        "alignment": alignment,
        "top_k": top_k,
        "normalization": normalization,
        "mass_tolerance": mass_tolerance,
        "shard": {"codec": {"kind": codec}},
    }
    settings = build_settings(ImportSettings, values, where="logitstore convert import")
    identity = load_foreign_teacher(teacher, tokenizer, vocab_size)
    summary = run_import(folder, store, identity, settings, check_all=check_all, quiet=quiet)
    if as_json:
        print_json(summary)
    else:
        print_result(*render_import(summary))
    check_agreement(summary.agreement, summary.store)


if __name__ == "__main__":
    from tools.cli import main

    main("convert")
