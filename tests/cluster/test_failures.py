"""What is said about an exception that an actor raised."""

from __future__ import annotations

import traceback

import pytest
from ray.exceptions import RayTaskError

from cluster.failures import ActorFailure, read_failure
from logitstore.errors import CaptureError, ConfigError, LogitStoreError, OutsideError, StoreNotFoundError, TeacherError
from logitstore.storage_errors import storage_errors
from logitstore.teacher.openai_api_budget import SpendingLimitError


def fail_with(cause: Exception) -> ActorFailure:
    """The failure as `ray.get` raises it: an instance of the cause's class too."""
    try:
        raise cause
    except type(cause):
        text = (
            "\x1b[36mray::CaptureActor.capture()\x1b[39m (pid=1, ip=10.0.0.1, actor_id=ab)\n     ^^^^^\n"
            + traceback.format_exc()
        )
    error = RayTaskError("capture", text, cause, proctitle="actor", pid=1, ip="10.0.0.1")
    return read_failure(error.as_instanceof_cause())


def test_foreign_error_keeps_its_class_name_and_its_traceback() -> None:
    failure = fail_with(KeyError("x"))
    assert isinstance(failure.error, CaptureError)
    assert str(failure.error) == failure.summary == "KeyError: 'x'"
    assert "raise cause" in failure.traceback
    assert "\x1b" not in failure.traceback
    assert "^^^" not in failure.traceback
    assert failure.build_record().startswith("KeyError: 'x'\n")


def test_signed_url_that_a_client_was_sent_to_is_neither_logged_nor_stored() -> None:
    failure = fail_with(OSError("503, url='https://cdn/shard?X-Amz-Signature=abc'"))
    assert failure.summary == str(failure.error) == "OSError: 503, url='https://cdn/shard?***"
    assert "abc'" not in failure.build_record()
    assert failure.host == "10.0.0.1"
    with pytest.raises(OutsideError, match=r"cdn/shard\?\*\*\*; run the command again"), storage_errors("corpus"):
        raise OSError("503, url='https://cdn/shard?X-Amz-Signature=abc'")


@pytest.mark.parametrize("kind", [TeacherError, OutsideError, ConfigError])
def test_error_of_ours_comes_back_as_it_was_raised(kind: type[LogitStoreError]) -> None:
    failure = fail_with(kind("here: expected one, found two; fix it"))
    assert type(failure.error) is kind
    assert str(failure.error) == "here: expected one, found two; fix it"
    assert failure.build_load_error("teacher") is failure.error


def test_quarantine_record_of_a_long_error_is_bounded_and_keeps_both_ends() -> None:
    record = fail_with(RuntimeError("a" * 10_000 + "end")).build_record()
    assert len(record) == 4000
    assert record.startswith("RuntimeError: aaa")
    assert record.rstrip().endswith("end")


def test_foreign_error_while_loading_becomes_a_teacher_error_with_the_last_lines() -> None:
    error = fail_with(AttributeError("no such layer")).build_load_error("big-model")
    assert isinstance(error, TeacherError)
    assert "'big-model': expected it to load on 10.0.0.1, found AttributeError: no such layer" in str(error)
    assert "raise cause" in str(error)


@pytest.mark.parametrize("kind", [ConfigError, StoreNotFoundError])
def test_store_that_an_actor_does_not_see_is_explained_by_its_machine(kind: type[LogitStoreError]) -> None:
    error = fail_with(kind("store: expected a store, found none")).build_settings_error()
    assert type(error) is kind
    assert "store: expected a store, found none" in str(error)
    assert "the actor on 10.0.0.1: the actor's machine does not see" in str(error)


def test_failure_of_a_unit_is_no_settings_error() -> None:
    assert fail_with(TeacherError("nan")).build_settings_error() is None
    assert fail_with(OutsideError("503")).build_settings_error() is None


def test_end_of_the_money_is_told_as_it_is() -> None:
    error = fail_with(SpendingLimitError("max_spend: raise it")).build_settings_error()
    assert type(error) is SpendingLimitError
    assert str(error) == "max_spend: raise it"
