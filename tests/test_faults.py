"""What a run does when something breaks in the middle: what the user sees, what is kept, and that it can resume."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import time
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
from conftest import row
from launch import vlft as vlft_process
from mishaps import (
    before_each_loss,
    fail,
    kill,
    kill_beside_full_pipes,
    limit_files,
    notify,
    poison,
    press,
    remove,
    stall,
)
from runs import FULL, STRATEGIES, VISION_LORA, arguments, assert_same, lines, split, weights
from torch.utils.data import get_worker_info

from vlft.check.row import RowCheck
from vlft.cli.main import main
from vlft.data import dataset
from vlft.data.dataset import RowDataset
from vlft.data.order import RowOrder
from vlft.objectives import Objective
from vlft.train.watchdog import Watchdog

SAVE = ("--save_strategy", "steps", "--save_steps", "1")


@pytest.fixture
def refused(base, mixed_json, media, tmp_path, capsys):
    """Run `vlft train`, which must end with this status; returns its stderr."""

    def run(*more: str, status: int = 1, name: str = "run") -> str:
        capsys.readouterr()
        assert main(arguments(base, mixed_json, media, tmp_path / name, *more)) == status
        return capsys.readouterr().err

    return run


# ---- a loss that is not finite


def spoil(monkeypatch, step: int, index: int | None, *, loss: float = float("nan"), gradient: bool = False) -> None:
    """In that step, the loss (or only its gradient) of the micro-batch that holds this row is spoiled."""

    class Spoiled(Objective):
        """One loss of the run's objective, which then takes its place again."""

        def __init__(self, trainer):
            self.trainer, self.whole = trainer, trainer.objective

        def weight(self, batch):
            return self.whole.weight(batch)

        def loss(self, model, batch):
            self.trainer.objective = self.whole
            found = self.whole.loss(model, batch)
            if gradient:
                found.sum.register_hook(lambda grad: grad * loss)
                return found
            return found._replace(sum=found.sum * loss)

    def act(trainer, batch):
        if trainer.state.global_step + 1 == step and index in [i for _, i in batch["rows"]]:
            trainer.objective = Spoiled(trainer)

    before_each_loss(monkeypatch, act)


ONE_EPOCH = ("--num_train_epochs", "1")
#: Steps of 3, 3 and 1 of the seven rows.
STEPS = (*split(1, 3), *ONE_EPOCH)


def order(run: Path) -> list[int]:
    """Row indices in the order of the first epoch."""
    record = json.loads((run / "vlft.json").read_text())["training"]
    return RowOrder(rows=7, rows_per_step=3, accumulation=3, seed=record["seed"]).epoch(0)


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_and_names_its_rows(
    train, refused, mixed_json, tmp_path, monkeypatch, gradient
):
    whole = train(*FULL, *STEPS, name="whole")
    bad = order(whole)[4]  # the second micro-batch of the second step
    with monkeypatch.context() as patch:
        spoil(patch, 2, bad, gradient=gradient)
        said = refused(*FULL, *STEPS, *SAVE)
    if gradient:
        assert "step 2: the gradient (norm nan) is not finite" in said
        assert said.count(str(mixed_json)) == 3, "all rows of the step"
    else:
        assert "step 2: the loss is not finite" in said
        assert f"rank 0, micro-batch 2 of 3: {mixed_json}[{bad}]: loss nan" in said
        assert said.count(str(mixed_json)) == 1
    assert f"{tmp_path / 'run' / 'checkpoint-1'}. Run the same command again to resume from it" in said
    assert len(lines(tmp_path / "run")) == 1
    assert_same(train(*FULL, *STEPS, *SAVE), whole)


