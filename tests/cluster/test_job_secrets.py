"""What a job must not carry, since Ray records it."""

from __future__ import annotations

import pytest

from cluster.job_secrets import check_no_secrets, check_secret_names, find_secrets, is_secret_name
from cluster.settings import ClusterCaptureSettings
from logitstore.errors import ConfigError
from logitstore.settings import build_settings

CAPTURE = {"store": "s3://bucket/store", "corpus": {"files": ["x"]}, "teacher": {"model": "m"}}


@pytest.mark.parametrize(
    "name",
    [
        "AWS_SECRET_ACCESS_KEY",
        "HF_TOKEN",
        "OPENAI_API_KEY",
        "DB_PASSWORD",
        "accountKey",
        "sas_token",
        "AZURE_STORAGE_SAS",
        "GITHUB_PAT",
    ],
)
def test_name_of_a_secret_is_one(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    ["AWS_REGION", "TOKENIZERS_PARALLELISM", "AWS_WEB_IDENTITY_TOKEN_FILE", "RAY_AUTH_TOKEN_PATH", "HF_HOME", ""],
)
def test_name_of_something_else_is_none(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"env_vars": {"HF_TOKEN": "hf_1"}}, ["env_vars.HF_TOKEN"]),
        ({"env_vars": {"HF_TOKEN": "${OTHER}", "KEY_FILE": "k", "A_TOKEN": "/run/secrets/a", "B_TOKEN": ""}}, []),
        ({"pip": {"packages": ["--index-url https://me:pw@host/simple"]}}, ["pip.packages[0]"]),
        ({"working_dir": "https://host/x.zip?X-Amz-Signature=1"}, ["working_dir"]),
        ({"storage_options": {"client_kwargs": {"endpoint_url": "http://h"}, "key": "k"}}, ["storage_options.key"]),
        ({"storage_options": {"token": "google_default"}}, []),
        ({"storage_options": {"password": 1234, "key": 12.5}}, ["storage_options.password", "storage_options.key"]),
        ({"env_vars": {"DB_PASSWORD": 0}}, ["env_vars.DB_PASSWORD"]),
        ({"extra_body": {"token_limit": 128, "stop_token_ids": [1, 2], "use_secret": True}}, []),
        (
            {
                "storage_options": {
                    "client_kwargs": {"headers": {"Authorization": "Bearer b", "Cookie": "c", "Accept": "*"}}
                }
            },
            [f"storage_options.client_kwargs.headers.{name}" for name in ("Authorization", "Cookie")],
        ),
        ({"method": {"top_key": "x", "key": "y"}}, []),
    ],
)
def test_find_secrets_in_plain_values_names_their_keys(values: object, expected: list[str]) -> None:
    assert list(find_secrets(values)) == expected


def test_settings_with_a_secret_are_refused_without_printing_it() -> None:
    values = {**CAPTURE, "storage_options": {"secret": "xyzzy"}}
    settings = build_settings(ClusterCaptureSettings, values, where="test")
    with pytest.raises(ConfigError, match=r"capture\.yaml: .* found storage_options\.secret; .*--secret") as error:
        check_no_secrets(settings, "capture.yaml")
    assert "xyzzy" not in str(error.value)


def test_settings_without_secrets_pass() -> None:
    values = {**CAPTURE, "storage_options": {"client_kwargs": {"region_name": "eu"}}}
    check_no_secrets(build_settings(ClusterCaptureSettings, values, where="test"), "capture.yaml")


def test_secret_given_with_its_value_is_refused_without_printing_it() -> None:
    with pytest.raises(ConfigError, match="HF_TOKEN with more behind it") as error:
        check_secret_names(("AWS_REGION", "HF_TOKEN=xyzzy"))
    assert "xyzzy" not in str(error.value)
    with pytest.raises(ConfigError) as error:
        check_secret_names(("xyzzy-1",))
    assert "xyzzy" not in str(error.value)
