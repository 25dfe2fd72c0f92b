"""Rewards of `--method grpo`: their names, what they compute, and that none hangs or breaks a run unseen."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vlft.config.rewards import read_rewards
from vlft.errors import ConfigError, RunFault
from vlft.train.grpo.rewards import Rewards

GOOD = """
import os
from beside import scale

print("a line on stdout")

def length(completions, answer, trainer_state, log_metric, **columns):
    log_metric("longest", max(len(one[0]["content"]) for one in completions))
    return [len(one[0]["content"]) * scale + trainer_state.global_step for one in completions]

def process(completions, **columns):
    return [float(os.getpid()) for _ in completions]

def size(one):
    return float(len(one[0]["content"]))

def forks(completions, **columns):
    from multiprocessing import get_context
    with get_context("fork").Pool(2) as pool:
        return pool.map(size, completions)

def spawns(completions, **columns):
    from multiprocessing import get_context
    with get_context("spawn").Pool(1) as pool:
        return pool.map(size, completions)

def columns(completions, **columns):
    assert sorted(columns) == [
        "answer", "completion_ids", "file", "full_answer", "id", "image_paths", "index", "log_extra",
        "log_metric", "prompts", "trainer_state",
    ], sorted(columns)
    return [float(index) for index in columns["index"]]
"""
BAD = """
import os
import time

def raises(completions, **columns):
    return [1 / (one[0]["content"] != "b") for one in completions]

def few(completions, **columns):
    return [1.0]

def nan(completions, **columns):
    return [float("nan") if one[0]["content"] == "b" else 1.0 for one in completions]

def none(completions, **columns):
    return [None if one[0]["content"] == "b" else 1 for one in completions]

def number(completions, **columns):
    return 3.0

def words(completions, **columns):
    return ["good" for one in completions]

def hangs(completions, **columns):
    while True:
        pass

def exits(completions, **columns):
    import sys
    sys.exit("bye")

def asks(completions, **columns):
    return [float(input()) for _ in completions]

def large(completions, **columns):
    return [1e39 if one[0]["content"] == "b" else 1.0 for one in completions]

def huge(completions, **columns):
    return [10**400 if one[0]["content"] == "b" else 1 for one in completions]

def logs(completions, log_metric, **columns):
    log_metric("mine", float("nan"))
    return [1.0 for _ in completions]

def in_c(completions, **columns):
    import re, subprocess
    print(subprocess.Popen(["sleep", "99"]).pid, file=open(os.environ["CHILD"], "w"), flush=True)
    re.match("(x+x+)+y", "x" * 60)

def dies(completions, **columns):
    import os
    os._exit(3)

async def later(completions, **columns):
    return [1.0 for one in completions]

def slowly(completions, **columns):
    time.sleep(0.4)
    raise KeyError("the first error")

def prints(completions, **columns):
    print("stuck at", end="")
    time.sleep(60)

def prints_and_dies(completions, **columns):
    print("the last words")
    os._exit(3)

def pairs(completions, **columns):
    import numpy
    return numpy.ones((len(completions), 2))

class Strange:
    def __repr__(self):
        raise ValueError("no text")

def strange(completions, **columns):
    return [Strange() for _ in completions]

class StrangeError(Exception):
    def __str__(self):
        raise ValueError("no text")

def strange_error(completions, **columns):
    raise StrangeError

def wordy(completions, **columns):
    raise ValueError("x" * 100_000)

def decimals(completions, **columns):
    from decimal import Decimal
    return [Decimal("0.5") for _ in completions]

def no_columns(completions):
    return [1.0 for _ in completions]

def of_solution(completions, solution, **columns):
    return [1.0 for _ in completions]
