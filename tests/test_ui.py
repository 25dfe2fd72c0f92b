"""`vlft ui` without a browser: who may reach it, command lines, jobs, run folders, and what the screens show."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from build import row, write_image, write_json

from vlft.cli.main import main
from vlft.errors import ConfigError, VlftError
from vlft.files import Lock
from vlft.ui import commands
from vlft.ui.commands import Form
from vlft.ui.desk import Choices, Desk
from vlft.ui.folders import find
from vlft.ui.guard import Guard, Keys
from vlft.ui.jobs import Jobs, stop
from vlft.ui.runs import Curves, Runs, answered, holder
from vlft.ui.screens import check, data, look, train
from vlft.ui.thumbs import thumbs

PORT = 7865
HOST = f"127.0.0.1:{PORT}"
KEYS = Keys(token="the-token", once="once", cookie="the-cookie")
COOKIE = f"vlft_ui_{PORT}=the-cookie"


# ---- who may reach the page


async def _inside(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"inside"})


def guarded() -> Guard:
    return Guard(_inside, port=PORT, keys=KEYS, door="door", closed="closed")


def asked(path="/", *, query="", method="GET", kind="http", guard=None, **headers):
    """Ask the guarded application; returns the status, the headers and the text."""
    guard = guard or guarded()
    lines = {"host": HOST, **{name.replace("_", "-"): value for name, value in headers.items()}}
    pairs = [(name.encode(), value.encode()) for name, value in lines.items() if value is not None]
    scope = {"type": kind, "method": method, "path": path, "query_string": query.encode(), "headers": pairs}
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b""}

    asyncio.run(guard(scope, receive, send))
    if sent[0]["type"] == "websocket.close":
        return 0, {}, ""
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"].decode()


def test_the_token_opens_the_door_once_and_the_cookie_the_page():
    status, headers, text = asked(query="token=the-token")
    assert (status, text) == (200, "door")
    cookie = headers[b"set-cookie"].decode()
    assert cookie.startswith(COOKIE)
    assert {"HttpOnly", "SameSite=Strict"} <= {part.strip() for part in cookie.split(";")}
    assert "the-token" not in cookie
    status, headers, text = asked(cookie=COOKIE)
    assert (status, text) == (200, "inside")
    assert b"default-src 'self'" in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    ("path", "given"),
    [
        ("/", {}),
        ("/", {"query": "token=wrong"}),
        ("/", {"query": "token="}),
        ("/", {"query": "token=the-token&token=the-token"}),
        ("/", {"query": "token=the-token", "method": "POST"}),
        ("/config", {"query": "token=the-token"}),
        ("/config", {}),
        ("/gradio_api/upload", {"method": "POST"}),
        ("/gradio_api/queue/join", {"method": "POST", "cookie": "vlft_ui_7865=wrong"}),
        ("/job/check-data-0123456789abcdef/check", {}),
        ("/", {"cookie": "vlft_ui_7866=the-cookie"}),
        ("/", {"cookie": "vlft_ui_7865=ünïcode"}),
        ("/", {"cookie": COOKIE, "host": "evil.example"}),
        ("/", {"cookie": COOKIE, "host": f"evil.example:{PORT}"}),
        ("/", {"cookie": COOKIE, "host": "127.0.0.1:80"}),
        ("/", {"cookie": COOKIE, "host": None}),
        ("/", {"query": "token=the-token", "host": "evil.example"}),
        ("/gradio_api/queue/join", {"method": "POST", "cookie": COOKIE, "origin": "http://evil.example"}),
        ("/gradio_api/queue/join", {"method": "POST", "cookie": COOKIE, "origin": "null"}),
        ("/gradio_api/queue/join", {"method": "POST", "cookie": COOKIE, "origin": "http://127.0.0.1:9000"}),
        ("/gradio_api/proxy=http://169.254.169.254/", {"cookie": COOKIE}),
        ("/gradio_api/file=http://169.254.169.254/", {"cookie": COOKIE}),
    ],
)
def test_nothing_else_is_let_in(path, given):
    status, headers, text = asked(path, **given)
    assert status in (403, 421)
    assert text == "closed"
    assert b"set-cookie" not in headers


def test_the_manifest_which_browsers_fetch_without_the_cookie_is_empty():
    status, headers, text = asked("/manifest.json")
    assert (status, text, headers[b"content-type"]) == (200, "{}", b"application/manifest+json")
    assert asked("/manifest.json", host="evil.example")[0] == 421


def test_the_token_of_the_opened_browser_counts_once():
    guard = guarded()
    assert asked(query="token=once", guard=guard)[2] == "door"
    assert asked(query="token=once", guard=guard)[0] == 403
    assert asked(query="token=the-token", guard=guard)[2] == "door"


def test_a_request_of_the_page_itself_is_let_in():
    origin = {"cookie": COOKIE, "origin": f"http://{HOST}", "method": "POST"}
    assert asked("/gradio_api/queue/join", **origin)[0] == 200
    assert asked(cookie=f"other=1; {COOKIE}", host=f"localhost:{PORT}")[0] == 200
    assert asked(kind="websocket")[0] == 0


# ---- command lines

FORM = Form(
    folder="/d", data=("/d/a.json", "/d/b c.json"), eval=("/d/e.json",), model="/m", more="--max_length 64", run="/r",
    rate="1e-4", merged="/out", index="3", fix_out="/d/clean.jsonl", split="0.9,0.1",
)  # fmt: skip


def test_the_form_becomes_command_lines():
    assert shlex.split(commands.shown(commands.check(FORM)))[:4] == ["vlft", "check-data", "/d/a.json", "/d/b c.json"]
    assert commands.look(FORM)[:2] == ["preview", "/d/a.json"]
    assert commands.fix(FORM)[-4:] == ["--fix", "/d/clean.jsonl", "--split", "0.9,0.1"]
    assert commands.train(FORM) == [
        *("train", "--model_id", "/m", "--data_path", "/d/a.json", "/d/b c.json", "--eval_path", "/d/e.json"),
        *("--vision", "frozen", "--merger", "frozen", "--language", "lora", "--lora_rank", "32"),
        *("--learning_rate", "1e-4", "--num_train_epochs", "3", "--eval_strategy", "epoch", "--max_length", "64"),
        *("--output_dir", "/r"),
    ]
    assert commands.merge(FORM) == ["merge", "/r", "/out"]
    assert commands.chat("/m", "-x?", ["a.png"])[-2:] == ["--", "-x?"]


@pytest.mark.parametrize("make", [commands.check, commands.look, commands.plan, commands.train, commands.merge])
def test_an_empty_form_says_what_is_missing(make):
    with pytest.raises(ConfigError, match="first"):
        make(Form())


def test_an_open_quote_is_named():
    with pytest.raises(ConfigError, match="More flags"):
        commands.check(Form(data=("a",), more="--x 'y"))


# ---- jobs


@pytest.fixture
def jobs(tmp_path) -> Jobs:
    return Jobs(tmp_path / "jobs")


@pytest.fixture
def desk(jobs, tmp_path) -> Desk:
    return Desk(jobs=jobs, runs=Runs(), folder=str(tmp_path))


def ended(jobs: Jobs, verb: str, about: list[str], *, seconds: float = 60):
    """Wait for a job."""
    end = time.time() + seconds
    while (job := jobs.find(verb, about)) is not None and job.word == "running" and time.time() < end:
        time.sleep(0.05)
    return job


@pytest.fixture
def rows(tmp_path) -> Path:
    """Two good rows, and one whose name holds markup."""
    write_image(tmp_path / "a.jpg")
    bad = row("<image>x<script>alert(1)</script>", "y", image="<img src=x onerror=alert(1)>${alert(1)}.jpg")
    return write_json(tmp_path / "train.json", [row("<image>What?", "A.", image="a.jpg"), row("Hi.", "Hello."), bad])


def test_a_check_runs_and_its_rows_are_shown(rows, desk, tmp_path):
    form = Form(folder=str(tmp_path), data=(str(rows),), headers_only=True)
    line, html = check.view(form, desk)
    assert line == f"vlft check-data {rows} --headers_only"
    assert check.IDLE in html
    check.start(form, desk)
    check.start(form, desk)  # a second click changes nothing
    words = commands.check(form)
    job = ended(desk.jobs, words[0], words[1:])
    assert (job.word, job.status) == ("done", 1)
    assert job.document()["ok"] == 2
    _, html = check.view(form, desk)
    assert "1 row of 3 cannot be trained" in html
    page = (job.folder / check.PAGE).read_text()
    assert "<img src=x" not in page
    assert Jobs(desk.jobs.root).find(words[0], words[1:]).word == "done"  # the page was started again
    assert desk.jobs.named(job.name) == job.folder
    assert desk.jobs.named("../jobs") is None


def test_the_clean_rows_are_the_data_of_the_next_screens(rows, desk, tmp_path):
    form = Form(folder=str(tmp_path), data=(str(rows),), headers_only=True, fix_out="clean.jsonl")
    with pytest.raises(ConfigError, match="Write the file first"):
        check.written(form, desk)
    check.start_fix(form, desk)
    words = commands.fix(check._there(form))
    assert ended(desk.jobs, words[0], words[1:]).word == "done"
    assert check.written(form, desk)["data"] == [str(tmp_path / "clean.jsonl")]
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == 2


def test_a_command_that_fails_says_why(desk, tmp_path):
    form = Form(folder=str(tmp_path), data=(str(tmp_path / "none.json"),))
    look.start(form, desk)
    words = commands.look(form)
    job = ended(desk.jobs, words[0], words[1:])
    assert job.word == "failed"
    assert "none.json" in look.view(form, desk)[1]


def _started(jobs: Jobs, monkeypatch, code: str, name: str):
    """Start Python code as a job."""
    monkeypatch.setattr(sys, "executable", _stub(jobs.root.parent, code, os.path.realpath(sys.executable)))
    return jobs.start(["train", name], about=[name])


def _stub(folder: Path, code: str, python: str) -> str:
    """An executable that runs `vlft.ui.keep` as Python does, and `code` in place of vlft."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "code.py").write_text(code)
    stub = folder / "python"
    stub.write_text(f'#!/bin/sh\n[ "$2" = vlft ] && exec {python} {folder / "code.py"}\nexec {sys.executable} "$@"\n')
    stub.chmod(0o755)
    return str(stub)