@pytest.mark.parametrize("towers", [FULL, VISION_LORA], ids=["full", "vision-lora"])
def test_a_step_that_is_not_finite_can_be_left_out(train, monkeypatch, capsys, towers):
    whole = train(
        *towers,
        *STEPS,
        "--max_steps",
        "1",
        name="whole",
    )
    with monkeypatch.context() as patch:
        spoil(patch, 2, order(whole)[4], loss=float("inf"))
        run = train(
            *towers, *STEPS, "--max_steps", "2", "--max_nonfinite_steps", "1", "--lr_scheduler_type", "constant"
        )
    said = capsys.readouterr().out
    assert "step 2: the loss is not finite" in said
    assert "no weight moved (1 so far)" in said
    assert "step 2/2  loss left out" in said
    _, second = lines(run)
    assert (second["loss"], second["samples"]) == (None, 0)
    assert json.loads((run / "vlft.json").read_text())["training"]["left_out_steps"] == [2]
    one, two = weights(whole), weights(run)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_so_many_steps_are_left_out_and_no_more(train, refused, monkeypatch):
    rows = order(train(*STEPS, name="whole"))
    spoil(monkeypatch, 2, rows[3])
    spoil(monkeypatch, 3, rows[6])
    said = refused(*STEPS, "--max_nonfinite_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
    assert "step 3: the loss is not finite" in said
    assert "1 steps were left out before it" in said


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_with_a_loss_of_nan_ends_all_with_one_message(base, mixed_json, media, tmp_path, strategy):
    """DeepSpeed returns -1 or None as the norm of such a gradient."""
    argv = arguments(base, mixed_json, media, tmp_path / "run", *split(1, 1), *SAVE, *strategy)
    ranks = vlft_process(argv, world=2, out=tmp_path, during=[partial(poison, 2, 1)])
    assert [rank.status for rank in ranks] == [1, 1], ranks[0].output[-3000:]
    said = "".join(rank.output for rank in ranks)
    assert said.count("error: ") == 1
    assert "step 2: the loss is not finite" in said
    assert re.search(r"rank 1, micro-batch 1 of 1: .*mixed.json\[\d\]: loss nan", said)
    assert "checkpoint-1. Run the same command again to resume" in said


@pytest.mark.distributed
def test_what_cannot_be_left_out_under_deepspeed_is_refused(base, mixed_json, media, tmp_path):
    more = ("--deepspeed", "zero2", "--max_nonfinite_steps", "3")
    (rank,) = vlft_process(arguments(base, mixed_json, media, tmp_path / "run", *more), out=tmp_path)
    assert rank.status == 1
    assert "--max_nonfinite_steps 3 has no effect with --deepspeed" in rank.output


# ---- memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
    ids=["gpu", "cpu"],
)
def test_out_of_memory_names_the_rows_and_what_helps(train, refused, mixed_json, monkeypatch, error):
    rows = order(train(*STEPS, name="whole"))

    def full(trainer, batch):
        if rows[4] in [i for _, i in batch["rows"]]:
            raise error

    before_each_loss(monkeypatch, full)
    said = refused(*STEPS, *SAVE)
    assert f"out of memory in step 2, rank 0, micro-batch 2 of 3: {mixed_json}[{rows[4]}]; " in said
    assert re.search(r"[1-9]\d* tokens, \d+ patches", said)
    assert "--gradient_checkpointing true (the run can resume with it)" in said
    assert "checkpoint-1. Run the same command again to resume" in said
    monkeypatch.undo()
    train(*STEPS, *SAVE, "--gradient_checkpointing", "true")  # so it does


# ---- loader


def test_a_loader_process_that_is_killed(train, refused, monkeypatch):
    def kill_workers(trainer, batch):
        if trainer.state.global_step == 1:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGKILL)
            time.sleep(1)

    before_each_loss(monkeypatch, kill_workers)
    # Few batches are prefetched, so that the next one is missing.
    said = refused(*split(1, 1), *SAVE, "--dataloader_num_workers", "1", "--dataloader_prefetch_factor", "1")
    assert "a loader process was ended by Killed" in said
    assert "lower --dataloader_num_workers (1 a process now)" in said
    assert "checkpoint-1. Run the same command again to resume" in said


@pytest.mark.distributed
def test_a_picture_that_vanished_ends_every_process_with_one_message(base, media, mixed_json, tmp_path):
    """One rank meets it. The other rank does not wait for a day, and does not repeat the message."""
    own = tmp_path / "media"
    shutil.copytree(media, own)
    out = tmp_path / "run"
    argv = arguments(base, mixed_json, own, out, *split(1, 1), *SAVE)
    ranks = vlft_process(argv, world=2, out=tmp_path, during=[partial(remove, 2, str(own / "coffee.jpg"))])
    assert [rank.status for rank in ranks] == [1, 1], ranks[1].output[-2000:]
    said = "".join(rank.output for rank in ranks)
    assert said.count("error:") == 1
    assert "coffee.jpg" in said
    assert "Traceback" not in said


# ---- disk


@pytest.mark.distributed
def test_a_disk_that_fills_up_while_saving(train, base, mixed_json, media, tmp_path):
    """RLIMIT_FSIZE imitates a full disk: writing past it is an error."""
    out = tmp_path / "run"
    argv = arguments(base, mixed_json, media, out, *FULL, *STEPS, *SAVE)
    (rank,) = vlft_process(argv, out=tmp_path, during=[partial(limit_files, 2, 200_000)])
    assert rank.status == 1, rank.output[-3000:]
    assert f"{out}: the disk is full" in rank.output
    assert "checkpoint-1. Run the same command again to resume" in rank.output
    assert "Traceback" not in rank.output
    assert sorted(p.name for p in out.iterdir() if "check" in p.name or "sav" in p.name) == ["checkpoint-1"]
    (rank,) = vlft_process(argv, out=tmp_path)
    assert rank.status == 0
    assert_same(out, train(*FULL, *STEPS, name="whole"))


