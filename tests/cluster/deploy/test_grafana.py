"""The dashboard: it asks for what a capture tells, for all of it, and for nothing else."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from promql_names import EXPORTED, FOREIGN_LABELS, find_metrics, find_mistakes

from tests.cluster.deploy.deployment_files import DEPLOY

DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
QUERIES = [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


@pytest.mark.parametrize(("title", "query"), QUERIES)
def test_query_names_only_metrics_and_labels_that_exist(title: str, query: str) -> None:
    assert find_metrics(query)
    assert find_mistakes(query) == []


@pytest.mark.parametrize(
    ("query", "mistakes"),
    [
        ("sum by (store) (rate(ray_logitstore_positions_total[5m]))", []),
        ("ray_logitstore_positions", ["no metric ray_logitstore_positions"]),
        ('sum(ray_logitstore_units_total{reason="empty"})', ["no label reason"]),
        ("sum by (reason, unit) (ray_logitstore_dead_letters_total)", ["no label unit"]),
    ],
)
def test_mistake_in_a_query_would_be_found(query: str, mistakes: list[str]) -> None:
    assert find_mistakes(query) == mistakes


def test_dashboard_shows_every_metric() -> None:
    shown = {EXPORTED[name].name for _, query in QUERIES for name in find_metrics(query)}
    assert shown == {metric.name for metric in EXPORTED.values()}


def test_every_query_is_of_the_stores_and_the_source_that_are_chosen() -> None:
    for title, query in QUERIES:
        assert len(find_metrics(query)) <= query.count('{store=~"$store"}'), title
    sources = [panel["datasource"] for panel in PANELS]
    sources += [target["datasource"] for panel in PANELS for target in panel["targets"]]
    [source, store] = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], store["name"]) == ("datasource", "datasource", "store")
    assert find_mistakes(store["query"]["query"]) == []
    assert all(one == {"type": "prometheus", "uid": "${datasource}"} for one in [*sources, store["datasource"]])


def test_legends_name_labels_that_their_queries_keep() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert f"by ({label})" in target["expr"]
                assert label in {"store", "reason", *FOREIGN_LABELS}


def test_panels_have_numbers_and_words_of_their_own_and_do_not_lie_on_one_another() -> None:
    assert len({panel["id"] for panel in PANELS}) == len({panel["title"] for panel in PANELS}) == len(PANELS)
    assert all(panel["description"].endswith(".") for panel in PANELS)
    places = set()
    for panel in PANELS:
        grid = panel["gridPos"]
        assert 0 <= grid["x"] <= grid["x"] + grid["w"] <= 24
        taken = {(grid["x"] + dx, grid["y"] + dy) for dx in range(grid["w"]) for dy in range(grid["h"])}
        assert not places & taken, panel["title"]
        places |= taken
