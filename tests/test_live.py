"""The page of a run that is not over, in a real browser: it reloads itself, keeps its place, and stops with the run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
from browser import Browser
from runs import record_of

from vlft.report import write_report

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")

FASTER = 100  # times the speed of the clock that a page sees


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
