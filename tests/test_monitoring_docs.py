"""What docs/monitoring.md says: its settings load, its queries ask for what there is, its tables leave nothing out."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from checkout import ROOT
from promql_names import find_metrics, find_mistakes
from typer.testing import CliRunner

from cluster.metrics import METRICS
from cluster.progress import _FIRST_LINES_SECONDS, _SECONDS_BETWEEN_FIRST_LINES, _SECONDS_BETWEEN_LINES
from cluster.rates import WINDOW_SECONDS, WINDOW_UNITS
from cluster.settings import ClusterCaptureSettings
from logitstore.settings import build_settings
from tools.cli import app
from tools.store_status import CaptureStatus, StoreStatus

PAGE = (ROOT / "docs/monitoring.md").read_text(encoding="utf-8")
OF_NO_INTEREST_HERE = {"store", "manifest", "units_not_in_manifest", "newest_commit_age_seconds"}
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)


def read_block(text: str) -> Any:
    """The one YAML block that a text stands in."""
    [block] = [block for block in BLOCKS if text in block]
    return yaml.safe_load(block)


def test_setting_of_the_page_is_one_and_its_default_is_what_the_page_says() -> None:
    values = {"store": "store", "corpus": {"files": ["a.jsonl"]}, "teacher": {"model": "m"}}
    changed = read_block("heartbeat_seconds")
    assert build_settings(ClusterCaptureSettings, {**values, **changed}, where="page").heartbeat_seconds == 60
    off = build_settings(ClusterCaptureSettings, {**values, "heartbeat_seconds": None}, where="page")
    assert off.heartbeat_seconds is None
    seconds = build_settings(ClusterCaptureSettings, values, where="page").heartbeat_seconds
    assert f"says it again every {seconds:.0f} seconds" in PAGE
    assert f"{24 * 3600 / (seconds or 1):,.0f} a day" in PAGE


def test_commands_of_the_page_exist_and_have_their_options() -> None:
    lines = re.findall(r"^    logitstore (\w+)(.*)$", PAGE, re.MULTILINE)
    assert len(lines) == 3
    for verb, arguments in lines:
        result = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
        assert result.exit_code == 0
        assert set(re.findall(r"--[a-z-]+", arguments)) <= set(re.findall(r"--[a-z-]+", result.output))


def test_numbers_of_the_page_are_those_of_the_code() -> None:
    assert (_SECONDS_BETWEEN_FIRST_LINES, _SECONDS_BETWEEN_LINES, WINDOW_SECONDS, WINDOW_UNITS) == (15, 60, 120, 30)
    assert "a line every 15 seconds, later every minute" in PAGE
    assert _FIRST_LINES_SECONDS > _SECONDS_BETWEEN_LINES
    assert "those of the last two minutes, or of the last thirty units" in PAGE


def test_table_of_metrics_is_the_list_in_the_code() -> None:
    rows = re.findall(r"^\| `(ray_\w+)` \| (\w+) \| (.*?) \| (.*?) \|$", PAGE, re.MULTILINE)
    expected = [
        (
            metric.exported_names[0].removesuffix("_bucket" if metric.kind == "histogram" else ""),
            metric.kind,
            ", ".join(f"`{label}`" for label in metric.labels),
            metric.description,
        )
        for metric in METRICS
    ]
    assert rows == expected


def test_alerts_of_the_page_name_only_what_there_is() -> None:
    [group] = read_block("LogitstoreStalled")["groups"]
    assert len(group["rules"]) == 4
    for rule in group["rules"]:
        assert find_metrics(rule["expr"])
        assert find_mistakes(rule["expr"]) == []
        assert set(re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"])) == {"store"}


def test_scrape_configuration_names_the_rules_of_the_page() -> None:
    assert read_block("scrape_configs")["rule_files"] == [
        re.search(r"# (\S+)", block)[1]
        for block in BLOCKS
        if "alert:" in block  # type: ignore[index]
    ]


@pytest.mark.parametrize("name", sorted(StoreStatus.model_fields.keys() - OF_NO_INTEREST_HERE))
def test_page_names_the_keys_of_the_json(name: str) -> None:
    assert f"`{name}`" in PAGE


def test_states_of_a_capture_on_the_page_are_all_that_there_are() -> None:
    for state in ("at work", "silent", "ended"):
        assert f"`{state}`" in PAGE
        assert state in str(CaptureStatus.model_fields["state"].annotation)
