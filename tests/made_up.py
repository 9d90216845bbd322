"""Made-up records, plans and shards for tests: no teacher, but signals of a real (random) distribution."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from logitstore.corpus.documents import CorpusFile
from logitstore.corpus.sequences import SequenceSettings
from logitstore.corpus.units import UnitTable
from logitstore.records import DocumentSpan, Record, RecordAddress, Signal
from logitstore.shard.codec import Float32Codec
from logitstore.shard.layout import FORMAT_VERSION, ShardHeader
from logitstore.shard.writer import ShardSettings, write_shard
from logitstore.store.commit import Commit, build_data_path
from logitstore.store.files import StoreFiles
from logitstore.store.plan import StorePlan
from logitstore.store.sealed_json import seal, unseal
from logitstore.teacher.protocol import TeacherIdentity, TopKMethod


def build_signal(
    logits_TV: np.ndarray,
    next_ids: np.ndarray,
    top_k: int,
    counts: np.ndarray | None = None,
    temperatures: tuple[float, ...] = (),
) -> Signal:
    """Exact top-k signal of float64 logits; `counts` cuts the support of each position shorter than top_k."""
    logprobs = logits_TV - np.logaddexp.reduce(logits_TV, axis=-1, keepdims=True)
    positions, vocab_size = logits_TV.shape
    order = np.argsort(-logprobs, axis=-1, kind="stable")
    ranked = np.take_along_axis(logprobs, order, axis=-1)
    counts = np.full(positions, min(top_k, vocab_size)) if counts is None else counts
    kept = np.arange(vocab_size) < counts[:, None]
    tails = [np.logaddexp.reduce(ranked[t, c:]) if c < vocab_size else -np.inf for t, c in enumerate(counts)]
    return Signal(
        support_counts=counts.astype(np.int32),
        support_ids=order[kept].astype(np.int32),
        support_logprobs=ranked[kept].astype(np.float32),
        tail_logprob=np.array(tails, dtype=np.float32),
        entropy=-(np.exp(logprobs) * logprobs).sum(-1).astype(np.float32),
        next_token_logprob=logprobs[np.arange(positions), next_ids].astype(np.float32),
        temperatures=temperatures,
        tempered_logsumexp=compute_normalizers(logprobs, temperatures) if temperatures else None,
    )


def compute_normalizers(logprobs_TV: np.ndarray, temperatures: tuple[float, ...]) -> np.ndarray:
    """[T, G] float32, log of the sum of p^(1 / temperature)."""
    columns = [np.logaddexp.reduce(logprobs_TV / temperature, axis=-1) for temperature in temperatures]
    return np.stack(columns, axis=-1).astype(np.float32)


def build_records(
    num_records: int,
    *,
    unit: int = 0,
    length: int = 12,
    vocab_size: int = 50,
    top_k: int = 8,
    ragged: bool = True,
    seed: int = 0,
    temperatures: tuple[float, ...] = (),
) -> list[Record]:
    """Records of one unit, with lengths up to `length` and supports of up to `top_k` entries."""
    generator = np.random.default_rng([seed, unit])
    records = []
    for index in range(num_records):
        positions = int(generator.integers(1, length + 1)) if ragged else length
        token_ids = generator.integers(0, vocab_size, positions + 1).astype(np.int32)
        counts = generator.integers(1, top_k + 1, positions) if ragged else None
        logits = generator.normal(0, 3, (positions, vocab_size))
        signal = build_signal(logits, token_ids[1:], top_k, counts, temperatures)
        records.append(
            Record(
                address=RecordAddress(unit=unit, index=index),
                token_ids=token_ids,
                loss_mask=generator.random(positions) < 0.9,
                signal=signal,
                documents=(DocumentSpan(document_id=f"corpus.jsonl@{unit}.{index}", start=0, document_offset=0),),
            )
        )
    return records


def label_records(records: list[Record], labels: tuple[str, ...], seed: int = 0) -> list[Record]:
    """The same records, made of one to three documents each, every one with some label."""
    generator = np.random.default_rng(seed)
    labelled = []
    for record in records:
        starts = range(min(int(generator.integers(1, 4)), record.num_positions))
        name = record.documents[0].document_id
        documents = tuple(
            DocumentSpan(
                document_id=f"{name}.{start}", start=start, document_offset=0, label=str(generator.choice(labels))
            )
            for start in starts
        )
        labelled.append(replace(record, documents=documents))
    return labelled


VOCAB_SIZE = 50


def build_identity(**changes: object) -> TeacherIdentity:
    """Identity of a teacher that does not exist; its signals are made up but consistent."""
    values: dict[str, object] = {
        "model": "made-up",
        "engine": "huggingface",
        "engine_version": "0",
        "architecture": "MadeUpForCausalLM",
        "dtype": "float32",
        "weights_fingerprint": "0" * 64,
        "tokenizer_fingerprint": "1" * 64,
        "vocab_size": VOCAB_SIZE,
        "padded_vocab_size": VOCAB_SIZE,
        "max_positions": None,
        "end_of_text_id": 0,
    }
    return TeacherIdentity.model_validate({**values, **changes})


def build_plan(num_units: int, *, sources: tuple[str, ...] = ("corpus",), **changes: object) -> StorePlan:
    """Plan of a made-up corpus of one file per unit; sources take turns in equal blocks."""
    files = [
        CorpusFile(
            path=f"/corpus/{unit}.txt",
            source=sources[unit * len(sources) // num_units],
            format="text",
            compression="none",
            bytes=100,
            fingerprint=f"{unit:064d}",
        )
        for unit in range(num_units)
    ]
    units = np.arange(num_units)
    table = UnitTable(span_unit=units, span_file=units, span_start=units * 0, span_stop=units * 0 + 100)
    values: dict[str, object] = {
        "teacher": build_identity(),
        "corpus": {"text_field": "text", "id_field": None, "max_document_bytes": 1000, "files": files},
        "sequences": SequenceSettings(length=12),
        "method": TopKMethod(k=8),
        "shard": ShardSettings(codec=Float32Codec(), row_group_bytes=2000),
        "seed": 0,
        "units": table.to_json(),
    }
    return StorePlan.model_validate({**values, **changes})


def put_shard(
    files: StoreFiles, plan: StorePlan, unit: int, records: list[Record], attempt: str, folder: Path
) -> Commit:
    """Upload a shard and return the commit that would make it the unit's."""
    fingerprint = plan.compute_fingerprint()
    header = ShardHeader(
        format_version=FORMAT_VERSION,
        unit=unit,
        plan_fingerprint=fingerprint,
        vocab_size=plan.teacher.vocab_size,
        codec=plan.shard.codec,
        unknown_scalars=plan.unknown_scalars,
        is_drawn=plan.is_drawn,
        temperatures=plan.temperatures,
        has_labels=plan.has_labels,
    )
    spilled = folder / f"{unit}-{attempt}.parquet"
    shard = write_shard(spilled, records, header, plan.shard)
    files.put_file(build_data_path(unit, attempt), spilled)
    spilled.unlink()
    return Commit(
        plan_fingerprint=fingerprint,
        unit=unit,
        source=plan.build_unit_table().source_of(unit, plan.files),
        attempt=attempt,
        file=build_data_path(unit, attempt),
        shard=shard,
        documents=len(records),
        recorded_documents=len(records),
        dead_letter_counts={},
        dead_letters=(),
        engine="made-up",
        seconds=0.0,
    )


def edit_sealed(path: Path, old: str, new: str) -> None:
    """Change the text of a plan or commit and seal it again, as whoever writes nonsense would."""
    text = unseal(path.read_bytes()).decode()
    assert old in text
    path.write_bytes(seal(text.replace(old, new, 1).encode()))


def damage_only_shard(url: str) -> Path:
    """Change a bit of a row group of a store's only data file; returns its path."""
    [path] = Path(url).glob("data/*.parquet")
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    return path
