"""What a user sees of a command: the last line of a terminal, lines of a log, the estimate, the end of a run."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from mishaps import before_each_loss, poison
from runs import arguments, split
from terminal import on_terminal

from vlft import screen
from vlft.cli.main import main
from vlft.screen.row import Bar, Part, Row, Writer, fitting
from vlft.train.progress import Pace, Progress, Schedule, schedules

SAVES = ("--save_strategy", "steps", "--save_steps", "2")


# ---- the estimate


@pytest.mark.parametrize("strategy", ["no", "steps", "epoch"])
def test_transformers_evaluates_and_saves_when_the_estimate_expects_it(strategy):
    from transformers import TrainerControl, TrainerState
    from transformers.trainer_callback import DefaultFlowCallback
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    for every, delay, last in itertools.product((1, 3, 7), (0, 2.5, 4), (1, 6, 7, 10)):
        steps_per_epoch = 4
        args = SimpleNamespace(
            eval_strategy=IntervalStrategy(strategy),
            save_strategy=SaveStrategy(strategy),
            logging_strategy=IntervalStrategy.NO,
            logging_first_step=False,
            eval_delay=delay,
        )
        state = TrainerState(max_steps=last, eval_steps=every, save_steps=every)
        done = {"evaluation": [], "checkpoint": []}
        for step in range(1, last + 1):
            state.global_step, state.epoch = step, step / steps_per_epoch
            control = DefaultFlowCallback().on_step_end(args, state, TrainerControl())
            if step % steps_per_epoch == 0 or step == last:
                control = DefaultFlowCallback().on_epoch_end(args, state, control)
            done["evaluation"] += [step] * control.should_evaluate
            done["checkpoint"] += [step] * control.should_save
        expected = schedules(args, state, steps_per_epoch=steps_per_epoch)
        for what, after in itertools.product(done, range(last + 1)):
            case = (what, every, delay, last, after)
            assert expected[what].count(after, last) == sum(step > after for step in done[what]), case


def _simulated(*, step: int, last: int, plan: dict, seconds: dict) -> list[tuple[float | None, float]]:
    """Run steps of 10 s, the first of 60 s, by a clock that only this function moves: (estimate, truth) at each."""
    now = 100.0
    pace = Pace(step=step, last=last, plan=plan, now=lambda: now)
    found, before = [(pace.left(), now)], step
    for each in range(step + 1, last + 1):
        now += 60 if each == step + 1 else 10
        pace.stepped(each)
        found.append((pace.left(), now))
        for what in plan:
            if plan[what].count(each - 1, last) - plan[what].count(each, last):
                now += seconds[what]
                pace.took(what, each, seconds[what])
        before = each
    assert before == last
    return [(left, now - at) for left, at in found]


@pytest.mark.parametrize("start", [0, 37])
def test_the_estimate_foresees_evaluations_and_checkpoints(start):
    plan = {"evaluation": Schedule(every=20), "checkpoint": Schedule(every=50)}
    told = _simulated(step=start, last=110, plan=plan, seconds={"evaluation": 500.0, "checkpoint": 90.0})
    assert told[0][0] is None, "no step has ended"
    measured = [pair for place, pair in enumerate(told, start) if place > 50]
    assert all(left == pytest.approx(truth) for left, truth in measured)
    before_the_first = told[5]
    assert before_the_first[0] < before_the_first[1], "their time is unknown until one was measured"


def test_the_estimate_leaves_out_what_was_done_before_the_first_step():
    now = [0.0]
    never = Schedule(every=0)
    pace = Pace(step=0, last=10, plan={"evaluation": never, "checkpoint": never}, now=lambda: now[0])
    now[0] = 3600.0  # such as the pass for the reference
    pace.exclude(3600.0)
    now[0] = 3602.0
    pace.stepped(1)
    assert pace.left() == pytest.approx(9 * 2)


def test_a_log_says_what_is_done_for_long_before_the_first_step(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress(say=print, bar=False, steps_per_epoch=1)
    for seconds, place in ((10, 1), (61, 2), (70, 3), (130, 4)):
        now[0] = seconds
        progress.doing(f"computing the reference {place}/5")
    assert capsys.readouterr().out == "  computing the reference 2/5\n  computing the reference 4/5\n"


def test_the_estimate_counts_down_within_a_long_step():
    now = 0.0
    pace = Pace(step=0, last=10, plan={}, now=lambda: now)
    now = 10.0
    pace.stepped(1)
    assert pace.left() == 90
    now = 16.0
    assert pace.left() == 84
    now = 1e6
    assert pace.left() == 0


# ---- the last line of a terminal

PARTS = (
    Part(text="120/300"),
    Bar(share=0.4, rank=4),
    Part(text="loss 1.2345", rank=1),
    Part(text="lr 0.0001", rank=6),
    Part(text="", rank=2),
    Part(text="事例 1,234 tok/s", rank=5),
    Part(text="ETA 0:04:56", rank=1),
)


def test_a_narrow_terminal_shows_the_most_important_parts():
    assert [part.text for part in fitting(PARTS, 20)[0]] == ["120/300"]
    assert [part.text for part in fitting(PARTS, 33)[0]] == ["120/300", "loss 1.2345", "ETA 0:04:56"]
    parts, bar = fitting(PARTS, 41)
    assert (PARTS[1] in parts, bar) == (True, 6)
    parts, bar = fitting(PARTS, 200)
    assert (len(parts), bar) == (6, 40)


@pytest.mark.parametrize("no_color", [False, True])
def test_a_line_is_never_wider_than_its_terminal(monkeypatch, no_color):
    from rich.cells import cell_len

    with on_terminal(monkeypatch, 80) as terminal:
        if no_color:
            monkeypatch.setenv("NO_COLOR", "1")
        writer = Writer(terminal.stream)
        for columns in range(1, 130):
            terminal.resize(columns)
            text = writer.text(Row(parts=PARTS))
            plain = re.sub(r"\x1b\[[\d;]*m", "", text)
            assert 1 <= cell_len(plain) <= max(1, columns - 3), (columns, plain)
            assert "\n" not in text
            assert not (no_color and "\x1b" in text)
    terminal.seen()


def test_what_is_printed_appears_above_the_line(monkeypatch):
    """Whole lines, also from a forked process and from a program that draws its own bar."""
    monkeypatch.setattr(screen, "DELAY", 0.0)
    monkeypatch.setattr(screen, "PERIOD", 0.01)
    with on_terminal(monkeypatch, 40) as terminal:
        with screen.live() as live:
            live.show(lambda: Row(parts=(Part(text="the line"),)))
            time.sleep(0.1)
            for number in range(3):
                print(f"row {number}")
                print("a note of more than forty columns that wraps", file=sys.stderr)
                time.sleep(0.03)
            print("half a line, ", end="")
            time.sleep(0.05)
            print("and its end")
            sys.stderr.write("\rtheirs  50%")
            sys.stderr.write("\rtheirs 100%\n")
            if (child := os.fork()) == 0:
                print("a worker's line")
                sys.stdout.flush()
                os._exit(0)
            os.waitpid(child, 0)
            time.sleep(0.1)
            live.leave()
        print("the end")
    seen = terminal.seen()
    note = "a note of more than forty columns that w\nraps"
    rows = [text for number in range(3) for text in (f"row {number}", note)]
    expected = [*rows, "half a line, and its end", "theirs 100%", "a worker's line", "the line", "the end"]
    assert seen.text == "\n".join(expected)
    assert seen.states.count("the line") > 5, "it was drawn while the program worked"


def test_a_program_that_shows_stdout_on_the_terminal_finds_an_empty_line(monkeypatch):
    """As with `vlft train | tee log`."""
    monkeypatch.setattr(screen, "DELAY", 0.0)
    monkeypatch.setattr(screen, "PERIOD", 0.01)
    read, write = os.pipe()
    with on_terminal(monkeypatch, 40, stdout=False) as terminal, os.fdopen(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with screen.live() as live:
            live.show(lambda: Row(parts=(Part(text="the line"),)))
            for number in range(3):
                time.sleep(0.05 + screen.LATER)
                print(f"row {number}")
                os.write(terminal.stream.fileno(), os.read(read, 100))  # what tee does
    os.close(read)
    seen = terminal.seen()
    assert seen.text == "row 0\nrow 1\nrow 2"
    assert seen.states.count("the line") > 3


def test_stages_and_counts(monkeypatch, capsys):
    monkeypatch.setattr(screen, "DELAY", 0.0)
    monkeypatch.setattr(screen, "PERIOD", 0.01)
    with on_terminal(monkeypatch, 60) as terminal, screen.live():
        screen.stage("loading the weights")
        time.sleep(0.1)
        for _ in screen.count(range(20), total=20, what="measuring rows"):
            time.sleep(0.01)
        time.sleep(0.05)
    seen = terminal.seen()
    assert any(re.search(r"^\S loading the weights  0:00:00$", state) for state in seen.states)
    assert any(re.search(r"^measuring rows .* 1\d/20  .*ETA 0:00:00$", state) for state in seen.states)
    assert re.search(r"\S loading the weights", [*filter(None, seen.states)][-1]), "the stage is shown again"
    assert seen.text == ""
    capsys.readouterr()
    assert list(screen.count(range(3), total=3, what="reading")) == [0, 1, 2]  # outside of a command
    monkeypatch.setattr(screen, "MINUTE", 0.0)
    with screen.live():
        assert list(screen.count(range(2), total=2, what="reading")) == [0, 1]
    assert capsys.readouterr().err == "reading: 1/2 after 0:00:00\nreading: 2/2 after 0:00:00\n"


@pytest.mark.parametrize("setting", [("TERM", "dumb"), ("NO_TTY", "1"), ("JPY_PARENT_PID", "7")])
def test_some_terminals_get_no_line(monkeypatch, setting):
    with on_terminal(monkeypatch, 80) as terminal:
        assert screen.terminal() is terminal.stream
        monkeypatch.setenv(*setting)
        assert screen.terminal() is None
    terminal.seen()


# ---- a run


def test_a_run_on_a_terminal_of_40_columns(monkeypatch, base, mixed_json, media, tmp_path):
    monkeypatch.setattr(screen, "PERIOD", 0.01)
    run = tmp_path / "run"
    more = ("--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2", "--eval_path", str(mixed_json))
    argv = arguments(base, mixed_json, media, run, *more, *split(1, 2), "--report_rows", "1", *SAVES)
    with on_terminal(monkeypatch, 40) as terminal:
        assert main(argv) == 0
        seen = terminal.seen()
    drawn = [state for state in seen.states if re.match(r"\d/4|[⠀-⣿]", state)]
    assert drawn
    assert max(map(len, drawn)) <= 37
    for shown in (r"1/4  .*loss \d\.\d{4}  ETA \d:\d\d:\d\d", r"2/4  .*evaluating \d/7", r"4/4  .*saving checkpoint-4"):
        assert any(re.match(shown, state) for state in drawn), shown
    after = seen.text.partition("evaluation after step 4")[2].splitlines()
    assert re.match(r"4/4  .*loss \d\.\d{4}  ETA 0:00:00$", after[1])
    assert not re.search(r"^step ", seen.text, re.M), "the bar takes the place of the lines"
    best = min((line for line in _metrics(run) if "eval_loss" in line), key=lambda line: line["eval_loss"])
    step, tokens = best["step"], sum(line["tokens"] for line in _metrics(run) if "loss" in line)
    whole = re.sub(r"\s", "", seen.text)  # the terminal wraps these lines
    for shown in (
        f"; 7 rows, {tokens:,} tokens (",
        f"best:   step {step}, evaluation loss {best['eval_loss']:.4f}; {run}/checkpoint-{step}",
        f"report: {run}/report.html",
        f"chat:   vlft chat {run}",
        f"merge:  vlft merge {run} {run}-merged",
    ):
        assert shown.replace(" ", "") in whole


def _metrics(run: Path) -> list[dict]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_finished_run_repeats_its_last_lines(train, capsys):
    train("--max_steps", "2")
    first = capsys.readouterr().out
    train("--max_steps", "2")
    again = capsys.readouterr().out
    ends = [text[text.index("done: ") :] for text in (first, again)]
    assert ends[0] == ends[1]
    words = [line.split(":")[0] for line in ends[0].splitlines()]
    assert list(dict.fromkeys(words)) == ["done", "report", "serve", "note", "chat", "output", "merge"]


def test_a_log_has_a_line_a_minute(train, capsys, monkeypatch):
    """And the first and last step, though they are not logged; every step is in metrics.jsonl as the flags say."""
    run = train("--max_steps", "5", "--logging_steps", "2")
    said = re.findall(r"^step .*", capsys.readouterr().out, re.M)
    assert [text.split("  ")[0] for text in said] == ["step 1/5", "step 5/5"]
    assert re.match(r"step 1/5  done after \d", said[0])
    assert [line["step"] for line in _metrics(run)] == [2, 4, 5]
    monkeypatch.setattr(screen, "MINUTE", 0.0)
    train("--max_steps", "5", "--logging_steps", "2", name="slow")
    said = re.findall(r"^step (\d)", capsys.readouterr().out, re.M)
    assert said == ["1", "2", "4", "5"]


def test_stdout_in_a_file_has_lines_while_the_terminal_has_the_bar(train, capsys, monkeypatch):
    before_each_loss(monkeypatch, lambda trainer, batch: time.sleep(0.05))
    monkeypatch.setattr(screen, "PERIOD", 0.01)
    with on_terminal(monkeypatch, 80, stdout=False) as terminal:
        train("--max_steps", "3")
        bar = terminal.seen()
    out = capsys.readouterr().out
    assert re.findall(r"^step (\d)/3", out, re.M) == ["1", "3"]
    assert any(state.startswith("2/3  ") for state in bar.states)
    assert "output: " not in bar.text
    with on_terminal(monkeypatch, 80) as terminal:
        train("--max_steps", "3", "--disable_tqdm", "true", name="plain")
        plain = terminal.seen()
    assert re.findall(r"^step (\d)/3", plain.text, re.M) == ["1", "3"]
    assert "\r" not in "".join(plain.states)


def test_an_error_comes_below_the_bar(base, mixed_json, media, tmp_path, monkeypatch):
    before_each_loss(monkeypatch, lambda *given: poison(3, 0, *given))
    with on_terminal(monkeypatch, 100) as terminal:
        assert main(arguments(base, mixed_json, media, tmp_path / "run", "--max_steps", "4")) == 1
        lines = terminal.seen().text.splitlines()
    place = next(place for place, line in enumerate(lines) if line.startswith("2/4  "))
    assert re.match(r"error: .*step 3: the loss is not finite", lines[place + 1] + lines[place + 2])


def test_the_first_line_comes_before_the_heavy_imports(base, mixed_json, tmp_path):
    """The import of torch here takes a second, and then fails."""
    code = """
import sys, time
from vlft.cli.main import main

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "transformers", "safetensors"):
            time.sleep(0.9)
            print("HEAVY", file=sys.stderr)
            raise ImportError(name)

sys.meta_path.insert(0, Slow())
main(sys.argv[1:])
"""
    for argv, said in (
        (
            ["train", "--model_id", str(base), "--data_path", str(mixed_json), "--output_dir", str(tmp_path / "run")],
            f"vlft train: {base}, language lora; rows of {mixed_json}; into {tmp_path / 'run'}\n",
        ),
        (["merge", "a", "b"], "vlft merge: a -> b\n"),
        (["chat", str(base), "hello"], f"vlft chat: {base}\n"),
    ):
        for rank in ("0", "1") if argv[0] == "train" else ("0",):
            command = [sys.executable, "-c", code, *argv]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"RANK": rank}, check=False)
            shown, rest = (done.stderr, done.stdout) if argv[0] == "chat" else (done.stdout, done.stderr)
            assert shown.startswith(said if rank == "0" else ""), (shown, rest)
            assert ("vlft train: " in done.stdout + done.stderr) == (argv[0] == "train" and rank == "0")
            assert "HEAVY" in done.stderr
