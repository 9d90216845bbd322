"""The plan of a store that is made from a data set: files, units, and what the data set does not tell."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from logitstore import __version__
from logitstore.corpus.files import CorpusFile, CorpusSettings, StorageOptions, list_corpus_files
from logitstore.corpus.sequences import SequenceSettings
from logitstore.corpus.units import UnitTable, plan_units
from logitstore.errors import ConfigError
from logitstore.interchange.axolotl import AxolotlLayout
from logitstore.interchange.distillkit import CompressedDistillKitLayout, DistillKitLayout
from logitstore.interchange.distillkit_codec import CompressionConfig
from logitstore.interchange.layout import Alignment, Layout, LayoutName
from logitstore.interchange.parquet_files import check_columns, open_parquet
from logitstore.interchange.sampling import Sample, take_sample
from logitstore.interchange.signals import Normalization, SignalRules
from logitstore.settings import Settings
from logitstore.shard.layout import UnknownScalar
from logitstore.shard.writer import ShardSettings
from logitstore.store.plan import CorpusPlan, StorePlan
from logitstore.teacher.protocol import TeacherIdentity, TopKMethod

# Rounding brings sums above 1 by a thousandth or two. A polynomial does so by more, and has no bound.
_MASS_TOLERANCE, _POLYNOMIAL_MASS_TOLERANCE = 0.01, 0.5
_ROWS_AT_A_TIME = 1024
# What nobody wrote down: entropies, and logprobs of tokens outside of the support.
UNKNOWN_SCALARS: tuple[UnknownScalar, ...] = ("entropy", "next_token_logprob")


class ForeignTeacher(Settings):
    """What a data set does not tell of its teacher.

    Attributes:
        model: its name, for people.
        tokenizer: where its tokenizer is.
        tokenizer_fingerprint: of that tokenizer; students are held to it.
        vocab_size: ids that it can emit.
        end_of_text_id: what ends a text.
    """

    model: str = Field(min_length=1)
    tokenizer: str
    tokenizer_fingerprint: str
    vocab_size: int = Field(ge=1)
    end_of_text_id: int = Field(ge=0)


class ImportSettings(Settings):
    """How a data set is read.

    Attributes:
        layout: of the data set.
        compression: of compressed data.
        alignment: of axolotl's data, see `AxolotlLayout`.
        top_k: entries kept of a position; None for all that its first rows have.
        normalization: what logprobs are normalized over; "auto" decides by the first rows.
        mass_tolerance: how far the probabilities of a position may sum to more than 1; None for what suits the layout.
        shard: how signals become bytes.
        unit_tokens: tokens of a work unit; row groups are never split.
    """

    layout: LayoutName
    compression: CompressionConfig | None = None
    alignment: Alignment = "next"
    top_k: int | None = Field(default=None, ge=1)
    normalization: Normalization | Literal["auto"] = "auto"
    mass_tolerance: float | None = Field(default=None, ge=0)
    shard: ShardSettings = ShardSettings()
    unit_tokens: int = Field(default=1_000_000, ge=1)


@dataclass(frozen=True, kw_only=True)
class ImportPlan:
    """A store's plan, and how its data set is read.

    Attributes:
        store: the plan.
        layout, rules: for reading rows.
        sample: what the first rows told.
    """

    store: StorePlan
    layout: Layout
    rules: SignalRules
    sample: Sample


def build_import_plan(
    folder: str, teacher: ForeignTeacher, settings: ImportSettings, storage_options: StorageOptions | None = None
) -> ImportPlan:
    """List a data set, look at its first rows, and plan its store. Reads the lengths of all rows.

    Args:
        folder: URL of the folder, or a pattern of Parquet files.
        teacher: whose distributions these are.
        settings: how to read them.
        storage_options: for fsspec.
    Raises:
        ConfigError: there are no files, or the first rows are not what the settings say.
        CorpusError, OutsideError: a file cannot be read.
    """
    layout = build_import_layout(settings)
    files = list_data_files(folder, storage_options)
    sample = take_sample(files, layout, teacher.vocab_size, storage_options)
    top_k = settings.top_k or min(sample.top_k, teacher.vocab_size)
    is_polynomial = layout.relative_bound is None
    tolerance = settings.mass_tolerance
    rules = SignalRules(
        vocab_size=teacher.vocab_size,
        top_k=top_k,
        normalization=sample.normalization if settings.normalization == "auto" else settings.normalization,
        mass_tolerance=(_POLYNOMIAL_MASS_TOLERANCE if is_polynomial else _MASS_TOLERANCE)
        if tolerance is None
        else tolerance,
    )
    units, longest = _plan_units(files, layout, settings.unit_tokens, storage_options)
    plan = StorePlan.model_validate(
        {
            "teacher": _build_identity(teacher, settings, rules),
            "corpus": CorpusPlan(
                text_field="input_ids",
                id_field=None,
                max_document_bytes=max(file.bytes for file in files),
                files=tuple(files),
            ),
            "sequences": SequenceSettings(mode="document", length=max(1, longest - 1)),
            "method": TopKMethod(k=top_k),
            "shard": settings.shard,
            "seed": 0,
            "units": units.to_json(),
            "created_by": f"logitstore {__version__}",
            "created_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "unknown_scalars": UNKNOWN_SCALARS,
        }
    )
    return ImportPlan(store=plan, layout=layout, rules=rules, sample=sample)


def list_data_files(folder: str, storage_options: StorageOptions | None = None) -> list[CorpusFile]:
    """The Parquet files of a data set, in path order, with fingerprints.

    Raises:
        ConfigError: there are none.
    """
    is_pattern = folder.endswith(".parquet") or any(sign in folder for sign in "*?[")
    pattern = folder if is_pattern else f"{folder.rstrip('/')}/**/*.parquet"
    try:
        return list_corpus_files(CorpusSettings(files=[pattern], format="parquet"), storage_options)
    except ConfigError as error:
        raise ConfigError(
            f"{error}; a data set that was saved with save_to_disk is not in Parquet: write it with "
            "datasets.load_from_disk(folder).to_parquet(file)"
        ) from None


def build_import_layout(settings: ImportSettings) -> Layout:
    """The layout that a data set is read by.

    Raises:
        ConfigError: a setting is missing, or belongs to another layout.
    """
    is_compressed = settings.layout is LayoutName.DISTILLKIT_COMPRESSED
    if is_compressed != (settings.compression is not None):
        raise ConfigError(
            f"layout {settings.layout}: expected {'a' if is_compressed else 'no'} compression config, found "
            f"{'none: give the compression_config.yaml of the data set' if is_compressed else 'one'}"
        )
    if settings.alignment != "next" and settings.layout is not LayoutName.AXOLOTL:
        raise ConfigError(f"alignment 'same': expected layout axolotl beside it, found {settings.layout}")
    if settings.compression is not None:
        return CompressedDistillKitLayout(config=settings.compression)
    if settings.layout is LayoutName.DISTILLKIT:
        return DistillKitLayout(top_k=settings.top_k or 1)
    return AxolotlLayout(top_k=settings.top_k or 1, alignment=settings.alignment)


def _plan_units(
    files: Sequence[CorpusFile], layout: Layout, unit_tokens: int, storage_options: StorageOptions | None
) -> tuple[UnitTable, int]:
    """The units, and the token ids of the longest row."""
    tokens_of: list[list[int]] = []
    longest = 1
    for file in files:
        tokens: list[int] = []
        with open_parquet(file, storage_options) as parquet:
            check_columns(file.path, parquet.schema_arrow, layout)
            for group in range(parquet.num_row_groups):
                total = 0
                for batch in parquet.iter_batches(
                    _ROWS_AT_A_TIME, row_groups=[group], columns=["input_ids"], use_threads=False
                ):
                    lengths = pc.list_value_length(batch.column(0)).fill_null(0).cast(pa.int64()).to_numpy()
                    total += int(lengths.sum())
                    longest = max(longest, int(lengths.max(initial=0)))
                tokens.append(total)
        tokens_of.append(tokens)
    units = plan_units(
        files,
        unit_tokens,
        row_group_bytes_of=lambda index: tokens_of[index],
        decompressed_bytes_of=lambda index: sum(tokens_of[index]),
    )
    return units, longest


def _build_identity(teacher: ForeignTeacher, settings: ImportSettings, rules: SignalRules) -> TeacherIdentity:
    """How a data set was read decides the distributions, as weights do: it stands in their place."""
    how = {
        "layout": str(settings.layout),
        "alignment": settings.alignment,
        "compression": settings.compression and settings.compression.model_dump(mode="json"),
        "normalization": rules.normalization,
        "mass_tolerance": rules.mass_tolerance,
        "teacher": teacher.model,
    }
    return TeacherIdentity(
        model=teacher.model,
        tokenizer=teacher.tokenizer,
        engine="imported",
        engine_version=f"logitstore {__version__}",
        architecture="unknown",
        dtype="unknown",
        weights_fingerprint=json.dumps(how, sort_keys=True),
        tokenizer_fingerprint=teacher.tokenizer_fingerprint,
        vocab_size=teacher.vocab_size,
        padded_vocab_size=teacher.vocab_size,
        max_positions=None,
        end_of_text_id=teacher.end_of_text_id,
    )
