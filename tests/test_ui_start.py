"""`vlft ui` starts: the address counts before Gradio is imported, requests wait for it, and an error ends it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from importlib.util import find_spec

import pytest

from vlft.ui.assets import Assets
from vlft.ui.guard import Guard, Keys
from vlft.ui.jobs import Jobs
from vlft.ui.later import Later

needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="pip install 'vlft[ui]'")


async def _page(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"the page"})


async def _ask(app, path="/", headers=()):
    sent = []

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": [*headers]}
    await app(scope, None, send)
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


def test_a_request_waits_until_the_application_is_loaded():
    gate, lived = threading.Event(), []

    @contextlib.asynccontextmanager
    async def life(app):
        lived.append("began")
        yield
        lived.append("ended")

    def load():
        gate.wait(20)
        return _page

    async def main():
        later = Later(load, life)
        later.begin(lambda: None)
        request = asyncio.create_task(_ask(later))
        await asyncio.sleep(0.05)
        assert not request.done()
        gate.set()
        assert (await request)[2] == b"the page"
        await later.end()

    asyncio.run(main())
    assert lived == ["began", "ended"]


def test_an_application_that_cannot_be_loaded_ends_the_server():
    def load():
        raise ImportError("no module")

    async def main():
        later, stopped = Later(load, None), asyncio.Event()
        later.begin(stopped.set)
        await asyncio.wait_for(stopped.wait(), 20)
        assert (await _ask(later))[0] == 503
        with pytest.raises(ImportError, match="no module"):
            await later.end()

    asyncio.run(main())


def test_files_whose_names_hold_a_digest_are_sent_without_the_page_and_kept(tmp_path):
    (tmp_path / "index-DphvyggB.js").write_text("let one = 1")
    (tmp_path / "page.html").write_text("no asset")
    keys = Keys(token="t", once="o", cookie="c")
    guard = Guard(Assets(_page, tmp_path), port=1, keys=keys, door="", closed="closed")
    headers = ((b"host", b"127.0.0.1:1"), (b"cookie", b"vlft_ui_1=c"))
    status, sent, body = asyncio.run(_ask(guard, "/assets/index-DphvyggB.js", headers))
    assert (status, body) == (200, b"let one = 1")
    assert b"immutable" in sent[b"cache-control"]
    assert sent[b"content-type"].startswith(b"text/javascript")
    for path in ("/", "/assets/page.html", "/assets/../index-DphvyggB.js", "/assets/index-2.js", "/theme.css"):
        status, sent, body = asyncio.run(_ask(guard, path, headers))
        assert (body, sent[b"cache-control"]) == (b"the page", b"no-store"), path
    assert asyncio.run(_ask(guard, "/assets/index-DphvyggB.js", headers[:1]))[0] == 403
    assert Assets(_page, tmp_path / "missing").files == {}


def test_a_job_that_has_just_been_started_runs(tmp_path):
    """The keeper creates its lock file before it holds the lock."""
    jobs = Jobs(tmp_path)
    folder = tmp_path / jobs.key("train", ["run"])
    folder.mkdir()
    (folder / "job.json").write_text(
        json.dumps({"words": ["train"], "argv": [], "document": False, "time": time.time()})
    )
    (folder / ".lock").touch()
    assert jobs.find("train", ["run"]).word == "running"
    (folder / "process.json").write_text('{"pid": 1, "time": 1.0}')  # it is written under the lock
    assert jobs.find("train", ["run"]).word == "lost"


@needs_gradio
@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_address_counts_before_the_page_is_loaded_and_ctrl_c_ends_it(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "vlft", "ui", "--no_browser", "--folder", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "VLFT_UI_FOLDER": str(tmp_path / "jobs")},
    )  # fmt: skip
    try:
        address = process.stdout.readline().split()[-1]
        opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        assert "loading" in opener.open(address, timeout=60).read().decode()
        config = json.load(opener.open(address.partition("?")[0] + "config", timeout=120))
        assert config["dependencies"]
        assert {one["api_visibility"] for one in config["dependencies"]} == {"private"}
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert "Traceback" not in process.stderr.read()
    finally:
        process.kill()
        process.wait()