"""
ROWS = ("rows.json[4]", "rows.json[7]")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "beside.py").write_text("scale = 2\n")
    (folder / "good.py").write_text(GOOD)
    (folder / "bad.py").write_text(BAD)
    (folder / "broken.py").write_text("import nothing_of_this_name\n")
    (folder / "slow.py").write_text("import time\ntime.sleep(60)\n")
    return folder


@pytest.fixture(scope="module")
def bad(files):
    names = "raises,few,nan,none,number,words,exits,asks,large,huge,logs,pairs,strange,strange_error,wordy"
    with Rewards(read_rewards([f"{files / 'bad.py'}:{names}"]), timeout=20) as rewards:
        yield rewards


def asked(*completions: str, answer: tuple[str, ...] = ()) -> dict:
    many = len(completions)
    return {
        "prompts": [[{"role": "user", "content": "?"}]] * many,
        "completions": [[{"role": "assistant", "content": one}] for one in completions],
        "completion_ids": [[1, 2]] * many,
        "answer": list(answer or completions),
        "full_answer": list(answer or completions),
        "id": [None] * many,
        "file": ["rows.json"] * many,
        "index": [4, 7][:many],
        "image_paths": [[]] * many,
    }


def scores(rewards: Rewards, *completions: str, answer: tuple[str, ...] = ()) -> list[list[float]]:
    state = {"global_step": 2, "max_steps": 9, "epoch": 0.5}
    return [
        rewards.score(place, asked(*completions, answer=answer), rows=ROWS, state=state)["scores"]
        for place in range(len(rewards.names))
    ]


def test_built_in_rewards():
    words = ["exact_match,edit_ratio", "iou", r"format:<a>.*</a>"]
    with Rewards(read_rewards(words), timeout=20) as rewards:
        assert rewards.names == ("exact_match", "edit_ratio", "iou", "format")
        found = scores(rewards, "<a>[0, 0, 10, 10]</a>", "[0, 0, 10, 5]\n", answer=("[0, 0, 10, 5]", "[0, 0, 10, 5]"))
        assert found[0] == [0.0, 1.0]
        assert found[1] == pytest.approx([1 - 9 / 21, 1 - 1 / 14])  # "<a>", "</a>" and "10"; a new line
        assert found[2] == [0.5, 1.0]
        assert found[3] == [1.0, 0.0]
        with pytest.raises(RunFault, match=r"--reward iou, step 3: rows.json\[7\]: .*needs a box in its answer"):
            scores(rewards, "[0, 0, 1, 1]", "[0, 0, 1, 1]", answer=("[0, 0, 1, 1]", "a cat"))


def test_built_in_rewards_compare_without_thoughts():
    said = "<think>\nIt is\n</think>\n\nA [0, 0, 10, 10]", "<think>\nA [0, 0, 10, 10]"  # the second never ends
    right = "A [0, 0, 10, 10]", "<think>\nOther thoughts\n</think>\n\nA [0, 0, 10, 10]"
    with Rewards(read_rewards(["exact_match,edit_ratio,iou", r"format:<think>.*</think>.*"]), timeout=20) as rewards:
        assert scores(rewards, *said, answer=right) == [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]


def test_a_function_has_trls_signature_and_its_own_process(files, capfd, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with Rewards(read_rewards([f"{files / 'good.py'}:length,process,columns"]), timeout=20) as rewards:
        length, process, columns = scores(rewards, "four", "sixsix")
        assert length == [10.0, 14.0]
        assert process[0] == process[1] != os.getpid()
        assert columns == [4.0, 7.0]
        state = {"global_step": 0, "max_steps": 9, "epoch": 0.5}
        said = rewards.score(0, asked("four"), rows=ROWS[:1], state=state)
        assert said == {"scores": [8.0], "metrics": [["longest", 4.0]], "extra": []}
    assert "a line on stdout" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("raises", r"rows.json\[7\]: bad.py:6 raised ZeroDivisionError: .*\n  the completion: 'b'"),
        ("few", r"rows.json\[4\], rows.json\[7\]: returned 1 numbers for 2 completions. Return one for each"),
        ("nan", r"rows.json\[7\]: returned nan \(float\). Return a finite number for every completion"),
        ("none", r"rows.json\[7\]: returned None \(NoneType\)"),
        ("number", r"rows.json\[4\], rows.json\[7\]: returned 3.0 \(float\) instead of a list of 2 numbers"),
        ("words", r"rows.json\[4\]: returned 'good' \(str\)"),
        ("exits", r"rows.json\[4\]: bad.py:\d+ raised SystemExit: bye"),
        ("asks", r"rows.json\[4\]: bad.py:\d+ raised EOFError"),
        ("large", r"rows.json\[7\]: returned 1e\+39 \(float\). TRL compares rewards in float32"),
        ("huge", r"rows.json\[7\]: returned 10+... \(int\). TRL compares rewards in float32"),
        ("logs", r"rows.json\[4\]: .*ValueError: log_metric\('mine', nan\)"),
        ("pairs", r"rows.json\[4\]: returned array\(\[1., 1.\]\) \(ndarray\). Return a finite number"),
        ("strange", r"rows.json\[4\]: returned an object without a text \(Strange\)"),
        ("strange_error", r"rows.json\[4\]: bad.py:\d+ raised StrangeError: an object without a text"),
        ("wordy", r"rows.json\[4\]: bad.py:\d+ raised ValueError: x{1000} and 99,000 more characters"),
    ],
)
def test_what_is_no_number_names_the_row(bad, name, text):
    place = bad.names.index(name)
    with pytest.raises(RunFault, match=rf"--reward .*bad.py:{name}, step 3: {text}"):
        bad.score(place, asked("a", "b"), rows=ROWS, state={"global_step": 2, "max_steps": 9, "epoch": 0.5})


def test_a_reward_that_hangs_or_dies_ends_with_a_message(files):
    rewards = Rewards(read_rewards([f"{files / 'bad.py'}:hangs"]), timeout=0.5)
    start = time.monotonic()
    with pytest.raises(RunFault, match=r"hangs, step 3: scoring rows.json\[4\].* took longer than 0.5 s \(--reward_t"):
        scores(rewards, "a", "b")
    assert time.monotonic() - start < 5
    assert rewards._process.returncode is not None
    with (
        Rewards(read_rewards([f"{files / 'bad.py'}:dies"]), timeout=20) as rewards,
        pytest.raises(RunFault, match=r"the process of the rewards ended \(exit status 3\)"),
    ):
        scores(rewards, "a", "b")


def test_what_a_reward_prints_is_seen_before_it_is_ended(files, capfd, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    for name, timeout, text, printed in (
        ("prints", 0.5, "took longer than 0.5 s", "stuck at"),
        ("prints_and_dies", 20, "exit status 3.*What it printed stands above", "the last words"),
    ):
        with (
            Rewards(read_rewards([f"{files / 'bad.py'}:{name}"]), timeout=timeout) as rewards,
            pytest.raises(RunFault, match=text),
        ):
            scores(rewards, "a", "b")
        assert printed in capfd.readouterr().err


def test_the_first_error_is_reported_although_the_search_for_its_row_takes_too_long(files):
    with Rewards(read_rewards([f"{files / 'bad.py'}:slowly"]), timeout=0.6) as rewards:
        start = time.monotonic()
        with pytest.raises(
            RunFault, match=r"rows.json\[4\], rows.json\[7\]: bad.py:\d+ raised KeyError: 'the first error'"
        ):
            scores(rewards, "a", "b")
        assert time.monotonic() - start < 3


def test_decimals_are_numbers(files):
    with Rewards(read_rewards([f"{files / 'bad.py'}:decimals"]), timeout=20) as rewards:
        assert scores(rewards, "a", "b") == [[0.5, 0.5]]


def test_files_of_the_current_folder_do_not_replace_modules(files, tmp_path, monkeypatch):
    for name in ("numbers", "queue", "math"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not the one of Python')\n")
    (tmp_path / "mine_alone.py").write_text("import here\n\ndef one(completions, **columns):\n    return [here.X]\n")
    (tmp_path / "here.py").write_text("X = 3.0\n")
    monkeypatch.chdir(tmp_path)
    with Rewards(read_rewards(["exact_match", "mine_alone.py:one"]), timeout=20) as rewards:
        assert scores(rewards, "a") == [[1.0], [3.0]]


def test_a_reward_may_use_multiprocessing(files):
    with Rewards(read_rewards([f"{files / 'good.py'}:forks,spawns"]), timeout=20) as rewards:
        assert scores(rewards, "four", "sixsix") == [[4.0, 6.0], [4.0, 6.0]]


def gone(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("name", ["hangs", "in_c"])
def test_the_process_ends_with_the_run_that_started_it(files, name, tmp_path):
    text = (
        "import sys, os\n"
        "from vlft.config.rewards import read_rewards\n"
        "from vlft.train.grpo.rewards import Rewards\n"
        f"rewards = Rewards(read_rewards([{str(files / 'bad.py')!r} + ':{name}']), timeout=20)\n"
        'rewards._process.stdin.write(b\'{"reward": 0, "asked": {"completions": [1]}, "state": {}}\\n\')\n'
        "rewards._process.stdin.flush()\n"
        "print(rewards._process.pid, flush=True)\n"
        "import time\n"
        "time.sleep(1 if os.environ['CHILD'] else 0)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    child = tmp_path / "child"
    env = {**os.environ, "CHILD": str(child) if name == "in_c" else ""}
    done = subprocess.run([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, env=env)
    pids = [int(done.stdout), *([int(child.read_text())] if name == "in_c" else [])]
    for _ in range(100):
        if all(map(gone, pids)):
            return
        time.sleep(0.05)
    pytest.fail("a process of the rewards is still there")


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("broken.py:reward", r"it cannot be imported: broken.py:1 raised ModuleNotFoundError: .*nothing_of_this_name"),
        ("good.py:other", r"it has no function 'other'. Add `def other\(completions, \*\*columns\):`"),
        ("bad.py:later", r"later is declared with `async def`"),
        ("bad.py:no_columns", r"no_columns takes no .*Write `def no_columns\(completions, \*\*columns\):`"),
        (
            "bad.py:of_solution",
            r"of_solution asks for 'solution', and a row has no such column. It has answer, .*`solution` of "
            "TRL and `assistant` of Qwen2-VL-Finetune are `answer` here",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_at_the_start(files, word, text):
    with pytest.raises(ConfigError, match=rf"--reward .*{word}: {text}"):
        Rewards(read_rewards([str(files / word)]), timeout=20)


def test_a_file_that_takes_too_long_to_import(files, monkeypatch):
    monkeypatch.setattr("vlft.train.grpo.rewards.STARTING", 0.5)
    with pytest.raises(ConfigError, match=r"slow.py:reward: importing it took longer than 0.5 s"):
        Rewards(read_rewards([f"{files / 'slow.py'}:reward"]), timeout=0.1)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--method grpo needs --reward"),
        (["edit_distance"], "there is no such reward. Do you mean edit_ratio"),
        (["exact_match", "exact_match"], "--reward exact_match is given twice"),
        (["format:"], "a regular expression is missing"),
        (["format:(a"], "is no regular expression"),
        (["none.py:reward"], "there is no file"),
        (["none.py"], "name a function of the file: none.py:FUNCTION"),
        (["exact_match,"], "--reward exact_match,: a name is missing beside a comma. Write one comma"),
        (["format:a", "format:a"], "--reward format:a is given twice"),
        (["format:a{99999999999}"], "is no regular expression"),
        ([f"format:{'(' * 3000}"], "is no regular expression"),
    ],
)
def test_words_that_are_no_reward(words, text):
    with pytest.raises(ConfigError, match=text):
        read_rewards(words)


def test_rewards_of_the_same_name_get_names_of_their_own(files):
    one, two = files / "bad.py", files / "good.py"
    words = ["format:a", "format:b", f"{one}:same, other", f"{two}:same", f"{two}:iou", "iou , exact_match"]
    names = [reward.name for reward in read_rewards(words)]
    assert names == ["format", "format_2", "bad.same", "other", "good.same", "good.iou", "iou", "exact_match"]
