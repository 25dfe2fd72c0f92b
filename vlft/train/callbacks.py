"""What happens at the beginning of an epoch, after a step and before the first one: callbacks for transformers."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import TrainerCallback

from vlft.data.order import RankBatches
from vlft.train.folder import RunFolder
from vlft.train.ranks import gather
from vlft.train.signals import RESUME, Notice, stopped


class SetEpoch(TrainerCallback):
    """Tells our batch sampler which epoch begins; accelerate's wrapper for skipped batches hides it from HF."""

    def __init__(self, sampler: RankBatches) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(state.global_step // self.sampler.order.steps)


class MakeRoom(TrainerCallback):
    """Saves and ends the run after the step in which a process was told to go; what was to be evaluated then is put off
    until the run goes on.

    Args:
        notice: of this process.
        folder: of the run.
        steps: of an epoch.
    """

    def __init__(self, notice: Notice, folder: RunFolder, *, steps: int) -> None:
        self.notice = notice
        self.folder = folder
        self.steps = steps
        self.told: str | None = None
        self._evaluated: int | None = None  # the step of the last evaluation

    def ask(self) -> bool:
        """Whether a process was told to go; every rank asks at the same time."""
        if self.told is None:
            self.told = next((name for name in gather(self.notice.name) if name is not None), None)
        return self.told is not None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.notice.postpone()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ask():
            control.should_save = True
            self.folder.evaluation_due = control.should_evaluate or self._evaluation_to_come(args, state)
            control.should_evaluate = False
            args.save_only_model = False  # such a checkpoint could not be gone on from

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluated = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.told is None and (args.save_only_model or self._evaluation_to_come(args, state)):
            return  # not to be gone on from, or there is something to evaluate yet
        if self.ask():
            self.end(args, state)

    def end(self, args: Any, state: Any) -> NoReturn:
        """End the run, which has saved what it did."""
        name = self.folder.path / f"checkpoint-{state.global_step}"
        where = f"after step {state.global_step}, saved as {name}" if state.global_step else "before the first step"
        stop = stopped(str(self.told), f"{where}. {RESUME}")
        stop.said = args.process_index != 0
        raise stop

    def _evaluation_to_come(self, args: Any, state: Any) -> bool:
        """Whether this step is the last of an epoch that is to be evaluated at its end."""
        ends = args.eval_strategy == "epoch" and state.global_step % self.steps == 0
        return ends and self._evaluated != state.global_step


class EvaluationPutOff(Exception):
    """There is no time to evaluate: a process was told to go."""


class AtTheEnd(Exception):
    """The checkpoint that a run goes on from is of its last step."""


class KeepToFlags(TrainerCallback):
    """transformers takes the steps at which to log, evaluate and save from the checkpoint, whatever the flags say."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class StopAtTheEnd(TrainerCallback):
    """transformers asks whether a run is done only after one more step, where it begins in the middle of an epoch."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AtTheEnd