SAVES = (
    "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(75))\nprint('ready', flush=True)\ntime.sleep(60)"
)


@pytest.mark.parametrize(("how", "word"), [("stop", "stopped"), ("kill", "lost")])
def test_a_job_is_stopped_or_killed(jobs, monkeypatch, how, word):
    _started(jobs, monkeypatch, SAVES, "run")
    end = time.time() + 30
    while "ready" not in (job := jobs.find("train", ["run"])).said() and time.time() < end:
        time.sleep(0.05)
    assert job.word == "running"
    assert job.pid is not None
    stop(job) if how == "stop" else os.kill(job.pid, signal.SIGKILL)
    job = ended(jobs, "train", ["run"])
    assert job.word == word
    assert job.pid is None


def test_a_job_whose_machine_went_down_is_lost(jobs):
    folder = jobs.root / jobs.key("train", ["run"])
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps({"words": ["train"], "argv": [], "document": False, "time": 1.0}))
    (folder / ".lock").touch()
    assert jobs.find("train", ["run"]).word == "lost"


def test_a_full_disk_is_named(jobs, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "job.json")

    monkeypatch.setattr("vlft.ui.jobs.write_json", full)
    with pytest.raises(ConfigError, match=r"job\.json: cannot be written \(No space left on device\)"):
        jobs.start(["check-data", "x"])


