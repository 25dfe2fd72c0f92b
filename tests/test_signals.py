"""A run that is told to go: before its first step, in a step, in an evaluation, while saving; and goes on as if not."""

from __future__ import annotations

import contextlib
import os
import signal

import pytest
from test_train import FULL, arguments, assert_same, lines, split, train

import vlft.train.run
from vlft.cli.main import main
from vlft.train.guard import StepGuard
from vlft.train.trainer import VlftTrainer

__all__ = ["train"]  # a fixture

#: Steps of 4 and 3 of the seven rows, two epochs.
STEPS = (*FULL, *split(1, 4), "--num_train_epochs", "2")


@pytest.fixture(autouse=True)
def _handlers():
    """A run that was told to go leaves its process deaf to further notices."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def told(base, mixed_json, media, tmp_path, capsys):
    """Run `vlft train`, which must end as told; returns what it says on stderr."""

    def run(*more: str) -> str:
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
        assert main(arguments(base, mixed_json, media, tmp_path / "run", *more)) == 75
        for number, handler in before.items():
            signal.signal(number, handler)
        return capsys.readouterr().err

    return run


def tell(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def test_before_the_first_step(told, train, monkeypatch):
    def measuring(*args, **kwargs):
        tell(signal.SIGUSR1)
        pytest.fail("goes on")

    with monkeypatch.context() as patch:
        patch.setattr(vlft.train.run, "training_rows", measuring)
        assert "stopped: SIGUSR1 before the first step, so there is nothing to save" in told(*STEPS)
    with monkeypatch.context() as patch:
        patch.setattr(vlft.train.run, "prepare_model", measuring)
        assert "before the first step" in told(*STEPS)
    assert [line["step"] for line in lines(train(*STEPS))] == [1, 2, 3, 4]


def test_a_notice_that_python_swallowed_is_still_acted_on(told, monkeypatch):
    real = vlft.train.run.prepare_model

    def load(*args, **kwargs):
        with contextlib.suppress(BaseException):
            tell()
        return real(*args, **kwargs)

    monkeypatch.setattr(vlft.train.run, "prepare_model", load)
    assert "SIGTERM before the first step" in told(*STEPS)


BEST = ("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--optim", "sgd")
EVERY_STEP = ("--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps", "--save_steps", "1")
IN_CI = (("steps", "evaluating"), ("epoch", "training"), ("epoch", "saving"), ("end", "training"))
EVERY_EPOCH = ("--eval_strategy", "epoch", "--save_strategy", "epoch")


@pytest.mark.parametrize(
    ("evaluated", "step", "when"),
    [
        pytest.param(evaluated, step, when, id=f"{at}-{when}", marks=() if (at, when) in IN_CI else pytest.mark.grid)
        for at, evaluated, step in (("steps", EVERY_STEP, 3), ("epoch", EVERY_EPOCH, 2), ("end", EVERY_EPOCH, 4))
        for when in ("evaluating", "training", "saving")
    ],
)
def test_no_evaluation_is_lost(told, train, mixed_json, monkeypatch, when, evaluated, step):
    """The evaluation of the step is put off until the run goes on: the same lines, the same best checkpoint."""
    more = (*STEPS, "--eval_path", str(mixed_json), *evaluated, *BEST, "--learning_rate", "30")
    whole = train(*more, name="whole")

    cls, name, here = {
        "evaluating": (StepGuard, "evaluation", lambda guard: guard.step),
        "training": (VlftTrainer, "compute_loss", lambda trainer: trainer.state.global_step + 1),
        "saving": (VlftTrainer, "_save_checkpoint", lambda trainer: trainer.state.global_step),
    }[when]
    real = getattr(cls, name)

    def told_first(self, *args, **kwargs):
        if here(self) == step:
            tell()
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(cls, name, told_first)
        assert f"SIGTERM after step {step}, saved as" in told(*more)
    run = train(*more)
    keys = ("step", "epoch", "loss", "grad_norm", "eval_loss")
    assert [[line.get(key) for key in keys] for line in lines(run)] == [
        [line.get(key) for key in keys] for line in lines(whole)
    ]
    assert_same(run, whole, tolerance=0)


def test_an_evaluation_that_is_put_off_twice(told, train, mixed_json, monkeypatch):
    """The checkpoint is left as it is: its random numbers are those of the step, not of a process that just began."""
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
    """transformers would take the steps at which to log and save from the checkpoint."""
    real = VlftTrainer.compute_loss

    def told_in_step_2(self, *args, **kwargs):
        if self.state.global_step == 1:
            tell()
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(VlftTrainer, "compute_loss", told_in_step_2)
        told(*STEPS, "--save_strategy", "steps", "--save_steps", "4")
    run = train(*STEPS, "--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "2")
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert [line["grad_norm"] is not None for line in lines(run)] == [True] * 4  # logged with each checkpoint


def test_flags_that_a_checkpoint_brings_back_are_refused(told, base, mixed_json, media, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(vlft.train.run, "prepare_model", lambda *args, **kwargs: tell())
    told(*STEPS)
    argv = arguments(base, mixed_json, media, tmp_path / "run", *STEPS, "--adam_beta2", "0.95")
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "its optimizer is {'adam_beta1': 0.9, 'adam_beta2': 0.999" in said
    assert "'adam_beta2': 0.95" in said
