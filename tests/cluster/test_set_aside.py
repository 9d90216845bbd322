"""Units that are set aside while the storage of their record fails."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_up_cluster import build_made_up_cluster, raised_in_actor

from cluster import unit_ends
from cluster.driver import run_capture
from logitstore.errors import OutsideError
from logitstore.store.commit import COMMITS, QuarantinedUnit, list_units, quarantine_unit
from logitstore.store.files import StoreFiles

NUM_UNITS = 12


@pytest.mark.parametrize(("num_failures", "is_outlived"), [(3, True), (1000, False)])
def test_unit_that_storage_cannot_set_aside_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_failures: int, is_outlived: bool
) -> None:
    made_up = build_made_up_cluster(tmp_path, monkeypatch, NUM_UNITS)
    failed: list[int] = []

    def quarantine(files: StoreFiles, entry: QuarantinedUnit) -> None:
        if len(failed) < num_failures:
            failed.append(entry.unit)
            raise OutsideError("bucket: 503")
        quarantine_unit(files, entry)

    monkeypatch.setattr(unit_ends, "quarantine_unit", quarantine)
    made_up.answer_capture = lambda actor, unit: raised_in_actor(KeyError("x")) if unit == 7 else None
    if is_outlived:
        assert run_capture(made_up.settings, quiet=True).quarantined_units == (7,)
    else:
        with pytest.raises(OutsideError, match="bucket: 503"):
            run_capture(made_up.settings, quiet=True)
    assert len(list_units(StoreFiles(made_up.settings.store), COMMITS)) == NUM_UNITS - 1
    assert set(failed) == {7}
