"""Drive the page of `vlft ui` in a real browser: Chromium, headless, through playwright. Used by tests/test_ui_browser.

To take the demo from the first screen to a merged model by hand, with pictures of each screen:

    python tests/ui_browser.py OUT [STEPS]
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

INSTALL = "needs Chromium, playwright and Gradio: apt-get install -y chromium; pip install playwright 'vlft[ui]'"
CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
WIDTHS = {1200: 900, 390: 844}
FIRST = "Folder on this machine"


def _starts(label: str) -> re.Pattern[str]:
    return re.compile(r"^\s*" + re.escape(label).replace("\\ ", " "))  # a label may be followed by a hint


class Served:
    """A running `vlft ui`.

    Attributes:
        process: of the command.
        address: with its token.
        began: `time.perf_counter()` of its start.
        seconds: until it printed its address.
    """

    def __init__(self, folder: Path, home: Path, *words: str) -> None:
        self.began = began = time.perf_counter()
        self.log = home / "ui.log"
        home.mkdir(parents=True, exist_ok=True)
        environ = {**os.environ, "VLFT_UI_FOLDER": str(home / "jobs"), "HF_HUB_OFFLINE": "1"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vlft", "ui", "--no_browser", "--folder", str(folder), *words],
                stdout=log, stderr=subprocess.STDOUT, env=environ, cwd=folder,
            )  # fmt: skip
        self.address = ""
        while not self.address and time.perf_counter() - began < 60 and self.process.poll() is None:
            time.sleep(0.05)
            found = re.search(r"http://\S+token=\S+", self.log.read_text())
            self.address = found[0] if found else ""
        self.seconds = time.perf_counter() - began
        if not self.address:
            raise RuntimeError(self.log.read_text())

    @property
    def origin(self) -> str:
        return self.address.partition("/?")[0]

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(20)


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


class Screen:
    """The page as a user sees it: fields by their labels, buttons by their words.

    Attributes:
        page: of playwright.
        faults: what the page reported as errors, and requests to other hosts.
    """

    def __init__(self, browser: Any, address: str, *, width: int = 1200, context: Any = None) -> None:
        self.context = context or browser.new_context(viewport={"width": width, "height": WIDTHS[width]})
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)  # a page that is loaded beside two other tests takes over 15 s
        self.faults: list[str] = []
        origin = address.partition("/?")[0]
        self.page.on("pageerror", lambda error: self.faults.append(f"error: {error} {error.stack}"))
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        self.page.on(
            "request",
            lambda one: None if one.url.startswith((origin, "data:", "blob:")) else self.faults.append(one.url),
        )
        self.page.goto(address)
        self.page.get_by_label(_starts(FIRST)).wait_for(state="attached")  # the kept step may be another one

    def step(self, number: int) -> Any:
        """Go to a screen; returns it."""
        self.page.locator("#steps label").nth(number - 1).click()
        screen = self.page.locator(f"#screen-{number}")
        screen.wait_for()
        return screen

    def fill(self, label: str, text: str) -> None:
        """Type into a field, as a user: then leave it."""
        field = self.page.locator(".screen:visible").get_by_label(_starts(label))
        field.fill(text)
        field.press("Tab")

    def choose(self, label: str, text: str) -> None:
        """Type into a list of choices and take what was typed."""
        field = self.page.locator(".screen:visible").get_by_label(_starts(label))
        field.click()
        field.fill(text)
        field.press("Enter")
        field.press("Tab")

    def value(self, label: str) -> str:
        """What a field of the visible screen holds."""
        return self.page.locator(".screen:visible").get_by_label(_starts(label)).input_value()

    def holds(self, label: str, text: str) -> None:
        """Wait until a field of the visible screen holds a text."""
        from playwright.sync_api import expect

        field = self.page.locator(".screen:visible").get_by_label(_starts(label))
        expect(field).to_have_value(text, timeout=60_000)

    def click(self, words: str) -> None:
        """Press a button of the visible screen."""
        self.page.locator(".screen:visible").get_by_role("button", name=words, exact=True).click()

    def sees(self, words: str, *, seconds: float = 30) -> None:
        """Wait until the visible screen shows these words."""
        self.page.locator(".screen:visible").get_by_text(words).first.wait_for(timeout=seconds * 1000)

    def text(self) -> str:
        """The words of the visible screen."""
        return self.page.locator(".screen:visible").inner_text()

    def frame(self) -> Any:
        """The page in the visible screen."""
        return self.page.frame_locator(".screen:visible iframe.sheet")

    def shot(self, path: Path) -> None:
        """Take a picture of the whole page."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=str(path), full_page=True)


