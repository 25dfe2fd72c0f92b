"""The end of a run: its weights, its best evaluation and why it stopped go into the run folder."""

from __future__ import annotations

from typing import Any

from vlft.checkpoint.best import STOPPED, best_by
from vlft.train import zero
from vlft.train.folder import RunFolder
from vlft.train.ranks import barrier
from vlft.train.result import read_best
from vlft.train.trainer import VlftTrainer


def finish(trainer: VlftTrainer, folder: RunFolder) -> None:
    """Collect the final weights from all ranks and write them on rank 0. Every rank must call it."""
    skipped = trainer.all_skipped()
    state = zero.trained_weights(trainer.model) if trainer.is_deepspeed_enabled else None
    if trainer.args.process_index == 0:
        folder.account(skipped)
        folder.account_steps(unlogged=trainer.meter.spent(), **_ended(trainer, folder))
        folder.finish(trainer.model, state, steps=trainer.state.global_step)
    barrier()


def _ended(trainer: VlftTrainer, folder: RunFolder) -> dict[str, Any]:
    """The best evaluation, and why training stopped before its last step."""
    best, step, most = read_best(folder.path, folder.record), trainer.state.global_step, trainer.state.max_steps
    found: dict[str, Any] = {} if best is None else {"best": best.as_json()}
    if trainer.stopping is not None and trainer.stopping.stopped and step < most:
        evaluations = trainer.stopping.early_stopping_patience
        found[STOPPED] = {"step": step, "of": most, "metric": best_by(folder.record)[0], "evaluations": evaluations}
    return found
