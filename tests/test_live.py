"""The page of a run that is not over, in a real browser: it reloads itself, keeps its place, and stops with the run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import record_of

from vlft.report import write_report

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")

FASTER = 100  # times the speed of the clock that a page sees


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

    def wait(self, script: str, until: Callable[[Any], bool]) -> Any:
        end = time.monotonic() + 20
        while not until(found := self.value(script)):
            assert time.monotonic() < end, (script, found)
            time.sleep(0.05)
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    made = Browser(tmp_path_factory.mktemp("browser"))
    quick = f"const now = Date.now, start = now(); Date.now = () => start + (now() - start) * {FASTER};"
    made.call("Page.addScriptToEvaluateOnNewDocument", source=quick)
    yield made
    made.process.kill()
    made.process.wait()


def kept(browser: Browser) -> bool:
    """The scroll position and the open part are as they were, give or take a line of the text above them."""
    return browser.value("Math.abs(scrollY - 300) < 60 && document.querySelector('details').open")


def test_a_page_follows_its_run(browser, tmp_path):
    run = record_of(tmp_path / "run", steps=2, of=9)
    page = write_report(run)
    browser.call("Page.navigate", url=page.as_uri())
    progress = "document.body.innerText.match(/step \\d of 9|finished after 9 steps/)?.[0]"
    browser.wait(progress, lambda text: text == "step 2 of 9")
    browser.value("document.querySelector('details').open = true; scrollTo(0, 300)")
    record_of(run, steps=3, of=9)
    write_report(run)
    browser.wait(progress, lambda text: text == "step 3 of 9")
    assert kept(browser)
    record_of(run, steps=9, of=9, finished=True)
    write_report(run)
    browser.wait(progress, lambda text: text == "finished after 9 steps")
    assert kept(browser)
    assert browser.value("document.getElementById('live')") is None


def test_a_page_that_is_written_no_more_says_so(browser, tmp_path):
    run = record_of(tmp_path / "run", steps=2, of=9)
    page = write_report(run)
    html = page.read_text()
    page.write_text(html.replace('data-patience="300"', 'data-patience="20"'))
    browser.call("Page.navigate", url=page.as_uri())
    text = browser.wait("document.getElementById('live')?.innerText", lambda text: text and "has not been" in text)
    assert text.startswith("This page has not been written for ")
    assert browser.value("document.getElementById('live').className") == "warn"
