"""The connection to Ray, with a Ray that does nothing."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from cluster import connection
from logitstore.errors import OutsideError


@pytest.mark.parametrize(
    ("ending", "raised"),
    [(SystemExit(signal.SIGTERM), OutsideError), (SystemExit(3), SystemExit), (KeyError("x"), KeyError)],
)
def test_process_that_is_asked_to_stop_ends_as_trouble_that_passes(
    monkeypatch: pytest.MonkeyPatch, ending: BaseException, raised: type[BaseException]
) -> None:
    ended: list[str] = []
    ray = SimpleNamespace(is_initialized=bool, init=lambda **_: None, shutdown=lambda: ended.append("shutdown"))
    monkeypatch.setattr(connection, "ray", ray)
    monkeypatch.setattr(connection, "os", SimpleNamespace(environ={}))
    with pytest.raises(raised), connection.connect(None):
        raise ending
    assert ended == ["shutdown"]
