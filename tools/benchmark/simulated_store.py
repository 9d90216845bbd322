"""A store of any number of units whose commits are made up: of full size for all who read no records."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from fsspec.spec import AbstractFileSystem

if TYPE_CHECKING:
    from logitstore.corpus.documents import CorpusFile
    from logitstore.corpus.units import UnitTable
    from logitstore.store.plan import StorePlan
    from logitstore.teacher.protocol import TeacherIdentity

UNIT_BYTES = 4_000_000
UNITS_PER_FILE = 10
_YEAR_SECONDS = 365 * 24 * 3600.0
_VOCAB_SIZE = 151_936
_RECORDS_PER_ROW_GROUP = 4
_POSITIONS_PER_RECORD = 4096
_UNITS_AT_A_TIME = 1000


def build_corpus_files(num_units: int) -> list[CorpusFile]:
    """JSON lines files that do not exist, of ten units each but for the last."""
    from logitstore.corpus.documents import CorpusFile

    return [
        CorpusFile(
            path=f"/simulated/corpus/part-{first // UNITS_PER_FILE:06d}.jsonl",
            source="web" if 2 * first < num_units else "code",
            format="jsonl",
            compression="none",
            bytes=min(UNITS_PER_FILE, num_units - first) * UNIT_BYTES,
            fingerprint=f"{first:064x}",
        )
        for first in range(0, num_units, UNITS_PER_FILE)
    ]


def build_simulated_teacher() -> TeacherIdentity:
    """Of a model that there is not."""
    from logitstore.teacher.protocol import TeacherIdentity

    return TeacherIdentity.model_validate(
        {
            "model": "simulated",
            "engine": "huggingface",
            "engine_version": "0",
            "architecture": "SimulatedForCausalLM",
            "dtype": "float32",
            "weights_fingerprint": "0" * 64,
            "tokenizer_fingerprint": "1" * 64,
            "vocab_size": _VOCAB_SIZE,
            "padded_vocab_size": _VOCAB_SIZE,
            "max_positions": None,
            "end_of_text_id": 0,
        }
    )


def build_simulated_plan(corpus_files: list[CorpusFile], units: UnitTable) -> StorePlan:
    """A plan over such files."""
    from logitstore.store.plan import StorePlan

    return StorePlan.model_validate(
        {
            "teacher": build_simulated_teacher(),
            "corpus": {
                "text_field": "text",
                "id_field": None,
                "max_document_bytes": UNIT_BYTES,
                "files": corpus_files,
            },
            "sequences": {"length": _POSITIONS_PER_RECORD},
            "method": {"kind": "top_k", "k": 64},
            "shard": {},
            "seed": 0,
            "units": units.to_json(),
        }
    )


def write_units(folder: Path, units: range, row_groups: int, plan_fingerprint: str, *, are_old: bool) -> None:
    """Put commits with made-up contents, and sparse data files of the sizes that they name, into a local store.

    Args:
        folder: of the store.
        units: which.
        row_groups: of each unit.
        plan_fingerprint: of the store's plan.
        are_old: date them a year back, so that no snapshot takes them for newer than a manifest.
    """
    for name in ("commits", "data"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    modified = time.time() - _YEAR_SECONDS if are_old else time.time()
    for first in range(units.start, units.stop, _UNITS_AT_A_TIME):
        for file, num_bytes, data_path, data in _build_units(
            range(first, min(first + _UNITS_AT_A_TIME, units.stop)), row_groups, plan_fingerprint
        ):
            _write(folder / file, data, modified)
            _write(folder / data_path, b"", modified, num_bytes)


def _write(path: Path, data: bytes, modified: float, num_bytes: int | None = None) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, data)
    if num_bytes is not None:
        os.ftruncate(descriptor, num_bytes)
    os.utime(descriptor, (modified, modified))
    os.close(descriptor)


def _build_units(units: range, row_groups: int, plan_fingerprint: str) -> Iterator[tuple[str, int, str, bytes]]:
    """Path of the commit, bytes and path of the shard, and bytes of the commit, of each unit."""
    from logitstore.shard.summary import ShardSummary
    from logitstore.store.commit import Commit, build_commit_path, build_data_path
    from logitstore.store.sealed_json import seal

    generator = np.random.default_rng(units.start)
    groups = _build_row_groups(generator, len(units) * row_groups)
    for i, unit in enumerate(units):
        own = tuple(groups[i * row_groups : (i + 1) * row_groups])
        for before, after in itertools.pairwise(own):
            after["offset"] = before["offset"] + before["bytes"]
        footer = own[-1]["offset"] + own[-1]["bytes"]
        shard = ShardSummary.model_construct(
            bytes=footer + 20_000,
            sha256=generator.bytes(32).hex(),
            footer_offset=footer,
            footer_sha256=generator.bytes(32).hex(),
            row_groups=own,  # type: ignore[arg-type]  # as good as models where they are only written out
        )
        attempt = generator.bytes(8).hex()
        commit = Commit.model_construct(
            plan_fingerprint=plan_fingerprint,
            unit=unit,
            source="web",
            attempt=attempt,
            file=build_data_path(unit, attempt),
            shard=shard,
            documents=1000,
            recorded_documents=1000,
            dead_letter_counts={},
            dead_letters=(),
            engine="simulated 0",
            seconds=100.0,
        )
        data = seal(commit.model_dump_json(warnings=False).encode())
        yield build_commit_path(unit), shard.bytes, build_data_path(unit, attempt), data


def _build_row_groups(generator: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Values of `RowGroup` with nothing in them that repeats and would compress better than the real ones do."""
    from logitstore.shard.layout import OPTIONAL_COLUMNS, SCHEMA
    from logitstore.shard.summary import ENTROPY_BINS, TAIL_DECADES

    positions = _RECORDS_PER_ROW_GROUP * _POSITIONS_PER_RECORD
    names = [name for name in SCHEMA.names if name not in OPTIONAL_COLUMNS]
    column_bytes = generator.integers(1_000, 600_000, (count, len(names)))
    sums = generator.random((count, 3)) * positions
    histograms = [
        np.diff(np.sort(generator.integers(0, positions, (count, bins - 1))), prepend=0, append=positions).tolist()
        for bins in (ENTROPY_BINS, TAIL_DECADES + 1)
    ]
    return [
        {
            "offset": 4,
            "bytes": sum(columns),
            "sha256": generator.bytes(32).hex(),
            "records": _RECORDS_PER_ROW_GROUP,
            "positions": positions,
            "taught_positions": positions,
            "support_entries": 64 * positions,
            "entropy_sum": entropy,
            "next_token_logprob_sum": -loss,
            "impossible_tokens": 0,
            "tail_mass_sum": tail,
            "entropy_histogram": entropies,
            "column_bytes": dict(zip(names, columns, strict=True)),
            "tail_histogram": tails,
        }
        for columns, (entropy, loss, tail), entropies, tails in zip(
            column_bytes.tolist(), sums.tolist(), *histograms, strict=True
        )
    ]


class SimulatedBucket(AbstractFileSystem):  # type: ignore[misc]  # fsspec is untyped
    """Lists `num_units` commits in the dictionaries that s3fs makes of a bucket's pages; there is no network."""

    protocol = "simulated-bucket"

    def __init__(self, num_units: int, **options: Any) -> None:
        super().__init__(**options)
        self._num_units = num_units

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[dict[str, Any]]:
        """Entries of a folder: commits, or nothing."""
        import datetime

        if not path.endswith("/commits"):
            raise FileNotFoundError(path)
        entries = []
        for unit in range(self._num_units):
            key = f"bucket/store/commits/{unit:07d}.json"
            entry = {
                "Key": key,
                "LastModified": datetime.datetime.fromtimestamp(1_700_000_000 + unit, datetime.UTC),
                "ETag": f'"{unit:032x}"',
                "Size": 4000,
                "StorageClass": "STANDARD",
                "type": "file",
                "size": 4000,
                "name": key,
            }
            entries.append(entry)
        return entries
