"""docs/troubleshooting.md quotes what the program says."""

from __future__ import annotations

import re

import pytest
from checkout import PACKAGES, ROOT

PAGE = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
SYMPTOMS = [
    quoted[1]
    for line in PAGE.splitlines()
    if (quoted := re.match(r"\| `([^`]+)` \|", line)) and not quoted[1].startswith("train/")
]


@pytest.fixture(scope="module")
def source() -> str:
    """All of the program's text, strings that go over several lines joined."""
    texts = [path.read_text(encoding="utf-8") for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    return re.sub(r'"\s*\n\s*f?"', "", "\n".join(texts))


@pytest.mark.parametrize("symptom", SYMPTOMS)
def test_symptom_is_something_that_the_program_says(symptom: str, source: str) -> None:
    assert symptom in source


def test_page_has_symptoms_of_every_part() -> None:
    assert len(SYMPTOMS) > 12
