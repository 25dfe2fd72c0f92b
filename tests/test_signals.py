"""A run that receives a signal to stop, from a scheduler or by Ctrl-C: before its first step, in a step, in an
evaluation, while saving. It resumes with the same results. A second Ctrl-C ends any verb at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from functools import partial

import pytest
from mishaps import before_each_loss
from runs import FULL, arguments, assert_same, lines, split

import vlft.train.run
from vlft.cli.main import main
from vlft.train.step_guard import StepGuard
from vlft.train.trainer import VlftTrainer

#: Steps of 4 and 3 of the seven rows, two epochs.
STEPS = (*FULL, *split(1, 4), "--num_train_epochs", "2")


@pytest.fixture(autouse=True)
def _handlers():
    """Restores the signal handlers: a run that was stopped leaves its process ignoring further signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has what it starts in the background ignore it
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def told(base, mixed_json, media, tmp_path, capfd):
    """Run `vlft train`, which must end with this status; returns its stderr."""

    def run(*more: str, status: int = 75) -> str:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        assert main(arguments(base, mixed_json, media, tmp_path / "run", *more)) == status
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        for number, handler in before.items():
            signal.signal(number, handler)
        return capfd.readouterr().err

    return run


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)
    if number == signal.SIGINT:
        time.sleep(0.1)  # a thread prints the reaction to the signal


def test_before_the_first_step(told, train, monkeypatch):
    def measuring(number, *args, **kwargs):
        tell(number)
        pytest.fail("the code after the signal runs")

    for number, word, status in ((signal.SIGUSR1, "SIGUSR1", 75), (signal.SIGINT, "Ctrl-C", 130)):
        with monkeypatch.context() as patch:
            patch.setattr(vlft.train.run, "rows_of_run", partial(measuring, number))
            said = told(*STEPS, status=status)
            assert f"stopped: {word} before the first step, so there is nothing to save. The rows measured" in said
        with monkeypatch.context() as patch:
            patch.setattr(vlft.train.run, "prepare_model", partial(measuring, number))
            said = told(*STEPS, status=status)
            assert f"{word} before the first step" in said
            assert "There is no checkpoint yet: run the same command again to start over." in said
    assert [line["step"] for line in lines(train(*STEPS))] == [1, 2, 3, 4]


@pytest.mark.parametrize("swallowed", [True, False])
def test_a_notice_that_a_library_caught_is_still_acted_on(told, monkeypatch, swallowed):
    real = vlft.train.run.prepare_model

    def load(*args, **kwargs):
        with contextlib.suppress(BaseException):
            tell()
        if swallowed:
            return real(*args, **kwargs)
        raise RuntimeError("cannot be imported")  # as transformers has it where an import ends in an error

    monkeypatch.setattr(vlft.train.run, "prepare_model", load)
    assert "SIGTERM before the first step" in told(*STEPS)


BEST = ("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--optim", "sgd")
EVERY_STEP = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
IN_CI = (
    ("steps", "evaluating", signal.SIGINT),
    ("epoch", "training", signal.SIGTERM),
    ("epoch", "saving", signal.SIGTERM),
    ("end", "training", signal.SIGINT),
)
EVERY_EPOCH = ("--eval_strategy", "epoch", "--save_strategy", "epoch")


HEARD = {
    "evaluating": "postponing this evaluation, then saving",
    "training": "stopping after this step, then saving",
    "saving": "stopping once this checkpoint is saved",
}


@pytest.mark.parametrize(
    ("number", "evaluated", "step", "when"),
    [
        pytest.param(
            number, evaluated, step, when, id=f"{at}-{when}-{number.name}",
            marks=() if (at, when, number) in IN_CI else pytest.mark.grid,
        )
        for at, evaluated, step in (("steps", EVERY_STEP, 3), ("epoch", EVERY_EPOCH, 2), ("end", EVERY_EPOCH, 4))
        for when in ("evaluating", "training", "saving")
        for number in (signal.SIGTERM, signal.SIGINT)
    ],
)  # fmt: skip
def test_no_evaluation_is_lost(told, train, mixed_json, monkeypatch, number, when, evaluated, step):
    """The evaluation of the step is postponed until the run resumes: the same lines, the same best checkpoint."""
    more = (*STEPS, "--eval_path", str(mixed_json), *evaluated, *BEST, "--learning_rate", "30")
    whole = train(*more, name="whole")

    numbers = [number]  # once: a second Ctrl-C would end this process

    def tell_in(now: int) -> None:
        if now == step and numbers:
            tell(numbers.pop())

    def told_first(cls, name, here):
        real = getattr(cls, name)
        return lambda self, *args, **kwargs: tell_in(here(self)) or real(self, *args, **kwargs)

    word, status = {signal.SIGTERM: ("SIGTERM", 75), signal.SIGINT: ("Ctrl-C", 130)}[number]
    with monkeypatch.context() as patch:
        if when == "training":
            before_each_loss(patch, lambda trainer, _: tell_in(trainer.state.global_step + 1))
        elif when == "evaluating":
            patch.setattr(StepGuard, "evaluation", told_first(StepGuard, "evaluation", lambda guard: guard.step))
        else:
            patch.setattr(VlftTrainer, "_save", told_first(VlftTrainer, "_save", lambda one: one.state.global_step))
        said = told(*more, status=status)
    assert f"{word} after step {step}, saved as" in said
    assert f"checkpoint-{step}. Run the same command again to resume." in said
    assert f"{word}: {HEARD[when]}" in said
    run = train(*more)
    keys = ("step", "epoch", "loss", "grad_norm", "eval_loss")
    assert [[line.get(key) for key in keys] for line in lines(run)] == [
        [line.get(key) for key in keys] for line in lines(whole)
    ]
    assert_same(run, whole, tolerance=0)


@pytest.mark.grid
def test_an_evaluation_that_is_put_off_twice(told, train, mixed_json, monkeypatch):
    """The checkpoint does not change: its random state is that of the step, not of a process that just started."""
    more = (*STEPS[6:], "--vision", "lora", "--merger", "lora", "--language", "lora", "--lora_dropout", "0.5",
            "--eval_path", str(mixed_json), *EVERY_STEP)  # fmt: skip
    whole = train(*more, name="whole")
    real = StepGuard.evaluation

    def told_first(self, *args, **kwargs):
        tell()
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StepGuard, "evaluation", told_first)
        assert "after step 1, saved as" in told(*more)
        assert "after step 1, saved as" in told(*more)
    run = train(*more)
    assert [line["step"] for line in lines(run)] == [line["step"] for line in lines(whole)]
    assert_same(run, whole, tolerance=0)


def test_flags_that_may_change_act_when_a_run_goes_on(train, told, monkeypatch):
    """transformers would read the steps at which to log and save from the checkpoint."""
    with monkeypatch.context() as patch:
        before_each_loss(patch, lambda trainer, _: tell() if trainer.state.global_step == 1 else None)
        told(*STEPS, "--save_strategy", "steps", "--save_steps", "4")
    run = train(*STEPS, "--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "2")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert [line["grad_norm"] is not None for line in lines(run)] == [True] * 4  # logged with each checkpoint


def test_flags_that_a_checkpoint_brings_back_are_refused(train, base, mixed_json, media, tmp_path, capfd):
    train(*STEPS)
    argv = arguments(base, mixed_json, media, tmp_path / "run", *STEPS, "--adam_beta2", "0.95")
    assert main(argv) == 1
    said = capfd.readouterr().err
    assert "its optimizer is adam_beta2 0.999, this run's is adam_beta2 0.95. Choose" in said
    assert "adam_beta2 0.95" in said
