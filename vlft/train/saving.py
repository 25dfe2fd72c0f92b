"""The part of the trainer that saves and loads: a checkpoint is written atomically and read strictly.

It overrides these methods of transformers' Trainer. Each name exists in 5.17 and 5.23 (tests/test_borrowed.py):
- `_get_output_dir`, `_save_checkpoint`: a checkpoint is written to a staging folder and renamed into place.
- `_save`: the run folder writes weights or adapter, processor and record.
- `_load_from_checkpoint`, `_load_optimizer_and_scheduler`, `_load_best_model`: strict. The stock methods load nothing
  into a full Qwen2-VL and only warn, and they ignore missing state files.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from vlft.errors import BadRow
from vlft.train.callbacks import MakeRoom
from vlft.train.folder import RunFolder
from vlft.train.metrics import Meter
from vlft.train.progress import Progress
from vlft.train.ranks import barrier, gather
from vlft.train.step_guard import StepGuard
from vlft.train.zero import ZeroTrainer


class SavingTrainer(ZeroTrainer):
    """The Trainer with our saving and loading. `VlftTrainer` sets the attributes."""

    folder: RunFolder
    guard: StepGuard
    meter: Meter
    progress: Progress
    room: MakeRoom
    save_total_limit: int | None
    skipped: dict[tuple[str, int], BadRow]
    _last_logged: int

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder.staging if self.folder.saving else self.folder.path)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        """Write the stock checkpoint to the staging folder, and rename it into place when every rank is done."""
        if self.state.global_step > self._last_logged:
            self.log({"loss": 0.0})  # writes the counts up to the checkpoint, which a resumed run would otherwise miss
        name = f"checkpoint-{self.state.global_step}"
        with self.progress.aside("checkpoint", self.state.global_step, doing=f"saving {name}"):
            self._write_checkpoint(name, model, trial)

    def _write_checkpoint(self, name: str, model: torch.nn.Module, trial: Any) -> None:
        start = time.perf_counter()
        self.guard.watchdog.at(f"saving {name}", patience=self.guard.args.saving_patience)
        self.folder.begin_checkpoint(writer=self.args.should_save)
        try:
            with self.room.notice.planning("stopping once this checkpoint is saved"):
                super()._save_checkpoint(model, trial)
        finally:
            self.folder.saving = False
        self._name_best()
        barrier()
        if self.args.local_process_index == 0 and self.args.process_index != 0:
            self.folder.sync(name)  # a node flushes its own files, which may still be in its memory
        skipped = self.all_skipped()
        if self.args.should_save:
            self.state.save_to_json(str(self.folder.staging / name / "trainer_state.json"))
            self.folder.commit_checkpoint(name, skipped)
            self.folder.drop_old(self.save_total_limit, self.state.best_model_checkpoint)
        barrier()
        self.meter.exclude(time.perf_counter() - start, "saving")

    def _name_best(self) -> None:
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (self.folder.path / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(self.folder.path / f"checkpoint-{best}")

    def all_skipped(self) -> list[BadRow]:
        """Rows of every rank that were refused during training. Every rank must call it."""
        return [row for rank in gather(self.skipped) for row in rank.values()]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.folder.write_weights(Path(output_dir or self.folder.path), self.model, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.folder.read_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        # transformers 5.17 cannot read them in a group of CPU processes ("cpu:0"); later versions can.
        parts: tuple[tuple[str, Any], ...] = (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler))
        for name, part in parts:
            part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        self.folder.read_weights(Path(str(self.state.best_model_checkpoint)), self.model)
