"""Callbacks for transformers' Trainer: at the beginning of training and of an epoch, and after a step."""

from __future__ import annotations

from typing import Any, NoReturn

from transformers import TrainerCallback

from vlft.data.order import RankBatches
from vlft.train.folder import RunFolder
from vlft.train.ranks import gather
from vlft.train.signals import RESUME, Notice, stopped


class SetEpoch(TrainerCallback):
    """Sets the epoch of our batch sampler, which accelerate's wrapper for skipped batches hides from the Trainer."""

    def __init__(self, sampler: RankBatches) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(state.global_step // self.sampler.order.steps)


class MakeRoom(TrainerCallback):
    """Saves and ends the run after the step in which a process received a signal to stop.

    An evaluation that was due after that step is postponed until the run resumes.

    Args:
        notice: the signals of this process.
        folder: the run folder.
        steps: optimizer steps of an epoch.
    """

    def __init__(self, notice: Notice, folder: RunFolder, *, steps: int) -> None:
        self.notice = notice
        self.folder = folder
        self.steps = steps
        self._signal: str | None = None  # the name of a signal that some rank received
        self._evaluated: int | None = None  # the step of the last evaluation

    def ask(self) -> bool:
        """Whether any process received a signal to stop. All ranks must call it at the same point."""
        if self._signal is None:
            self._signal = next((name for name in gather(self.notice.name) if name is not None), None)
        return self._signal is not None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.notice.postpone()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.ask():
            control.should_save = True
            self.folder.evaluation_due = control.should_evaluate or self._evaluation_to_come(args, state)
            control.should_evaluate = False
            args.save_only_model = False  # a run cannot resume from weights alone

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._evaluated = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._signal is None and (args.save_only_model or self._evaluation_to_come(args, state)):
            return  # a run cannot resume from weights alone, or an evaluation is still to come
        if self.ask():
            self.end(args, state)

    def end(self, args: Any, state: Any) -> NoReturn:
        """End the run, which has saved its checkpoint if it has completed a step.

        Raises:
            Preempted: always; on rank 0 it carries the message to the user.
        """
        name = self.folder.path / f"checkpoint-{state.global_step}"
        where = f"after step {state.global_step}, saved as {name}. {RESUME}"
        if not state.global_step:
            where = f"before the first step, so there is nothing to save. {self.notice.kept()}"
        stop = stopped(str(self._signal), where)
        stop.said = args.process_index != 0
        raise stop

    def _evaluation_to_come(self, args: Any, state: Any) -> bool:
        """Whether this step ends an epoch, and the evaluation at the end of the epoch has not run yet."""
        ends = args.eval_strategy == "epoch" and state.global_step % self.steps == 0
        return ends and self._evaluated != state.global_step


class EvaluationPutOff(Exception):
    """There is no time to evaluate: a process received a signal to stop."""


class AtTheEnd(Exception):
    """The checkpoint from which a run resumes was saved after its last step."""


class KeepToFlags(TrainerCallback):
    """Recomputes from the flags the steps at which to log, evaluate and save; transformers takes them from the
    checkpoint.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)


class StopAtTheEnd(TrainerCallback):
    """Ends a run that is done; transformers would train one more step if the run resumes in the middle of an epoch."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AtTheEnd
