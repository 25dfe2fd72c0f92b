"""The reference of preference tuning: what the model at the start of a run gives to every answer.

One pass without gradients over all rows, in packs, before the first step. The values are kept in the run folder, so
that a resumed run, whose weights have moved, compares with the same reference.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers import TrainerCallback

from vlft.checkpoint import RunRecord
from vlft.data.dataset import RowDataset
from vlft.data.order import Order
from vlft.errors import CheckpointError
from vlft.files import appearing_path
from vlft.objectives.preference import Preference, References
from vlft.setup import MeasuredRows
from vlft.text import duration
from vlft.train.callbacks import EvaluationPutOff
from vlft.train.ranks import gather, on_rank_zero
from vlft.train.record import data_print, rows_print

FILE = "reference.safetensors"
KEY = "key"


def key_of(record: RunRecord, recipe: Mapping[str, Any], *, evaluated: MeasuredRows | None, dtype: torch.dtype) -> str:
    """Everything that the reference of a run depends on, as one fingerprint.

    Args:
        record: of the run: its base, its starting adapter and its rows.
        recipe: how rows become tokens and pixels.
        evaluated: the rows to evaluate on, or None.
        dtype: what the run computes in.
    """
    start = record.training.get("adapter")
    parts = {
        "base": record.base_fingerprint,
        "start": start and start["fingerprint"],
        "rows": {name: record.training.get(name) for name in ("data", "rows", "drawn")},
        "recipe": dict(recipe),
        "evaluated": evaluated and (data_print(evaluated), rows_print(evaluated)),
        "dtype": str(dtype),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


class ReferencePass(TrainerCallback):
    """Fills `Preference.references` before the first step, from the run folder or by one pass over the rows.

    Args:
        objective: of the run; its `references` are filled in place.
        sets: the rows to train on and to evaluate on, each with an order that has every row once.
        folder: the run folder.
        key: of `key_of`.
        resumed: whether the run resumes from a checkpoint, so that its weights are not those of the start.
        say: prints a line for the user.
    """

    def __init__(
        self,
        objective: Preference,
        sets: list[tuple[RowDataset, Order]],
        folder: Path,
        *,
        key: str,
        resumed: bool,
        say: Callable[[str], None],
    ) -> None:
        self._objective = objective
        self._sets = sets
        self._path = folder / FILE
        self._key = key
        self._resumed = resumed
        self._say = say
        self.trainer: Any = None  # the `VlftTrainer`, which sets it

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read or compute the values.

        Raises:
            CheckpointError: the run resumes, and its values are missing, damaged or those of another reference.
            Preempted: a process received a signal to stop.
        """
        kept = on_rank_zero(self._kept)
        if kept is None:
            kept = self._computed(args, state)
            on_rank_zero(lambda: write_references(self._path, kept, key=self._key))
        self._objective.references.update(kept)

    def _kept(self) -> References | None:
        try:
            found = read_references(self._path, key=self._key)
        except CheckpointError as error:
            if self._resumed:
                raise
            self._say(f"note: {error} It is computed again.")
            return None
        if found is None and self._resumed:
            raise CheckpointError(
                f"{self._path}: is missing. It holds the log-probabilities of the model at the start of the run, and "
                "the weights have moved since. Copy it back, or start again with another --output_dir."
            )
        if found is not None:
            self._say(f"reference: {len(found):,} rows from {self._path}")
        return found

    def _computed(self, args: Any, state: Any) -> References:
        trainer = self.trainer
        if trainer is None:
            raise ValueError("the trainer is not set")
        start = time.perf_counter()
        found: dict[tuple[str, int], tuple[float, ...]] = {}
        try:
            for rows, order in self._sets:
                for batch in trainer.without_gradients(rows, order, doing="computing the reference"):
                    sums_A, _ = self._objective.sums(trainer.evaluated_model(), batch)
                    if sums_A is not None:
                        values = iter(sums_A.tolist())
                        for row, answers in zip(batch["rows"], batch["answers"]["per_sample"], strict=True):
                            found[row] = tuple(next(values) for _ in range(answers))
        except EvaluationPutOff:
            trainer.room.end(args, state)
        trainer.progress.doing("")
        whole = {row: values for part in gather(found) for row, values in part.items()}
        seconds = time.perf_counter() - start
        trainer.meter.exclude(seconds)
        self._say(f"reference: computed for {len(whole):,} rows in {duration(seconds)}, kept in {self._path}")
        return whole


def write_references(path: Path, values: References, *, key: str) -> None:
    """Write the values of all rows, whole or not at all.

    Args:
        path: of the file.
        values: of all rows.
        key: of `key_of`.
    """
    rows = sorted(values)
    files = sorted({file for file, _ in rows})
    place = {file: i for i, file in enumerate(files)}
    tensors: dict[str, Any] = {
        "file": np.array([place[file] for file, _ in rows], dtype=np.int32),
        "row": np.array([row for _, row in rows], dtype=np.int64),
        "answers": np.array([len(values[row]) for row in rows], dtype=np.int32),
        "values": np.array([value for row in rows for value in values[row]], dtype=np.float32),
    }
    with appearing_path(path) as made:
        save_file(tensors, made, metadata={KEY: key, "files": json.dumps(files)})


def read_references(path: Path, *, key: str) -> dict[tuple[str, int], tuple[float, ...]] | None:
    """Read the values of all rows; None if there is no file.

    Args:
        path: of the file.
        key: of `key_of`.

    Raises:
        CheckpointError: the file is damaged, or has another key.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            about: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in ("file", "row", "answers", "values")}
            files = json.loads(about["files"])
            ends = np.cumsum(tensors["answers"])[:-1]
            values = [tuple(part.tolist()) for part in np.split(tensors["values"], ends)]
            rows = [(files[f], int(row)) for f, row in zip(tensors["file"], tensors["row"], strict=True)]
    except (SafetensorError, KeyError, IndexError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {error}).") from error
    if about.get(KEY) != key:
        raise CheckpointError(
            f"{path}: is the reference of another run: another base, starting adapter, data, pixel settings or dtype "
            f"(key {about.get(KEY, 'none')[:12]}, this run's is {key[:12]})."
        )
    return dict(zip(rows, values, strict=True))
