"""What docs/report.md says: its commands exist, its numbers are those of the code."""

from __future__ import annotations

import re

from checkout import ROOT
from typer.testing import CliRunner

from tools.cli import app
from tools.store_report.page import _COMPARED_RECORDS, _TITLES, ReportRequest
from tools.store_report.sample import MAX_ROW_GROUPS
from tools.store_report.voices import LEAST_PROBABILITY

PAGE = (ROOT / "docs/report.md").read_text(encoding="utf-8")


def test_commands_of_the_page_have_their_options() -> None:
    [commands] = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
    usage = CliRunner().invoke(app, ["report", "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"}).output
    for line in commands.splitlines():
        assert line.startswith("logitstore report ")
        assert line in usage
    assert set(re.findall(r"--[a-z][a-z-]*", PAGE)) <= set(re.findall(r"--[a-z][a-z-]*", usage))


def test_numbers_of_the_page_are_those_of_the_code() -> None:
    request = ReportRequest(store="store")
    assert f"no more than {MAX_ROW_GROUPS} are" in PAGE
    assert f"`--records` ({request.records})" in PAGE
    assert f"(`--top`, {request.top}, of at least {LEAST_PROBABILITY:.0%})" in PAGE
    assert f"over up to {_COMPARED_RECORDS:,} records" in PAGE


def test_page_names_every_part_in_order() -> None:
    assert re.findall(r"^\| ([A-Z][a-z ]+) \|", PAGE, re.MULTILINE) == list(_TITLES.values())
