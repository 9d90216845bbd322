"""docs/commands.md says what the commands say, and a shell is told of them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from checkout import ROOT

from tools.reference import build_reference


def test_page_of_commands_is_what_the_commands_say() -> None:
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert page == build_reference(), "write it again: python -m tools.reference > docs/commands.md"


def test_page_has_every_command_and_option_by_name() -> None:
    page = build_reference()
    for part in ("## logitstore capture\n", "## logitstore convert export\n", "## logitstore benchmark stream\n"):
        assert part in page
    for option in ("`--retry-quarantined`", "`--max-kl` NUMBER", "`--top` N", "`-q`"):
        assert option in page
    assert "\b" not in page


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "expected"),
    [("logitstore ins", ["inspect"]), ("logitstore inspect --min", ["--min-entropy", "--min-surprise"])],
)
def test_shell_completes_verbs_and_options(words: str, expected: list[str]) -> None:
    asked = {"_LOGITSTORE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", "from tools.cli import main; main()"],
        cwd=ROOT,
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == expected
