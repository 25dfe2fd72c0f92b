"""A run folder: find the checkpoint to resume from, write checkpoints and weights atomically, load them strictly.

A checkpoint is written under `.saving/` and renamed into place when all its files are on disk, so `checkpoint-N` is
complete or absent. `vlft.train.claim` refuses folders that hold something else.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from vlft.checkpoint import (
    RECORD,
    RunRecord,
    copy_configs,
    load_adapter_strict,
    load_weights_strict,
    read_record,
    write_record,
    write_trained,
)
from vlft.checkpoint.held_out import write_held_out
from vlft.config.repeat import write_yaml
from vlft.errors import BadRow, CheckpointError
from vlft.files import Lock, open_to_others, sync, sync_tree
from vlft.setup import Base
from vlft.train.claim import complete_checkpoints, left_nothing, refuse_other, start_over
from vlft.train.lock import hold
from vlft.train.ranks import barrier
from vlft.train.record import FEATURE_RUN, refuse_other_run, with_skipped

STAGING = ".saving"


class RunFolder:
    """The output folder of one run.

    Args:
        path: `--output_dir`.
        base: the opened base.
        record: the contents of `vlft.json`.
    """

    def __init__(self, path: str | Path, base: Base, record: RunRecord) -> None:
        self.path = Path(path)
        self.staging = self.path / STAGING
        self.base = base
        self.record = record
        self.saving = False
        self.left_out: list[int] = []  # steps that moved no weight
        self.evaluation_due = False  # the weights of the last step were not evaluated: there was no time
        self.lock: Lock | None = None

    # ---- where to start

    def hold(self) -> None:
        """Keep other runs out of the folder until `release`, or until this process ends.

        Raises:
            CheckpointError: another run uses the folder, or it cannot be written or locked.
        """
        self.lock = hold(self.path)

    def release(self) -> None:
        """Let other runs use the folder."""
        if self.lock is not None:
            self.lock.release()
            self.lock = None

    def find_start(self, resume: str) -> tuple[Literal["new", "again", "resume", "finished"], Path | None]:
        """Whether to start, start over ("again"), resume or stop, and the checkpoint to resume from.

        A run that ended before it saved anything is started over, whatever its settings were.

        Args:
            resume: `--resume_from_checkpoint`: "auto", "none" or a path.

        Raises:
            CheckpointError: the folder holds another run, or something that is no run.
        """
        if resume not in ("auto", "none"):
            source = Path(resume)
            if not (source / "trainer_state.json").is_file():
                raise CheckpointError(
                    f"--resume_from_checkpoint {resume}: no checkpoint there (it has no trainer_state.json). Name a "
                    "checkpoint-N folder, or auto."
                )
            refuse_other_run(self.record, read_record(source), source)
            _check_resumable(source)
        refuse_other(self.path)
        if (self.path / RECORD).is_file():
            existing = read_record(self.path)
            if left_nothing(self.path, existing):
                self.keep_id(existing.training.get(FEATURE_RUN))
                start_over(self.path)
                return ("again", None) if resume in ("auto", "none") else ("resume", Path(resume))
            if resume == "none":
                raise CheckpointError(
                    f"--output_dir {self.path}: already holds a run, and --resume_from_checkpoint is none. Choose a "
                    "new folder, or auto to resume."
                )
            refuse_other_run(self.record, existing, self.path)
            if existing.training.get("finished"):
                return "finished", None
        if resume not in ("auto", "none"):
            return "resume", Path(resume)
        newest = self.newest()
        if newest is None:
            return "new", None
        _check_resumable(newest)
        return "resume", newest

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints of this folder."""
        return complete_checkpoints(self.path)

    def newest(self) -> Path | None:
        """The last complete checkpoint, if there is one."""
        return max(self.checkpoints(), key=_step, default=None)

    def clear(self) -> None:
        """Remove incomplete files."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def begin_run(self, effective: dict[str, Any], *, held_out: Iterable[tuple[str, int]] | None = None) -> None:
        """Write `vlft.json`, `config.yaml` and the rows of `--eval_split`; remove what a killed run left incomplete."""
        self.clear()
        write_record(self.path, self.record)  # first, because it marks the folder as that of a run
        write_yaml(self.path / "config.yaml", effective)
        if held_out is not None:
            write_held_out(self.path, held_out)

    # ---- checkpoints

    def begin_checkpoint(self, *, writer: bool) -> None:
        """Make an empty staging folder. Every rank must call it; only the `writer` makes it."""
        if writer:
            shutil.rmtree(self.staging, ignore_errors=True)
            self.staging.mkdir()
        barrier()
        self.saving = True

    def commit_checkpoint(self, name: str, skipped: Iterable[BadRow]) -> None:
        """Complete `name` in the staging folder and rename it into place; rank 0 only."""
        self.account(skipped)
        self.account_steps(evaluation_due=self.evaluation_due)
        write_record(self.staging / name, self.record)
        self.sync(name)
        target = self.path / name
        if target.exists():
            os.rename(target, self.staging / f"old-{name}")  # deleted in place, a kill would leave half of it
        os.rename(self.staging / name, target)
        sync(self.path)
        shutil.rmtree(self.staging, ignore_errors=True)

    def sync(self, name: str) -> None:
        """Flush to disk the files of a staged checkpoint that this node wrote."""
        sync_tree(self.staging / name)

    def adopt(self, found: RunRecord) -> None:
        """Take over from a checkpoint's record the rows and steps that were left out, and a postponed evaluation."""
        self.left_out = list(found.training.get("left_out_steps", []))
        self.evaluation_due = found.training.get("evaluation_due", False)
        self.keep_id(found.training.get(FEATURE_RUN))
        self.account(BadRow(file=entry["file"], **row) for entry in found.data for row in entry["skipped"])

    def keep_id(self, run: str | None) -> None:
        """Enter the id by which the cache of features knows the run (`vlft.train.features`) into the record."""
        if run is not None:
            self.record = replace(self.record, training={**self.record.training, FEATURE_RUN: run})

    def drop_old(self, limit: int | None, best: str | None) -> None:
        """Keep the newest `limit` checkpoints and the best one. The others are renamed away, then deleted."""
        if not limit or limit < 0:
            return
        names = sorted(self.checkpoints(), key=_step)
        kept = {path.name for path in names[-limit:]} | ({Path(best).name} if best else set())
        self.staging.mkdir(exist_ok=True)
        for path in names:
            if path.name not in kept:
                os.rename(path, self.staging / f"old-{path.name}")
        shutil.rmtree(self.staging, ignore_errors=True)

    def account(self, skipped: Iterable[BadRow]) -> None:
        """Enter rows that were skipped during training into the record."""
        self.record = replace(self.record, data=with_skipped(self.record.data, list(skipped)))

    def account_steps(self, **more: Any) -> None:
        """Enter the steps that moved no weight, and the entries in `more`, into the record's "training"."""
        training = {**self.record.training, "left_out_steps": self.left_out, **more}
        self.record = replace(self.record, training=training)

    def write_weights(self, out: Path, model: Any, *, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write the trained weights and the processor to `out`: an adapter, or a full model with float32 masters.

        Args:
            out: folder to write to.
            model: the trained model.
            state_dict: the trained weights that DeepSpeed collected; None: those of the model.
        """
        self._write(out, model, state_dict, as_stored=False)

    def _write(self, out: Path, model: Any, state_dict: dict[str, torch.Tensor] | None, *, as_stored: bool) -> None:
        out.mkdir(parents=True, exist_ok=True)
        if self.record.kind == "adapter":
            # Otherwise PEFT asks the hub whether the vocabulary has grown.
            model.save_pretrained(out, state_dict=state_dict, save_embedding_layers=False)
            (out / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        else:
            base = self.base
            if state_dict is None:
                state_dict = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
            write_trained(base.folder, out, state_dict, base.family, tied=base.tied, as_stored=as_stored)
            if as_stored:
                copy_configs(base.folder, out)
            else:
                model.config.dtype = model.dtype  # that of the masters, as transformers writes it
                model.config.save_pretrained(out)
                model.generation_config.save_pretrained(out)
        save_processor(self.base.processor, out)
        open_to_others(out)

    def read_weights(self, source: Path, model: Any) -> None:
        """Load a checkpoint into the live model; every tensor must exist and fit.

        Raises:
            CheckpointError: tensors are missing or unexpected, or have another shape.
        """
        if self.record.kind == "adapter":
            load_adapter_strict(model, source)
        else:
            load_weights_strict(model, source, self.base.family)

    # ---- the end

    def finish(self, model: Any, state_dict: dict[str, torch.Tensor] | None, *, steps: int) -> None:
        """Write the final weights and mark the run as finished; rank 0 only."""
        shutil.rmtree(self.staging, ignore_errors=True)
        out = self.staging / "final"
        # The final weights have the base's dtypes; float32 masters are for training only.
        self._write(out, model, state_dict, as_stored=True)
        self.account_steps(finished=True, steps=steps)
        write_record(out, self.record)
        sync_tree(out)
        for entry in sorted(out.iterdir(), key=lambda p: p.name == RECORD):  # vlft.json last: it says "finished"
            os.replace(entry, self.path / entry.name)
        sync(self.path)
        shutil.rmtree(self.staging, ignore_errors=True)


def _check_resumable(checkpoint: Path) -> None:
    """Refuse to resume without the optimizer's state; transformers would silently start a new one."""
    if not (checkpoint / "optimizer.pt").is_file() and not any(checkpoint.glob("global_step*")):
        raise CheckpointError(
            f"{checkpoint}: holds weights but no optimizer state (--save_only_model), so training cannot resume from "
            "it. Choose a new --output_dir; the checkpoint can still be merged."
        )


def save_processor(processor: Any, out: Path) -> None:
    """Write the processor in the format of transformers 5, and the separate files that transformers 4 and vLLM read."""
    processor.save_pretrained(out)
    processor.image_processor.save_pretrained(out)
    processor.video_processor.save_pretrained(out)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))
