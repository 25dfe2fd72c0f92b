"""A tab of a headless Chromium, for tests of pages. Tests that use it are skipped where there is none."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Browser:
    """A tab of a headless Chromium, driven over a pipe (Chrome DevTools Protocol, messages that end in a null)."""

    def __init__(self, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()

        def numbered() -> None:  # the browser reads from descriptor 3 and writes to 4
            fds = os.dup(to_browser), os.dup(from_browser)
            os.dup2(fds[0], 3)
            os.dup2(fds[1], 4)

        flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--window-size=600,500")
        self.process = subprocess.Popen(
            ["chromium", *flags, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=numbered,
            close_fds=False,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._count, self._rest, self._session = 0, b"", None
        target = next(one for one in self.call("Target.getTargets")["targetInfos"] if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._rest:
                if not (piece := os.read(self._in, 1 << 16)):
                    raise RuntimeError("the browser ended")
                self._rest += piece
            text, _, self._rest = self._rest.partition(b"\0")
            answer = json.loads(text)
            if answer.get("id") == self._count:
                return answer.get("result", answer)

    def value(self, script: str) -> Any:
        return self.call("Runtime.evaluate", expression=script, returnByValue=True).get("result", {}).get("value")

    def open(self, page: Path, *, width: int, height: int = 800) -> None:
        """Open a page in a window of this many pixels, and wait until its script has run."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=page.as_uri())
        self.wait("document.readyState + location.href", lambda found: found == "complete" + page.as_uri())

    def picture(self) -> bytes:
        """A PNG of the whole page."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def wait(self, script: str, until: Callable[[Any], bool]) -> Any:
        end = time.monotonic() + 20
        while not until(found := self.value(script)):
            assert time.monotonic() < end, (script, found)
            time.sleep(0.05)
        return found
