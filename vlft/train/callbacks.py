"""What happens at the beginning of an epoch, after a step and before the first one: callbacks for transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from vlft.data.order import RankBatches
from vlft.errors import Preempted
from vlft.train.ranks import gather
from vlft.train.signals import Notice


class SetEpoch(TrainerCallback):
    """Tells our batch sampler which epoch begins; accelerate's wrapper for skipped batches hides it from HF."""

    def __init__(self, sampler: RankBatches) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.set_epoch(state.global_step // self.sampler.order.steps)


class MakeRoom(TrainerCallback):
    """Saves and ends the run after the step in which a process was told to go."""

    def __init__(self, notice: Notice, path: Path) -> None:
        self.notice = notice
        self.path = path
        self.told: str | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.told = next((name for name in gather(self.notice.name) if name is not None), None)
        if self.told is not None:
            control.should_save = True
            # What is evaluated now decides which checkpoint is the best; else there is no time for it.
            control.should_evaluate = control.should_evaluate and args.load_best_model_at_end
            args.save_only_model = False  # such a checkpoint could not be gone on from

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.told is not None:
            name = self.path / f"checkpoint-{state.global_step}"
            stop = Preempted(f"{self.told} after step {state.global_step}, saved as {name}. The same command goes on.")
            stop.said = args.process_index != 0
            raise stop


class AtTheEnd(Exception):
    """The checkpoint that a run goes on from is of its last step."""


class StopAtTheEnd(TrainerCallback):
    """transformers asks whether a run is done only after one more step, where it begins in the middle of an epoch."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            raise AtTheEnd
