"""A real Chromium without a window, spoken to over a pipe: no port, no driver, no package beside Python's own."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
# Nothing of the browser's own goes out: there is no network, and no name is resolved.
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)


def find_chromium() -> str | None:
    """The browser's program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Page:
    """A page of the browser, steered by the DevTools protocol.

    Attributes:
        complaints: what was written to the console as warning or error, and exceptions that nobody caught.
        requests: addresses of everything that was asked for.
    """

    def __init__(self, write: int, read: int) -> None:
        self._write, self._read = write, os.fdopen(read, "rb")
        self._number, self._session = 0, None
        self._buffer = b""
        self.complaints: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Network.emulateNetworkConditions", offline=True, latency=0, downloadThroughput=0, uploadThroughput=0)

    def call(self, method: str, **parameters: object) -> Any:
        """Call a method of the protocol and wait for its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def open(self, path: Path) -> None:
        """Open a file and wait until it is loaded."""
        found = self.call("Page.navigate", url=path.as_uri())
        assert "errorText" not in found, found
        while self.evaluate("document.readyState") != "complete":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of an expression of JavaScript, awaited where it is a promise."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until an expression is true, for a minute at most."""
        assert self._comes_true(condition, seconds=60), condition

    def hover(self, selector: str, until: str) -> None:
        """Move the mouse to the middle of an element's first line, again and again, until an expression is true."""
        for _ in range(60):
            # A mouse that does not move says nothing: it may be there already, since before the page listened. And on
            # a busy machine the browser merges moves, or tells the page of an older one later.
            for x, y in ((1, 1), self._find_middle(selector)):
                self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
            if self._comes_true(until, seconds=1):
                return
        raise AssertionError(f"the mouse is at {selector}, and this never came true: {until}")

    def click(self, selector: str) -> None:
        """Click on an element."""
        x, y = self._find_middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, text: str = "") -> None:
        """Press a key, such as `ArrowRight`; `text` is what it writes."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, code=key, text=text)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key, code=key)

    def write_into(self, selector: str, text: str) -> None:
        """Put text in place of what a field has."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.call("Input.insertText", text=text)

    def look(self, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Set the size of the window, and which colours are asked for."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def save_screenshot(self, path: Path, *, is_whole: bool = False) -> None:
        """Write what is seen as a PNG; of the whole page, beyond the window, if asked for."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=is_whole)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _comes_true(self, condition: str, *, seconds: int) -> bool:
        found: bool = self.evaluate(
            f"new Promise((done) => {{ let tries = {100 * seconds}; const look = () => "
            f"({condition}) ? done(true) : --tries ? setTimeout(look, 10) : done(false); look(); }})"
        )
        return found

    def _find_middle(self, selector: str) -> tuple[float, float]:
        script = (
            f"(() => {{ const found = document.querySelector({json.dumps(selector)});"
            "found.scrollIntoView({block: 'center'}); const box = found.getClientRects()[0];"
            "return [box.x + Math.min(box.width, 8) / 2, box.y + box.height / 2]; })()"
        )
        x, y = self.evaluate(script)
        return x, y

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = self._read.read1(1 << 20)
            assert part, "chromium: expected an answer, found the end of the pipe"
            self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, method: str | None, found: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(found["exceptionDetails"].get("exception", found["exceptionDetails"])))
        elif method == "Runtime.consoleAPICalled" and found["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(found["args"]))
        elif method == "Log.entryAdded" and found["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{found['entry']['text']} {found['entry'].get('url', '')}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(found["request"]["url"])


@contextmanager
def open_chromium(program: str) -> Iterator[Page]:
    """A browser with an empty profile and one page, while the block runs."""
    theirs_read, ours_write = os.pipe()
    ours_read, theirs_write = os.pipe()
    # The browser reads commands from descriptor 3 and answers on 4.
    shell = f'exec "$@" 3<&{theirs_read} 4>&{theirs_write}'
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        command = ["bash", "-c", shell, "bash", program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
        process = subprocess.Popen(
            command,
            pass_fds=(theirs_read, theirs_write),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "HOME": profile},
        )
        os.close(theirs_read)
        os.close(theirs_write)
        page = None
        try:
            page = Page(ours_write, ours_read)
            yield page
            page._session = None
            page.call("Browser.close")
        finally:
            process.terminate()
            process.wait()
            os.close(ours_write)
            if page is not None:
                page._read.close()
