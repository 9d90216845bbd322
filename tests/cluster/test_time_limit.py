"""Processes that end themselves when something takes too long."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cluster.time_limit import limit_seconds

HOLDS_THE_LOCK = "import re\nfrom cluster.time_limit import limit_seconds\n"
HOLDS_THE_LOCK += "def load_for_ever():\n    re.match('(a*)*b', 'a' * 60)\n"


def test_process_that_takes_too_long_ends_and_says_where_it_was() -> None:
    """Also where no other thread of Python's can run: a regular expression holds the lock."""
    code = f"{HOLDS_THE_LOCK}with limit_seconds(0.2):\n    load_for_ever()\n"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == 1
    assert "in load_for_ever" in process.stderr


@pytest.mark.parametrize("seconds", [0.05, None])
def test_limit_ends_with_its_block(seconds: float | None) -> None:
    with limit_seconds(seconds):
        pass
    with pytest.raises(ValueError, match="as it came"), limit_seconds(seconds):
        raise ValueError("as it came")
    code = f"{HOLDS_THE_LOCK}with limit_seconds({seconds}):\n    pass\nimport threading\nthreading.Event().wait(0.3)\n"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
