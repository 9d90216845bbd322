"""The files for Ray's cluster launcher: Ray's own schema, the clouds' own schemas, and what the files are made for."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.cluster.deploy.deployment_files import (
    LAUNCHER_FILES,
    Document,
    find_launcher_mistakes,
    find_machine_mistakes,
    read_documents,
)


def read_launcher(name: str) -> Document:
    [config] = read_documents(name)
    return config


def read_workers(name: str) -> Document:
    config = read_launcher(name)
    [workers] = [kind for key, kind in config["available_node_types"].items() if key != config["head_node_type"]]
    return workers


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_launcher_file_fits_the_schema_of_ray(name: str) -> None:
    assert find_launcher_mistakes(read_launcher(name)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [("cluster_name", None), ("idle_timeout_minute", 3), ("max_workers", "8"), ("docker", {"images": "logitstore"})],
)
def test_launcher_schema_with_a_mistake_refuses_it(key: str, value: Any) -> None:
    config = read_launcher("launcher-aws.yaml")
    changed = {name: one for name, one in config.items() if name != key} if value is None else {**config, key: value}
    assert find_launcher_mistakes(changed) != []


def find_instance_mistakes(node_config: Document) -> list[str]:
    """What EC2 would refuse a request for a machine for, by the description of its interface that botocore ships."""
    from botocore.session import get_session
    from botocore.validate import ParamValidator

    shape = get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    # The launcher adds how many.
    report = ParamValidator().validate({**node_config, "MinCount": 1, "MaxCount": 1}, shape)
    return report.generate_report().splitlines()


@pytest.mark.slow
def test_machines_of_the_aws_file_fit_the_interface_of_ec2() -> None:
    kinds = read_launcher("launcher-aws.yaml")["available_node_types"].values()
    assert [mistake for kind in kinds for mistake in find_instance_mistakes(kind["node_config"])] == []
    misspelt = {**read_workers("launcher-aws.yaml")["node_config"], "InstanceMarketOption": {"MarketType": "spot"}}
    assert len(find_instance_mistakes(misspelt)) == 1


def test_machines_of_the_gcp_file_fit_the_interface_of_compute_engine() -> None:
    kinds = read_launcher("launcher-gcp.yaml")["available_node_types"].values()
    assert [mistake for kind in kinds for mistake in find_machine_mistakes(kind["node_config"])] == []
    misspelt = copy.deepcopy(read_workers("launcher-gcp.yaml")["node_config"])
    misspelt["scheduling"]["provisioningModel"] = "PREEMPTIBLE"
    assert len(find_machine_mistakes(misspelt)) == 1


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_launched_workers_come_and_go_and_the_head_takes_no_actor(name: str) -> None:
    config, workers = read_launcher(name), read_workers(name)
    head = config["available_node_types"][config["head_node_type"]]
    assert head["resources"]["CPU"] == 0
    assert workers["min_workers"] == 0 < workers["max_workers"] <= config["max_workers"]
    assert config["upscaling_speed"] >= workers["max_workers"]
    assert config["provider"].get("cache_stopped_nodes") is not True


def test_launched_workers_are_spot_machines_that_may_reach_the_storage() -> None:
    amazon = read_workers("launcher-aws.yaml")["node_config"]
    google = read_workers("launcher-gcp.yaml")["node_config"]
    assert amazon["InstanceMarketOptions"]["MarketType"] == "spot"
    assert google["scheduling"]["provisioningModel"] == "SPOT"
    assert "Name" in amazon["IamInstanceProfile"]
    assert len(google["serviceAccounts"]) == 1


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_launched_cluster_asks_for_the_token_of_who_launches_it(name: str) -> None:
    config = read_launcher(name)
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert config["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    # The dashboard takes jobs: it is for the head alone, and for who comes by ssh.
    assert not any("--dashboard-host" in command for command in config["head_start_ray_commands"])
