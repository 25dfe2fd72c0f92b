"""What `vlft.json` says of a run: all that it was asked for, so that it can be told from another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from vlft.checkpoint import RunRecord, base_fingerprint, library_versions, snapshot_revision
from vlft.checkpoint.record import MEDIA_KEYS
from vlft.config.columns import Columns
from vlft.config.flags import DataFlags, ModelFlags, TrainFlags
from vlft.data.files.read import rows_print
from vlft.data.order import Order
from vlft.setup import Base, MeasuredRows, columns_of, mix_of, training_files
from vlft.setup.schedule import asked_for, settings_of
from vlft.train.entries import data_entries

OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")


def run_record(
    base: Base, data: DataFlags, model: ModelFlags, args: TrainFlags, measured: MeasuredRows, order: Order
) -> RunRecord:
    """The record of a run that begins."""
    return RunRecord(
        kind="adapter" if base.towers.has_lora else "full",
        base_model=str(model.model_id),
        base_revision=snapshot_revision(base.folder),
        base_fingerprint=base_fingerprint(base.folder),
        model_type=base.family.model_type,
        towers=dict(base.towers.modes),
        lora=base.towers.lora_settings(),
        media={name: getattr(base.media, name) for name in MEDIA_KEYS},
        versions=library_versions(),
        training={
            "finished": False,
            "seed": args.seed,
            **settings_of(order),
            "asked": asked_for(data, args),
            "processes": args.world_size,
            "max_length": base.encoder.max_length,
            "box_format": base.encoder.box_format,
            "over_length": data.over_length,
            "missing_tags": data.missing_tags,
            "data": _data_print(columns_of(training_files(data), data)),
            "columns": [_words(columns) for columns in columns_of(training_files(data), data).values()],
            "mix": [[one.weight, one.repeat, one.cap] for one in mix_of(data)],
            # A skipped row that was mended since would shift the order of all others.
            "rows": len(measured.costs),
            "drawn": _rows_print(measured),
            # A checkpoint's optimizer and schedule bring these back, whatever the flags say by then.
            "learning_rates": args.learning_rates,
            "weight_decay": args.weight_decay,
            "optim": _plain(args.optim),
            "optimizer": {name: getattr(args, name) for name in OPTIMIZER},
            "lr_scheduler_type": _plain(args.lr_scheduler_type),
            "warmup_steps": args.warmup_steps,
            "deepspeed": args.zero or False,
        },
        data=data_entries(measured),
    )


def _plain(value: Any) -> str:
    """An enum of transformers as its word."""
    return str(getattr(value, "value", value))


def _rows_print(measured: MeasuredRows) -> str:
    """A short print of which rows are trained, and how often."""
    rows: Any = measured.rows.samples  # a RowIndex
    return hashlib.sha256(rows.file_of.tobytes() + rows.row_of.tobytes()).hexdigest()[:16]


def _words(columns: Columns | None) -> str:
    return "none" if columns is None else str(columns)


def _data_print(files: Mapping[str, Columns | None]) -> str:
    """A short print of the data files' rows, in order.

    Args:
        files: data file -> by which columns its rows are read.
    """
    digest = hashlib.sha256()
    for path, columns in files.items():
        digest.update(rows_print(path, columns))
    return digest.hexdigest()[:16]
