"""Which trouble with loading a teacher may pass, by the errors that the hub's client raises."""

from __future__ import annotations

import itertools

import httpx2
import pytest
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

from logitstore.errors import ConfigError, OutsideError
from logitstore.teacher import tokenizer
from logitstore.teacher.loading import load_teacher
from logitstore.teacher.passing_trouble import find_passing_trouble
from logitstore.teacher.protocol import TeacherSettings, TopKMethod


def chain(*errors: Exception) -> Exception:
    """The last of these, each raised from the one before, as transformers and the hub's client do."""
    for before, after in itertools.pairwise(errors):
        after.__cause__ = before
    return errors[-1]


def build_refusal(status: int) -> HfHubHTTPError:
    request = httpx2.Request("HEAD", "http://127.0.0.1/config.json")
    return HfHubHTTPError("refused", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("first", "is_passing"),
    [
        (httpx2.ConnectError("refused"), True),
        (httpx2.ReadTimeout("slow"), True),
        (httpx2.RemoteProtocolError("half an answer"), True),
        (ConnectionResetError("reset"), True),
        (TimeoutError("no answer"), True),
        (build_refusal(503), True),
        (build_refusal(429), True),
        (build_refusal(404), False),
        (build_refusal(401), False),
        (OfflineModeIsEnabled("told not to"), False),
        (FileNotFoundError("no such file"), False),
        (PermissionError("not yours"), False),
        (ValueError("no such architecture"), False),
    ],
)
def test_trouble_that_passes_is_told_by_the_errors_behind(first: Exception, is_passing: bool) -> None:
    error = chain(first, LocalEntryNotFoundError("not in the cache"), OSError("cannot load"), ConfigError("tokenizer"))
    assert find_passing_trouble(error) is (first if is_passing else None)


def test_error_that_was_caught_while_another_was_handled_counts_unless_it_was_put_aside() -> None:
    def fail(*, puts_aside: bool) -> BaseException:
        try:
            try:
                raise ConnectionError("down")
            except ConnectionError:
                if puts_aside:
                    raise ValueError("something else") from None
                raise ValueError("because of it")  # noqa: B904  # as libraries do
        except ValueError as error:
            return error

    assert isinstance(find_passing_trouble(fail(puts_aside=False)), ConnectionError)
    assert find_passing_trouble(fail(puts_aside=True)) is None


@pytest.mark.parametrize(("first", "kind"), [(httpx2.ConnectError("refused"), OutsideError), (OSError(), ConfigError)])
def test_teacher_whose_hub_is_down_is_worth_another_try_and_one_that_is_not_there_is_none(
    monkeypatch: pytest.MonkeyPatch, first: Exception, kind: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("cannot load") from first

    monkeypatch.setattr(tokenizer.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(kind, match=r"'name/of-the-hub': .*(ConnectError: refused; run|cannot be loaded)") as caught:
        load_teacher(TeacherSettings(model="name/of-the-hub", device="cpu"), TopKMethod(k=2))
    assert type(caught.value) is kind
