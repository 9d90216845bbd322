"""What docs/actors.md shows are settings of a capture."""

from __future__ import annotations

import re

import yaml
from checkout import ROOT

from cluster.settings import ActorGroupSettings, ActorSettings, ClusterCaptureSettings
from logitstore.settings import build_settings

PAGE = (ROOT / "docs" / "actors.md").read_text(encoding="utf-8")


def test_settings_on_the_page_are_valid_and_mean_what_it_says() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3
    captures = []
    for block in blocks:
        values = {"store": "memory://s", "corpus": {"files": ["a"]}, "teacher": {"model": "m"}} | yaml.safe_load(block)
        captures.append(build_settings(ClusterCaptureSettings, values, where="docs/actors.md"))
    plain, groups, parallel = captures
    assert plain.actors.max == 32
    assert [(group.cpus, group.count) for group in groups.actors.list_groups()] == [(8, 16), (8, None)]
    assert [groups.build_teacher(group).batch_tokens for group in groups.actors.list_groups()] == [65536, 8192]
    assert parallel.teacher.num_gpus == 16


def test_every_setting_of_actors_is_on_the_page() -> None:
    names = {*ActorSettings.model_fields, *ActorGroupSettings.model_fields}
    assert {name for name in names if not re.search(rf"\b{name}\b", PAGE)} == set()