# ---- a scheduler that preempts the run


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world", "number"),
    [
        (1, signal.SIGTERM),
        (1, signal.SIGUSR1),
        (2, signal.SIGTERM),
        # Two processes agree on the step in the same way for every signal.
        pytest.param(2, signal.SIGUSR1, marks=pytest.mark.grid),
    ],
)
def test_a_signal_saves_and_ends_with_a_status_to_requeue_on(train, base, mixed_json, media, tmp_path, number, world):
    """One process of the run receives the signal during an accumulation, and no checkpoint was due."""
    out = tmp_path / "run"
    argv = arguments(base, mixed_json, media, out, *FULL, "--packing", "false", "--global_batch", "4",
                     "--dataloader_num_workers", "1")  # fmt: skip
    ranks = vlft_process(argv, world=world, out=tmp_path, during=[partial(notify, 2, number, 0)])
    assert [rank.status for rank in ranks] == [75] * world, ranks[0].output[-3000:]
    said = "".join(rank.output for rank in ranks)
    assert said.count("stopped: ") == 1
    assert f"{number.name} after step 2, saved as {out / 'checkpoint-2'}. Run the same command again to resume." in said
    ranks = vlft_process(argv, world=world, out=tmp_path)
    assert [rank.status for rank in ranks] == [0] * world
    assert_same(out, train(*FULL, "--global_batch", "4", name="whole"))


@pytest.mark.distributed
def test_a_process_that_is_killed_takes_the_others_along(base, mixed_json, media, tmp_path):
    argv = arguments(base, mixed_json, media, tmp_path / "run", *split(1, 1), *SAVE)
    survivor, killed = vlft_process(argv, world=2, out=tmp_path, during=[partial(kill, 2, 1)])
    assert killed.status == -signal.SIGKILL
    assert survivor.status == 1, survivor.output[-3000:]
    assert "error: another process of this run has ended" in survivor.output
    assert "Traceback" not in survivor.output


# ---- a process that stalls


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["loss", "rows"])
def test_an_error_beside_live_loader_processes_ends_the_run(base, mixed_json, media, tmp_path, where):
    """Some workers wait, some are in the middle of a row; an error in our code keeps its traceback."""
    argv = arguments(base, mixed_json, media, tmp_path / "run", *split(1, 1), "--dataloader_num_workers", "4")
    acts, inside = {"loss": ([partial(fail, 2)], _rows_that_take_long), "rows": ([], _rows_that_fail)}[where]
    (rank,) = vlft_process(argv, out=tmp_path, during=acts, inside=inside, exits=True, timeout=60)
    assert rank.status == 99, rank.output[-3000:]
    assert "ZeroDivisionError: planted" in rank.output
    assert rank.lingered < 5
    _assert_gone(re.findall(r"^WORKER (\d+)$", rank.output, re.M), many=2)


def _rows_that_take_long() -> None:
    RowDataset.__getitems__ = partialmethod(_slow, RowDataset.__getitems__)


def _slow(self, real, index: int):
    print(f"WORKER {os.getpid()}\n", end="", flush=True)
    if get_worker_info().id > 1:
        time.sleep(60)
    return real(self, index)


def _rows_that_fail() -> None:
    RowDataset.__getitems__ = _broken


def _broken(self, index: int):
    print(f"WORKER {os.getpid()}\n", end="", flush=True)
    raise ZeroDivisionError("planted")


