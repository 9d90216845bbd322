"""plan-<n>.json: corpus that a store was given after it was planned.

A store grows without a change to anything in it. An extension is one more create-only object: files, and the units
they are cut into, numbered on from the last unit before it. Whatever makes two stores the same (teacher, method, codec,
…) stays in plan.json, whose fingerprint all commits, shards and manifests go on carrying. Of two captures that extend a
store at once, one creates the next extension; the other sees what was added and adds only what is still missing.
"""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from logitstore.corpus.documents import CorpusFile
from logitstore.corpus.units import UnitTable
from logitstore.errors import IncompatibleStoreError
from logitstore.settings import Settings
from logitstore.shard.layout import FORMAT_VERSION
from logitstore.store.create_only import create_or_read_back
from logitstore.store.files import StoreFiles
from logitstore.store.sealed_json import read_sealed, seal


class PlanExtension(Settings):
    """What plan-<n>.json holds.

    Attributes:
        plan_fingerprint: of the plan that is extended.
        first_file, first_unit: how many files and units the plan had before.
        files: added to the corpus.
        unit_bytes: text of one unit.
        units: columnar unit table of these files alone: units and files are numbered from 0.
        created_by, created_at: for people.
    """

    format_version: int = FORMAT_VERSION
    plan_fingerprint: str
    first_file: int
    first_unit: int
    files: tuple[CorpusFile, ...]
    unit_bytes: int | None = None
    units: dict[str, Any]
    created_by: str = ""
    created_at: str = ""

    def build_unit_table(self) -> UnitTable:
        """The units of these files alone."""
        return UnitTable.from_json(self.units)


def build_extension_path(number: int) -> str:
    return f"plan-{number:06d}.json"


def create_extension(files: StoreFiles, number: int, extension: PlanExtension) -> bool:
    """Store an extension under its number, 2 for the first; False where another one has that number.

    Raises:
        OutsideError: the storage failed.
    """
    return create_or_read_back(files, build_extension_path(number), seal(extension.model_dump_json(indent=1).encode()))


def read_extensions(
    files: StoreFiles, plan_fingerprint: str, num_files: int, num_units: int
) -> tuple[PlanExtension, ...]:
    """The extensions of a plan, in order.

    Args:
        files: the store.
        plan_fingerprint, num_files, num_units: of plan.json.
    Raises:
        IncompatibleStoreError: one is missing, damaged, or extends another plan.
    """
    matches = (re.fullmatch(r"plan-(\d{6,})\.json", file.name) for file in files.list(""))
    numbers = sorted(int(match[1]) for match in matches if match)
    extensions = []
    paths = {build_extension_path(number): number for number in numbers}
    for expected, (path, data) in enumerate(files.read_existing(list(paths)), start=2):
        number = paths[path]
        where = f"{files.url}/{path}"
        extension = _parse(data, where)
        found = (number, extension.plan_fingerprint, extension.first_file, extension.first_unit)
        if found != (expected, plan_fingerprint, num_files, num_units):
            raise IncompatibleStoreError(
                f"{where}: does not continue the plan\n"
                f"  expected: extension {expected} of plan {plan_fingerprint}, from file {num_files}, "
                f"unit {num_units}\n"
                f"  found:    extension {number} of plan {extension.plan_fingerprint}, from file "
                f"{extension.first_file}, unit {extension.first_unit}\n"
                "an object of the store is missing or was changed: restore it from a copy of the store"
            )
        extensions.append(extension)
        num_files += len(extension.files)
        num_units += len(extension.build_unit_table())
    return tuple(extensions)


def _parse(data: bytes, where: str) -> PlanExtension:
    try:
        values, version = read_sealed(data)
        if version == FORMAT_VERSION:
            return PlanExtension.model_validate(values)
    except (ValueError, KeyError, TypeError) as error:
        what = error.errors()[0]["msg"] if isinstance(error, ValidationError) else repr(error)
        raise IncompatibleStoreError(
            f"{where}: expected an extension of a plan, found {what}; restore it from a copy of the store"
        ) from None
    raise IncompatibleStoreError(
        f"{where}: format version differs\n  in the store: {version}\n  this program reads: {FORMAT_VERSION}\n"
        "install a logitstore that reads that version"
    )