def draw(folder: Path, *, rows: int, held_out: int) -> None:
    """Write the demo's rows, pictures and base, as a folder of a user: train.json, held_out.json, base/."""
    from vlft.demo.build_base import STORED
    from vlft.demo.story import stories, write_rows

    for name, split, count in (("train", "train", rows), ("held_out", "held_out", held_out)):
        write_rows(list(stories("lesson", split, count, seed=7)), folder, name=name, seed=7)
    shutil.copytree(STORED, folder / "base", dirs_exist_ok=True)


def first_steps(
    screen: Screen, folder: Path, *, steps: int, rate: str = "3e-3", done: Callable[[str], None] = lambda name: None
) -> None:
    """Take the demo from the first screen to a plan. `done` is called with the name of each step."""
    screen.step(1)
    screen.fill(FIRST, str(folder))
    screen.click("Open")
    screen.sees("data files")
    screen.choose("Data files to train on", str(folder / "train.json"))
    screen.choose("Data files to evaluate on (optional)", str(folder / "held_out.json"))
    screen.choose("Base model", str(folder / "base"))
    screen.fill(
        "More flags of vlft train (optional)",
        f"--lora_dropout 0 --adam_beta2 0.98 --lr_scheduler_type cosine --warmup_steps 0.05 --use_cpu true "
        f"--max_steps {steps} --logging_steps {max(1, steps // 40)} --eval_strategy steps --eval_steps "
        f"{max(1, steps // 4)}",
    )
    done("data")
    screen.step(2)
    screen.click("Check the rows")
    screen.sees("rows can be trained.", seconds=120)
    screen.frame().get_by_text("can be trained").first.wait_for()
    done("check")
    screen.step(3)
    screen.click("Show the rows")
    screen.frame().locator("mark").first.wait_for(timeout=60_000)
    done("look")
    screen.step(4)
    screen.page.get_by_label("vision + language LoRA").check()
    screen.fill("Learning rate", rate)
    screen.fill("Rows per step", "16")
    screen.page.locator(".screen:visible").get_by_label("lora").nth(1).check()
    screen.click("Plan the run")
    screen.sees("What is trained", seconds=120)
    done("plan")


def demo(screen: Screen, folder: Path, out: Path | None, *, steps: int) -> dict[str, float]:
    """Take the demo from the first screen to a merged model. Returns the seconds until the end of each step."""
    began, seconds = time.perf_counter(), {}

    def done(name: str) -> None:
        seconds[name] = time.perf_counter() - began
        if out is not None:
            screen.shot(out / f"{len(seconds)}-{name}.png")

    first_steps(screen, folder, steps=steps, done=done)
    screen.step(5)
    screen.choose("Folder of the run", str(folder / "run"))
    screen.click("Start training")
    screen.sees("Running: step", seconds=120)
    screen.page.locator(".screen:visible .chart").first.wait_for(timeout=60_000)
    done("training")
    screen.sees("Finished: step", seconds=900)
    screen.sees("Answers during training")
    done("train")
    screen.step(6)
    screen.page.get_by_label("A row of a data file").check()
    screen.fill("Row, from 0", "0")
    screen.click("Ask both models")
    screen.page.locator(".screen:visible .reply").nth(1).wait_for(timeout=120_000)
    done("compare")
    screen.step(7)
    screen.fill("New folder for the merged model", str(folder / "merged"))
    screen.click("Merge")
    screen.sees("Use it", seconds=120)
    done("merge")
    return seconds


def main(out: Path, steps: int) -> None:
    """Take the whole demo through the page, with a picture of each screen."""
    folder = out / "data"
    if not (folder / "base").exists():
        draw(folder, rows=3200, held_out=60)
    served = Served(folder, out / "home")
    try:
        with chromium() as browser:
            began = time.perf_counter()
            screen = Screen(browser, served.address)
            print(f"address after {served.seconds:.1f} s, first screen {time.perf_counter() - began:.1f} s later")
            seconds = demo(screen, folder, out / "shots", steps=steps)
            print({name: round(value) for name, value in seconds.items()}, screen.faults)
    finally:
        served.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 640)
