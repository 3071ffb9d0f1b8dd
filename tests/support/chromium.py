"""A page in headless Chromium, through the DevTools protocol on a pipe: no driver, no network."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

FOUND = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--remote-debugging-pipe",
)


class Browser:
    """One tab; what the page logged and asked for is kept.

    Attributes:
        logged: console messages and the browser's own complaints.
        requested: every address that the page asked for.
    """

    def __init__(self, width: int, *, dark: bool = False) -> None:
        """Open the tab, as wide as a screen of that many CSS pixels."""
        self.logged: list[str] = []
        self.requested: list[str] = []
        self._numbers = itertools.count(1)
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_read, self._to = os.pipe()
        self._from, to_write = os.pipe()
        # The browser reads commands from descriptor 3 and answers on 4.
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        profile = f"--user-data-dir={self._profile.name}"
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(FOUND), *FLAGS, profile],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._waiting = b""
        self._session: dict[str, str] = {}
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.send("Emulation.setDeviceMetricsOverride", **screen)

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._session = {}
            self.send("Browser.close")  # its own children first, which write into the profile
            self._process.wait(20)
        except (RuntimeError, OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)
        self._profile.cleanup()

    def open(self, page: Path) -> None:
        """Load a file and wait until everything in it is there."""
        self.send("Page.navigate", url=page.as_uri())
        self._await(lambda message: message.get("method") == "Page.loadEventFired")

    def evaluate(self, expression: str) -> Any:
        """What a JavaScript expression gives in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        number = next(self._numbers)
        body = {"id": number, "method": method, "params": params, **self._session}
        os.write(self._to, json.dumps(body).encode() + b"\0")
        answer = self._await(lambda message: message.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        found: dict[str, Any] = answer["result"]
        return found

    def _await(self, wanted: Any) -> dict[str, Any]:
        while True:
            message = self._read()
            self._keep(message)
            if wanted(message):
                return message

    def _keep(self, message: dict[str, Any]) -> None:
        params = message.get("params", {})
        if message.get("method") in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            self.logged.append(json.dumps(params))
        if message.get("method") == "Log.entryAdded":
            self.logged.append(params["entry"]["text"])
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._waiting:
            data = os.read(self._from, 1 << 20)
            if not data:
                raise RuntimeError("Chromium ended")
            self._waiting += data
        line, _, self._waiting = self._waiting.partition(b"\0")
        parsed: dict[str, Any] = json.loads(line)
        return parsed
