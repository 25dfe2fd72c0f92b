"""`vlft ui` in a real browser: the first steps, a reload, a run in two tabs, a phone, odd names, and who is let in.

With `-m grid` also the whole demo to a merged model, a killed run, and 5,000 rows.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
from build import row, write_image, write_json
from ui_browser import CHROMIUM, INSTALL, Screen, Served, chromium, demo, draw, first_steps

if not CHROMIUM or find_spec("gradio") is None or find_spec("playwright") is None:
    pytest.skip(INSTALL, allow_module_level=True)

SHOTS = os.environ.get("VLFT_UI_SHOTS")  # a folder for pictures of each screen


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The demo's rows and base, few of them."""
    made = tmp_path_factory.mktemp("data")
    draw(made, rows=48, held_out=6)
    return made


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    made = Served(folder, tmp_path_factory.mktemp("home"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


@pytest.fixture
def screen(browser, served):
    made = Screen(browser, served.address)
    yield made
    made.context.close()
    assert not made.faults


def _settings(screen: Screen, folder: Path, steps: int) -> None:
    """Fill in the first screen for a run of the demo."""
    screen.step(1)
    screen.choose("Data files to train on", str(folder / "train.json"))
    screen.choose("Base model", str(folder / "base"))
    screen.fill(
        "More flags of vlft train (optional)",
        f"--use_cpu true --lora_dropout 0 --max_steps {steps} --logging_steps 1",
    )
    screen.step(4)
    screen.fill("Rows per step", "4")
    screen.fill("Save every", "5")


def test_the_first_screen_is_there_soon(served, screen):
    took = time.perf_counter() - served.began
    assert served.seconds < 15  # 0.5 s on a quiet machine, and 4 s to the screen; tests run beside others
    assert took < 60
    screen.sees("data files")


def test_the_first_steps_and_a_reload(screen, folder):
    first_steps(screen, folder, steps=8)
    screen.page.reload()
    screen.sees("What is trained")
    screen.holds("Learning rate", "3e-3")


@pytest.mark.grid
def test_the_demo_from_the_first_screen_to_a_merged_model(screen, folder):
    out = Path(SHOTS) / "1200" if SHOTS else None
    demo(screen, folder, out, steps=8)
    assert "vllm serve" in screen.text()
    assert (folder / "merged" / "config.json").is_file()
    assert json.loads((folder / "run" / "vlft.json").read_text())["training"]["finished"]


def test_a_reload_and_a_second_tab_show_the_run_and_the_page_may_end(browser, served, folder, tmp_path):
    screen = Screen(browser, served.address)
    _settings(screen, folder, 4000)
    screen.step(5)
    screen.choose("Folder of the run", str(tmp_path / "run"))
    screen.click("Start training")
    screen.sees("Running: step", seconds=120)
    screen.page.reload()
    screen.sees("Running: step")
    screen.holds("Folder of the run", str(tmp_path / "run"))
    second = Screen(browser, served.origin, context=screen.context)
    second.sees("Running: step")
    second.click("Start training")  # the run that the page shows: no error
    second.page.wait_for_timeout(1000)
    assert "right now" not in second.text()
    second.click("Stop and save")
    screen.sees("The run was stopped and saved", seconds=60)
    assert list((tmp_path / "run").glob("checkpoint-*"))
    screen.context.close()
    assert not screen.faults + second.faults


@pytest.mark.grid
def test_a_killed_run_is_said_and_resumed_in_the_page(screen, folder, tmp_path):
    _settings(screen, folder, 4000)
    screen.step(5)
    screen.choose("Folder of the run", str(tmp_path / "run"))
    screen.click("Start training")
    screen.sees("Running: step", seconds=120)
    end = time.time() + 60
    while not list((tmp_path / "run").glob("checkpoint-*/trainer_state.json")) and time.time() < end:
        time.sleep(0.2)
    from vlft.ui.runs import holder

    os.kill(holder(tmp_path / "run"), signal.SIGKILL)
    screen.sees("The run was killed")
    screen.click("Start training")
    screen.sees("Running: step", seconds=120)
    screen.click("Stop and save")
    screen.sees("The run was stopped and saved", seconds=60)


def test_typed_text_wins_tabs_keep_their_forms_and_back_leads_to_the_step_before(browser, served, tmp_path):
    for name in ("run2", "run"):
        (tmp_path / "output" / name).mkdir(parents=True)
        for file in ("vlft.json", "metrics.jsonl"):
            (tmp_path / "output" / name / file).write_text("{}")
    screen = Screen(browser, served.address)
    screen.fill("Folder on this machine", str(tmp_path))
    screen.click("Open")
    screen.sees("2runs")
    screen.choose("Base model", "Qwen/Qwen2-VL")
    assert screen.value("Base model") == "Qwen/Qwen2-VL"
    screen.step(5)
    typed = str(tmp_path / "output" / "ru")
    screen.choose("Folder of the run", typed)
    screen.page.wait_for_timeout(2500)
    assert screen.value("Folder of the run") == typed
    field = screen.page.locator(".screen:visible").get_by_label("Folder of the run")
    field.click()
    field.fill("run2")
    field.press("ArrowDown")
    field.press("Enter")
    screen.holds("Folder of the run", str(tmp_path / "output" / "run2"))
    second = Screen(browser, served.origin, context=screen.context)
    second.step(5)
    second.holds("Folder of the run", str(tmp_path / "output" / "run2"))
    second.choose("Folder of the run", str(tmp_path / "other"))
    second.page.wait_for_timeout(500)
    screen.page.reload()
    screen.page.locator("#screen-5").wait_for()
    screen.holds("Folder of the run", str(tmp_path / "output" / "run2"))
    screen.step(7)
    screen.page.wait_for_url("**/#7")
    screen.page.go_back()
    screen.page.locator("#screen-5").wait_for()
    screen.context.close()
    assert not screen.faults + second.faults


def test_a_message_ends_with_the_next_action_and_the_console_is_empty(browser, served, folder, tmp_path):
    said = []
    screen = Screen(browser, served.address)
    screen.page.on("console", lambda one: said.append(one.text) if one.type == "error" else None)
    screen.page.reload()
    screen.step(5)
    screen.choose("Folder of the run", str(tmp_path / "run"))
    screen.step(1)
    screen.choose("Base model", "")
    screen.step(5)
    screen.click("Start training")
    message = screen.page.locator(".screen:visible .message[data-now]")
    message.wait_for()
    screen.choose("Folder of the run", str(tmp_path / "run3"))
    message.wait_for(state="hidden")
    screen.click("Start training")
    message.wait_for()  # the same text again
    screen.context.close()
    assert not screen.faults + said


def test_a_phone_needs_no_sideways_scrolling(browser, served, folder):
    screen = Screen(browser, served.address, width=390)
    for number in range(1, 8):
        screen.step(number)
        assert screen.page.evaluate("document.documentElement.scrollWidth") <= 390
        if SHOTS:
            screen.shot(Path(SHOTS) / "390" / f"{number}.png")
    screen.context.close()
    assert not screen.faults, "\n".join(screen.faults)


def test_nothing_of_a_row_is_executed(browser, served, tmp_path):
    here = tmp_path / "<img src=x onerror=alert(1)>${alert(2)}{{alert(3)}}"
    here.mkdir()
    name = "<svg onload=alert(4)>.png"
    write_image(here / name)
    text = "<image><script>alert(5)</script>${alert(6)}{{ 7*7 }}"
    write_json(
        here / "train.json", [row(text, "<img src=y onerror=alert(8)>", image=name), row(text, "x", image="z<b>")]
    )
    (here / "vlft.json").write_text("{}")
    screen = Screen(browser, served.address)
    screen.fill("Folder on this machine", str(here))
    screen.click("Open")
    screen.sees("onerror=alert(1)")
    screen.step(2)
    screen.click("Check the rows")
    screen.sees("1 row of 2 cannot be trained", seconds=60)
    screen.frame().get_by_text("refused").first.wait_for()
    screen.step(3)
    screen.click("Show the rows")
    screen.sees("row", seconds=60)
    screen.step(6)
    screen.page.get_by_label("A row of a data file").check()
    screen.page.wait_for_timeout(3000)
    assert "49" not in screen.text()
    screen.context.close()
    assert not screen.faults


def test_a_large_picture_and_a_question_without_a_run_are_answered(screen, served, folder, tmp_path):
    from PIL import Image

    Image.new("L", (10_000, 10_000)).save(tmp_path / "large.png")
    screen.step(5)
    screen.choose("Folder of the run", str(folder / "no-run"))
    screen.step(6)
    screen.page.locator("#screen-6 input[type=file]").set_input_files(str(tmp_path / "large.png"))
    screen.fill("Question", "What is it?")
    screen.click("Ask both models")
    screen.sees("No run is in")


@pytest.mark.grid
def test_clicks_are_answered_in_half_a_second(browser, served, tmp_path):
    """5,000 checked rows and a run of 10,000 steps, on a machine that other tests use too."""
    write_image(tmp_path / "a.jpg")
    write_json(
        tmp_path / "train.json",
        [row("<image>What?", f"A {i}.", image="a.jpg" if i % 2 else f"b{i}.jpg") for i in range(5000)],
    )
    run = tmp_path / "run"
    run.mkdir()
    (run / "vlft.json").write_text(json.dumps({"base_model": "m", "training": {}}))
    (run / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": i, "loss": 1 / i, "grad_norm": 1.0, "tokens_per_s": 9.0, "step_s": 1.0,
                        "max_steps": 20_000, "lr": {"language": 1e-4, "vision": 1e-5}}) + "\n"
            for i in range(1, 10_001)
        )
    )  # fmt: skip
    screen = Screen(browser, served.address)
    screen.fill("Folder on this machine", str(tmp_path))
    screen.click("Open")
    screen.sees(str(tmp_path / "train.json"))  # chosen, because it is the only one
    screen.step(2)
    screen.click("Check the rows")
    screen.sees("2,500 rows of 5,000 cannot be trained", seconds=120)
    screen.step(5)
    screen.choose("Folder of the run", str(run))
    screen.sees("step 10,000 of 20,000")
    took = {}
    for number in (1, 2, 3, 4, 5, 6, 7):
        began = time.perf_counter()
        screen.step(number)
        took[f"step {number}"] = time.perf_counter() - began
    screen.step(5)
    assert not screen.page.get_by_role("button", name="Stop and save").is_visible()  # no run trains
    began = time.perf_counter()
    screen.click("Start training")
    screen.sees("Name the base model")
    took["Start training"] = time.perf_counter() - began
    screen.context.close()
    print({name: round(seconds, 3) for name, seconds in took.items()})
    assert max(took.values()) < 3, took  # 0.5 s on a quiet machine


def test_nobody_else_reaches_it(served):
    address = served.origin
    paths = ("/", "/config", "/gradio_api/info", "/gradio_api/startup-events", "/theme.css", "/job/check-data-0/check")
    for path in (*paths, "/gradio_api/file=/etc/passwd", "/?token=wrong", "/static/img/logo.svg"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(address + path, timeout=20)
        assert refused.value.code == 403, path
    own = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    own.open(served.address, timeout=20).read()
    assert own.open(address + "/config", timeout=20).status == 200
    for path in (
        "/gradio_api/file=/etc/passwd",
        f"/gradio_api/file={Path(__file__)}",
        "/gradio_api/file=../../etc/passwd",
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            own.open(address + path, timeout=20)
        assert refused.value.code in (403, 404), path


def test_it_listens_on_this_machine_only(served):
    if shutil.which("ss") is None and not Path("/proc/net/tcp").exists():
        pytest.skip("no list of sockets")
    port = int(served.origin.rpartition(":")[2])
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]
    assert listening == [f"0100007F:{port:04X}"]
    six = Path("/proc/net/tcp6")
    if six.exists():
        assert f":{port:04X} 0000" not in six.read_text()