# ---- run folders


def line(step: int, **more: object) -> str:
    return json.dumps(
        {"step": step, "loss": 1.0 / step, "step_s": 2.0, "max_steps": 100, "lr": {"language": 1e-4}, **more}
    )


def test_curves_are_read_bit_by_bit(tmp_path):
    file = tmp_path / "metrics.jsonl"
    curves = Curves(path=file)
    assert not curves.update()
    file.write_text(line(1) + "\n" + line(2)[:10])
    assert curves.update()
    assert list(curves.columns["loss"][0]) == [1]
    with file.open("a") as out:
        out.write(line(2)[10:] + "\n" + json.dumps({"step": 2, "eval_loss": 0.3}) + "\nbroken\n")
    assert curves.update()
    assert not curves.update()
    assert [list(values) for values in curves.columns["loss"]] == [[1, 2], [1.0, 0.5]]
    assert list(curves.columns["eval_loss"][1]) == [0.3]
    file.write_text(line(1) + "\n")  # a resumed run cuts the lines after its checkpoint
    curves.update()
    assert list(curves.columns["loss"][0]) == [1]


def test_ten_thousand_steps_become_500_points(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(line(step) + "\n" for step in range(1, 10_001)))
    curves = Curves(path=tmp_path / "metrics.jsonl")
    curves.update()
    loss = json.loads(curves.charts()[0].points)["series"][0]
    assert len(loss["x"]) == 500
    began = time.perf_counter()
    curves.update()
    curves.charts()
    assert time.perf_counter() - began < 0.5


def test_a_run_of_a_terminal_is_found_by_its_lock(tmp_path):
    (tmp_path / "vlft.json").write_text(json.dumps({"base_model": "m", "training": {}}))
    assert holder(tmp_path) is None
    assert Runs().watch(tmp_path).word == "stopped before its last step"
    (tmp_path / ".lock").touch()
    assert holder(tmp_path) is None
    with Lock(tmp_path / ".lock"):
        assert holder(tmp_path) in (os.getpid(), 0)
        assert Runs().watch(tmp_path).word == "running"
    assert holder(tmp_path) is None


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, desk):
    (tmp_path / "run").mkdir()
    form = Form(folder=str(tmp_path), data=("a.json",), model="m", run="run")
    with Lock(tmp_path / "run" / ".lock"), pytest.raises(ConfigError, match="is training there right now"):
        train.start(form, desk)


