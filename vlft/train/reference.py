"""The reference of preference tuning: what the model at the start of a run gives to every answer.

One pass without gradients over all rows, in packs, before the first step. The values are kept in the run folder, so
that a resumed run, whose weights have moved, compares with the same reference.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import TrainerCallback

from vlft.checkpoint import RunRecord
from vlft.data.dataset import RowDataset
from vlft.data.order import Order
from vlft.errors import CheckpointError
from vlft.files import appearing_path
from vlft.objectives.preference import Preference, References
from vlft.setup import MeasuredRows
from vlft.text import counted, duration
from vlft.train.callbacks import EvaluationPutOff
from vlft.train.ranks import gather, on_rank_zero
from vlft.train.record import data_print, rows_print

#: Not in safetensors: `vlft merge` and other kits read every such file in a run folder as weights.
FILE = "reference.parquet"
KEY = b"vlft.key"
_NEXT = "Pass the flags of that run, copy its file back, or start again with another --output_dir."


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
    """Fills `Preference.references` before the first step, by one pass over the rows or from a resumed run.

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
        self._files = [file.name for rows, _ in sets for file in _index(rows).files]
        self._key = key
        self._resumed = resumed
        self._say = say
        self.trainer: Any = None  # a `VlftTrainer`, which imports this module

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read or compute the values.

        Raises:
            CheckpointError: the run resumes, and its values are missing, damaged or those of another reference.
            Preempted: a process received a signal to stop.
        """
        kept = on_rank_zero(self._kept)
        if kept is None:
            kept = self._computed(args, state)
            on_rank_zero(lambda: write_references(self._path, kept, key=self._key, files=self._files))
        self._objective.references.update(kept)

    def _kept(self) -> References | None:
        if not self._resumed:
            # A run that ended before its first checkpoint may have left a file. Its key does not cover the contents of
            # pictures and videos, which may have changed since then.
            return None
        try:
            found = read_references(self._path, key=self._key, files=self._files)
            if found is None:
                raise CheckpointError(f"{self._path}: is missing.")
        except CheckpointError as error:
            raise CheckpointError(
                f"{error} It holds the log-probabilities of the model at the start of the run, and the weights have "
                f"moved since. {_NEXT}"
            ) from error
        self._say(f"reference: {counted(len(found), 'row')} from {self._path}")
        return found

    def _computed(self, args: Any, state: Any) -> References:
        trainer = self.trainer
        if trainer is None:
            raise ValueError("the trainer is not set")
        start = time.perf_counter()
        found: References = {}
        try:
            with trainer.room.notice.planning("stopping before the first step"):
                for rows, order in self._sets:
                    for batch in trainer.without_gradients(rows, order, doing="computing the reference", step=None):
                        found |= self._of_rows(trainer.evaluated_model(), batch)
        except EvaluationPutOff:
            trainer.room.end(args, state)
        trainer.progress.doing("")
        whole = {row: values for part in gather(found) for row, values in part.items()}
        seconds = time.perf_counter() - start
        trainer.meter.exclude(seconds)
        trainer.progress.exclude(seconds)
        self._say(f"reference: computed for {counted(len(whole), 'row')} in {duration(seconds)}, kept in {self._path}")
        return whole

    def _of_rows(self, model: torch.nn.Module, batch: Any) -> References:
        sums_A, _ = self._objective.sums(model, batch)
        if sums_A is None:
            return {}
        values = iter(sums_A.tolist())
        answers = zip(batch["rows"], batch["answers"]["per_sample"], strict=True)
        return {row: tuple(next(values) for _ in range(number)) for row, number in answers}


def _index(rows: RowDataset) -> Any:
    return rows.samples  # a RowIndex


def write_references(path: Path, values: References, *, key: str, files: Sequence[str]) -> None:
    """Write the values of all rows, whole or not at all.

    A row is stored by the place of its file, because a resumed run may have other paths of the same files.

    Args:
        path: of the file.
        values: of all rows.
        key: of `key_of`.
        files: the data files of the run, in order; a file may be there twice.
    """
    rows = sorted(
        (place, row, values[name, row]) for name, row in values for place, other in enumerate(files) if other == name
    )
    columns = {
        "file": pa.array([place for place, _, _ in rows], pa.int32()),
        "row": pa.array([row for _, row, _ in rows], pa.int64()),
        "log_probs": pa.array([some for _, _, some in rows], pa.list_(pa.float32())),
    }
    with appearing_path(path) as made:
        table = pa.table(columns).replace_schema_metadata({KEY: key})
        pq.write_table(table, made, write_page_checksum=True)


def read_references(path: Path, *, key: str, files: Sequence[str]) -> dict[tuple[str, int], tuple[float, ...]] | None:
    """Read the values of all rows; None if there is no file.

    Args:
        path: of the file.
        key: of `key_of`.
        files: the data files of the run, in order.

    Raises:
        CheckpointError: the file is damaged, or has another key.
    """
    if not path.exists():
        return None
    try:
        table = pq.read_table(path, page_checksum_verification=True, partitioning=None)
        places, rows, values = (table[name].to_pylist() for name in ("file", "row", "log_probs"))
    except (pa.ArrowException, KeyError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path}: cannot be read ({type(error).__name__}: {reason}).") from error
    if (theirs := (table.schema.metadata or {}).get(KEY, b"none").decode()) != key:
        raise CheckpointError(
            f"{path}: is the reference of another run: another base, starting adapter, --data_path, --eval_path, "
            "--eval_split, pixel settings or dtype "
            f"(key {theirs[:12]}, this run's is {key[:12]})."
        )
    return {(files[place], row): tuple(some) for place, row, some in zip(places, rows, values, strict=True)}
