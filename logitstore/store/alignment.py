"""Whether the records of two stores can be told to be the same from their plans, and which they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from logitstore.corpus.documents import CorpusFile
from logitstore.errors import IncompatibleStoreError
from logitstore.store.logit_store import LogitStore
from logitstore.store.plan import StorePlan
from logitstore.teacher.generation import GenerationSettings

# Dead letters that another teacher, or the same one in other company, need not have.
_OF_THE_TEACHER = '"(invalid_signal|out_of_memory|engine_died)"'


@dataclass(frozen=True, kw_only=True, eq=False)
class Alignment:
    """Which records several stores have in common.

    Attributes:
        units: [U] int64, in which every store has records; ascending.
        row_groups: [G] int64, those of the first store that belong to these units; ascending.
        starts: of every store, [G] int64, the place in the store (as in `store[i]`) of each row group's first record.
        left_out: of every store, how many of its records another store does not have.
    """

    units: np.ndarray
    row_groups: np.ndarray
    starts: tuple[np.ndarray, ...]
    left_out: tuple[int, ...]


def check_same_sequences(first: LogitStore, other: LogitStore) -> None:
    """Check that two stores were made of the same sequences: tokenizer, corpus and how it was cut.

    A store may have been given more corpus than the other, so only the units that both have planned are compared.

    Raises:
        IncompatibleStoreError: they were not; prints both sides of everything that differs.
    """
    one, two = (_describe_sequences(store.plan) for store in (first, other))
    differing = [name for name in one if one[name] != two[name] and name != "units"]
    if not differing and not _have_equal_units(first.plan, other.plan):
        differing = ["units"]
    if differing:
        listed = "\n".join(f"  {key}\n    {first.url}: {one[key]}\n    {other.url}: {two[key]}" for key in differing)
        raise IncompatibleStoreError(
            f"{other.url}: expected the sequences of {first.url}, found others:\n{listed}\n"
            "capture one corpus with the same tokenizer and sequence settings by both teachers"
        )


def find_common_records(stores: Sequence[LogitStore]) -> Alignment:
    """What several stores of the same sequences have in common, by the addresses of their records.

    A unit of which a teacher had to leave a document out is none that the stores have in common: behind the document,
    its texts are cut otherwise.

    Raises:
        IncompatibleStoreError: they have no unit in common, or differ in the number of records of one.
    """
    first = stores[0]
    counted = [np.unique(store.row_group_units, return_index=True) for store in stores]
    # Of every store: the units that have records, and the place of the first record of each.
    starts_of_units = [
        (units, _compute_first_records(store)[np.append(row_groups, store.num_row_groups)])
        for store, (units, row_groups) in zip(stores, counted, strict=True)
    ]
    common = starts_of_units[0][0]
    for units, _ in starts_of_units[1:]:
        common = np.intersect1d(common, units)
    for store in stores:
        common = np.setdiff1d(common, list_units_cut_otherwise(store))
    sizes = []
    for units, starts in starts_of_units:
        sizes.append(np.diff(starts)[np.searchsorted(units, common)])
    _check_same_sizes(stores, common, sizes)
    row_groups = np.flatnonzero(np.isin(first.row_group_units, common))
    unit_of_row_group = first.row_group_units[row_groups]
    place_in_unit = _compute_first_records(first)[row_groups] - _get_starts(starts_of_units[0], unit_of_row_group)
    return Alignment(
        units=common.astype(np.int64),
        row_groups=row_groups.astype(np.int64),
        starts=tuple(_get_starts(place, unit_of_row_group) + place_in_unit for place in starts_of_units),
        left_out=tuple(len(store) - int(size.sum()) for store, size in zip(stores, sizes, strict=True)),
    )


def list_units_cut_otherwise(store: LogitStore) -> np.ndarray:
    """[·] int32, units with dead letters that are the teacher's, which could not score them."""
    found = []
    for table in store.manifest.iterate_units("unit", "dead_letter_counts"):
        is_short = pc.match_substring_regex(table["dead_letter_counts"], _OF_THE_TEACHER)
        found.append(table["unit"].filter(is_short).to_numpy())
    return np.concatenate(found)


def _check_same_sizes(stores: Sequence[LogitStore], common: np.ndarray, sizes: Sequence[np.ndarray]) -> None:
    first = stores[0]
    for other, size in zip(stores[1:], sizes[1:], strict=True):
        if (wrong := np.flatnonzero(size != sizes[0])).size:
            here, there = int(sizes[0][wrong[0]]), int(size[wrong[0]])
            raise IncompatibleStoreError(
                f"{other.url}: unit {int(common[wrong[0]])}: expected the {here} records that {first.url} has there, "
                f"found {there} ({len(wrong)} such unit(s)); look for dead letters with 'logitstore inspect', and "
                "capture the unit again with the other teacher"
            )
    if not len(common):
        listed = "\n".join(f"  {store.url}: {_describe_committed(store)}" for store in stores)
        raise IncompatibleStoreError(
            f"{first.url}: expected records that all stores have, found none\n{listed}\ncapture more of the corpus"
        )


def _get_starts(starts_of_units: tuple[np.ndarray, np.ndarray], units: np.ndarray) -> np.ndarray:
    known, starts = starts_of_units
    found: np.ndarray = starts[np.searchsorted(known, units)]
    return found


def _compute_first_records(store: LogitStore) -> np.ndarray:
    """[G + 1] int64, the place of the first record of every row group, and how many records there are."""
    return np.concatenate([[0], np.cumsum(store.row_group_records, dtype=np.int64)])


def _describe_committed(store: LogitStore) -> str:
    units = store.manifest.units
    return f"{len(units)} unit(s) of {store.plan.num_units}" + (f", {units[0]} to {units[-1]}" if len(units) else "")


def _describe_sequences(plan: StorePlan) -> dict[str, object]:
    teacher, corpus = plan.teacher, plan.corpus
    return {
        "tokenizer_fingerprint": teacher.tokenizer_fingerprint,
        "vocab_size": teacher.vocab_size,
        "end_of_text_id": teacher.end_of_text_id,
        "sequences": plan.sequences,
        "text_field": corpus.text_field,
        "max_document_bytes": corpus.max_document_bytes,
        "chat": corpus.chat,
        "given_ids": corpus.given_ids,
        "answers": None if plan.generate is None else _describe_answers(plan, plan.generate),
        "units": f"{plan.num_units} unit(s) of up to {plan.unit_bytes} bytes, {len(plan.files)} file(s)",
    }


def _describe_answers(plan: StorePlan, generate: GenerationSettings) -> str:
    """What a teacher's answers are a function of, besides the prompts: those of two teachers are never the same."""
    return f"seed {plan.seed}, weights {plan.teacher.weights_fingerprint}, {generate}"


def _have_equal_units(one: StorePlan, two: StorePlan) -> bool:
    """Whether the units that both have are made of the same parts of the same files."""
    num_units = min(one.num_units, two.num_units)
    columns: list[list[np.ndarray]] = []
    files: list[list[tuple[object, ...]]] = []
    for plan in (one, two):
        table = plan.build_unit_table()
        stop = int(np.searchsorted(table.span_unit, num_units))
        columns.append([column[:stop] for column in (table.span_unit, table.span_start, table.span_stop)])
        # By what is in it, not by its path: a corpus that was moved or copied is the same.
        identities = [_identify(file) for file in plan.files]
        files.append([identities[index] for index in table.span_file[:stop].tolist()])
    return files[0] == files[1] and all(map(np.array_equal, *columns))


def _identify(file: CorpusFile) -> tuple[object, ...]:
    return file.format, file.compression, file.bytes, file.fingerprint