def test_start_in_the_folder_of_a_finished_run_is_answered(tmp_path, desk):
    (tmp_path / "vlft.json").write_text(json.dumps({"base_model": "m", "training": {"finished": True}}))
    form = Form(folder=str(tmp_path), data=("a.json",), model="m", run=str(tmp_path))
    with pytest.raises(ConfigError, match="has finished"):
        train.start(form, desk)


def test_rewards_come_first_and_both_figures_of_a_long_run_are_the_last(tmp_path, desk):
    lines = [line(step, reward=step / 1000, loss=step % 2) for step in range(1, 1001)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    curves = desk.runs.curves(tmp_path)
    charts = curves.charts()
    assert [chart.title for chart in charts][:2] == ["Reward", "Loss"]
    assert [figure[:2] for figure in train.facts(curves.last)][:2] == [("reward", "1"), ("loss", "0")]
    assert [chart.lines[0].last for chart in charts][:2] == ["1", "0"]


def test_answers_are_read_and_escaped(tmp_path, desk):
    described = {"file": "e.json", "index": 3, "id": None, "turns": [{"role": "user", "text": "<b>?"}], "right": "A"}
    lines = [
        {"step": 0, "rows": [{**described, "media": []}]},
        {"step": 5, "answers": [{"file": "e.json", "index": 3, "answer": "<script>alert(1)</script>", "cut": False}]},
        {"step": 6, "note": "none"},
    ]
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines) + "{")
    (tmp_path / "vlft.json").write_text(json.dumps({"base_model": "m", "training": {"finished": True}}))
    rows, notes = answered(tmp_path)
    assert rows[0]["answers"] == [(5, "<script>alert(1)</script>")]
    assert notes == ["none"]
    _, html = train.view(Form(folder=str(tmp_path), run=str(tmp_path)), desk)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_thumbnails_are_small_and_of_pictures_only(tmp_path):
    from PIL import Image

    write_image(tmp_path / "a.jpg", 900, 300)
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    (tmp_path / "text.png").write_text("no picture")
    names = ("a.jpg", "large.png", "text.png", "gone.png")
    shown = thumbs(str(tmp_path / name) for name in names)
    assert [one["alt"] for one in shown] == ["a.jpg"]
    with Image.open(io.BytesIO(base64.b64decode(shown[0]["uri"].partition(",")[2]))) as small:
        assert max(small.size) == 160


# ---- folders and the screens


def test_a_folder_is_listed(rows, tmp_path, base):
    os.symlink(base, tmp_path / "base")
    found = find(str(tmp_path))
    assert [Path(path).name for path, _ in found.data] == ["train.json"]
    assert (found.pictures, found.models) == (1, (str(tmp_path / "base"),))
    opened = data.opened(Form(folder=str(tmp_path)))
    assert opened == {"folder": str(tmp_path), "data": [str(rows)], "model": str(tmp_path / "base")}
    assert data.moved(str(tmp_path), ["base"]) == (str(tmp_path / "base"), [])
    assert data.moved(str(tmp_path), [data.UP]) == (str(tmp_path.parent), [])
    assert data.moved(str(tmp_path), []) == (str(tmp_path), [])


@pytest.mark.parametrize("name", ["missing", "file.json"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path, name):
    (tmp_path / "file.json").write_text("[]")
    with pytest.raises(ConfigError, match=name):
        find(str(tmp_path / name))
    values = data.view(Form(folder=str(tmp_path / name)))
    assert isinstance(values[0], Choices)
    assert "cannot be opened" in values[-1]


def test_the_range_of_rows_moves():
    assert look.shifted("0-3", 1) == "4-7"
    assert look.shifted("4-7", -1) == "0-3"
    assert look.shifted("2", -1) == "1"
    assert look.shifted("0", -1) == "0"
    with pytest.raises(VlftError, match="one range"):
        look.shifted("1,5", 1)


# ---- the command


@pytest.mark.skipif(find_spec("gradio") is None, reason="pip install 'vlft[ui]'")
def test_a_taken_port_is_named_with_the_next_free_one(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["ui", "--port", str(port), "--no_browser", "--folder", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert f"--port {port}: is taken" in said
    assert "vlft ui --port " in said


def test_without_gradio_the_install_line_is_named(capsys, monkeypatch):
    monkeypatch.setattr("vlft.cli.ui.find_spec", lambda name: None)
    assert main(["ui", "--no_browser"]) == 1
    assert "pip install 'vlft[ui]'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--folder", "missing"], ["--port", "0"], ["--port", "99999"]])
def test_wrong_flags_are_named(capsys, words):
    assert main(["ui", "--no_browser", *words]) == 1
    assert words[0] in capsys.readouterr().err


def test_the_page_imports_no_torch():
    code = "import sys, vlft.ui.server, vlft.ui.screens.compare, vlft.ui.rows; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