def _assert_gone(pids: list[str], *, many: int) -> None:
    assert len(set(pids)) >= many, pids
    until = time.monotonic() + 5
    while (left := [pid for pid in pids if Path("/proc", pid).exists()]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


@pytest.mark.distributed
def test_a_second_ctrl_c_ends_a_run_at_once(base, mixed_json, media, tmp_path):
    out = tmp_path / "run"
    argv = arguments(base, mixed_json, media, out, *split(1, 1), *SAVE, "--dataloader_num_workers", "2")
    act = partial(press, 2, 2)
    (rank,) = vlft_process(argv, out=tmp_path, during=[act], inside=_rows_that_are_named, exits=True, timeout=60)
    assert rank.status == 130, rank.output[-3000:]
    first, _, second = rank.output.partition("Ctrl-C: stopping after this step, then saving (Ctrl-C again: stop now ")
    assert re.search(r"step +1/", first)
    assert f"stopped at once (Ctrl-C twice). The last good checkpoint is {out / 'checkpoint-1'}. Run the sa" in second
    assert "Traceback" not in rank.output
    assert rank.lingered < 1
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-1"]
    _assert_gone(re.findall(r"^WORKER (\d+)$", rank.output, re.M), many=2)


def _rows_that_are_named() -> None:
    RowDataset.__getitems__ = partialmethod(_named, RowDataset.__getitems__)


def _named(self, real, index: int):
    print(f"WORKER {os.getpid()}\n", end="", flush=True)
    return real(self, index)


@pytest.mark.distributed
def test_ctrl_c_in_check_data_keeps_what_was_checked(media, tmp_path):
    rows = [row(f"No, {i}.", f"<image>\nIs it {i}?", image="coffee.jpg") for i in range(200)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    argv = ["check-data", str(tmp_path / "rows.json"), "--image_folder", str(media), "--workers", "2"]
    log = tmp_path / "rank0.log"

    def interrupt(processes: list) -> None:
        while processes[0].is_alive() and not (log.exists() and "WORKER" in log.read_text()):
            time.sleep(0.05)
        time.sleep(1)
        os.kill(processes[0].pid, signal.SIGINT)

    ended = {"out": tmp_path, "inside": _looks_that_take_long, "exits": True, "timeout": 60}
    (check,) = vlft_process(argv, while_running=interrupt, **ended, env={"VLFT_COST_CACHE": str(tmp_path / "cache")})
    assert check.status == 130, check.output
    said = [line for line in check.output.splitlines() if line and not line.startswith("WORKER")]
    assert said == ["stopped: Ctrl-C. The results so far are saved. Run the same command again to resume."]
    assert check.lingered < 2
    _assert_gone(re.findall(r"^WORKER (\d+)$", check.output, re.M), many=2)
    (kept,) = (tmp_path / "cache").glob("*.sqlite")
    with contextlib.closing(sqlite3.connect(kept)) as file:
        assert file.execute("SELECT count(*) FROM kept").fetchone()[0] >= 4


def _looks_that_take_long() -> None:
    dataset.SHORT = 0
    RowCheck.__call__ = partialmethod(_look, RowCheck.__call__)


def _look(self, real, sample):
    print(f"WORKER {os.getpid()}\n", end="", flush=True)
    time.sleep(0.1)
    return real(self, sample)


@pytest.mark.distributed
def test_loader_processes_end_with_the_trainer(base, mixed_json, media, tmp_path):
    argv = arguments(base, mixed_json, media, tmp_path / "run", *FULL, "--dataloader_num_workers", "2")
    (killed,) = vlft_process(argv, out=tmp_path, during=[partial(kill_beside_full_pipes, 1)])
    assert killed.status == -signal.SIGKILL
    workers = re.search(r"^WORKERS (\d+) (\d+)$", killed.output, re.M)
    assert workers, killed.output
    end = time.monotonic() + 20
    left = {int(pid) for pid in workers.groups()}
    while left and time.monotonic() < end:
        time.sleep(0.2)
        left = {pid for pid in left if Path(f"/proc/{pid}").exists()}
    assert not left


@pytest.mark.distributed
def test_a_stalled_process_is_found_and_the_job_ends(base, mixed_json, media, tmp_path):
    argv = arguments(base, mixed_json, media, tmp_path / "run", *split(1, 1), *SAVE, "--stall_timeout", "6")
    began = time.monotonic()
    ranks = vlft_process(argv, world=2, out=tmp_path, during=[partial(stall, 3, 1)])
    assert time.monotonic() - began < 120
    assert all(rank.status not in (0, None) for rank in ranks)
    said = "".join(rank.output for rank in ranks)
    place = (
        r"rank 1: step 3, micro-batch 1 of 1, forward, for \d+ s, rows .*mixed.json\[\d\]   <- the others wait for it"
    )
    assert re.search(place, said), said
    assert re.search(r"rank 0: step 3, .*for \d+ s", said)
    assert "where rank 1 is in its code:" in said
    assert "compute_loss" in said
    assert "checkpoint-2. Run the same command again to resume" in said


def test_the_watchdog_is_quiet_while_something_moves():
    ended = []
    with Watchdog(1.2, end=lambda: ended.append(True)) as watchdog:  # a busy machine sleeps longer than asked
        for i in range(7):
            watchdog.at(f"place {i}")
            time.sleep(0.2)
        assert not ended
        watchdog.at("saving", patience=4)
        time.sleep(1.5)
        assert not ended


def test_the_watchdog_ends_what_stands_still(capfd):
    ended = []
    with Watchdog(0.2, end=lambda: ended.append(True), advice=lambda: "Do this.") as watchdog:
        watchdog.at("step 7, waiting for data", ["a.json[3]"])
        time.sleep(0.8)
    said = capfd.readouterr().err
    assert ended == [True]
    assert "rank 0: step 7, waiting for data, for 0 s, rows a.json[3]" in said
    assert "Do this." in said
    assert "test_the_watchdog_ends_what_stands_still" in said, "where the code is"
