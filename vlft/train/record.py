"""What `vlft.json` says of a run: all that it was asked for, and what became of its rows.

What makes two runs the same is what `run_record` writes, but for `PROGRESS`; `refuse_other_run` compares it.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from pathlib import Path
from typing import Any

from vlft.checkpoint import RunRecord, base_fingerprint, library_versions, snapshot_revision
from vlft.checkpoint.record import MEDIA_KEYS
from vlft.config.flags import DataFlags, ModelFlags, TrainFlags
from vlft.config.recipe import RowFlags, flags_of
from vlft.data.order import Order
from vlft.errors import BadRow, CheckpointError
from vlft.setup import Base, MeasuredRows
from vlft.setup.schedule import asked_for, settings_of

OPTIMIZER = ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args")
#: Keys of `RunRecord.training` that differ between a run and its continuation. All others must not.
PROGRESS = ("finished", "asked", "processes")
#: Key -> what a message calls it; other keys are called by their words.
CALLED = {
    "base_fingerprint": "base model (fingerprint)",
    "lora": "LoRA",
    "media": "pixel and frame settings",
    "mix": "data mix (weight, repeat, cap)",
    "missing_tags": "missing_tags",
    "over_length": "over_length",
    "columns": "columns of data files",
    "drawn": "print of the rows it trains",
    "chat_template": "print of the chat template",
    "tokenizer": "print of the tokenizer",
}
#: What a run did whose record has no such key: an older version had no such flag. Of other keys nothing is known then,
#: and they are not compared, unless every version wrote them.
BEFORE: dict[str, Any] = {
    **{one.name: one.default for one in flags_of(RowFlags) if one.default is not None},
    "mix": [],
    **dict.fromkeys(("data", "rows", "max_length", "seed", "global_batch", "packing")),
}


def run_record(
    base: Base, data: DataFlags, model: ModelFlags, args: TrainFlags, measured: MeasuredRows, order: Order
) -> RunRecord:
    """The record of a run that begins."""
    recipe = base.recipe.as_json()
    return RunRecord(
        kind="adapter" if base.towers.has_lora else "full",
        base_model=str(model.model_id),
        base_revision=snapshot_revision(base.folder),
        base_fingerprint=base_fingerprint(base.folder),
        model_type=base.family.model_type,
        towers=dict(base.towers.modes),
        lora=base.towers.lora_settings(),
        media={name: recipe.pop(name) for name in MEDIA_KEYS},
        versions=library_versions(),
        training={  # in the order in which they are compared
            "finished": False,
            "asked": asked_for(data, args),
            "processes": args.world_size,
            **recipe,
            "mix": [[one.weight, one.repeat, one.cap] for one in data.training_sets] if data.data_mix else [],
            "data": _data_print(measured),
            # A skipped row that was repaired since would shift the order of all others.
            "rows": len(measured.costs),
            "seed": args.seed,
            **settings_of(order),
            # A checkpoint's optimizer and schedule bring these back, whatever the flags say by then.
            "learning_rates": args.learning_rates,
            "weight_decay": args.weight_decay,
            "optim": _plain(args.optim),
            "optimizer": {name: getattr(args, name) for name in OPTIMIZER},
            "lr_scheduler_type": _plain(args.lr_scheduler_type),
            "warmup_steps": args.warmup_steps,
            "deepspeed": args.zero or False,
            "drawn": _rows_print(measured),
        },
        data=data_entries(measured),
    )


def refuse_other_run(mine: RunRecord, other: RunRecord, where: Path) -> None:
    """Refuse to continue a run that was asked to do something else.

    Args:
        mine: of this run, as `run_record` made it.
        other: of the run to continue, maybe of an older version; `where` it was found.

    Raises:
        CheckpointError: names the first thing that differs, and both values.
    """
    theirs = {**BEFORE, "columns": ["none"] * len(mine.training["columns"]), **_identity(other)}
    if other.versions.get("transformers") != mine.versions.get("transformers"):
        theirs.pop(
            "tokenizer", None
        )  # the print is of what transformers makes of its files, which a version may change
    for name, ours in _identity(mine).items():
        if name in theirs and theirs[name] != ours:
            raise CheckpointError(
                f"{where}: belongs to another run: its {CALLED.get(name, name.replace('_', ' '))} is {theirs[name]}, "
                f"this run's is {ours}. "
                + (_equal_batch(other, mine) if name == "global_batch" else "")
                + "Choose another --output_dir, or give the flags of that run (its config.yaml)."
            )


def _identity(record: RunRecord) -> dict[str, Any]:
    """All that makes a run this run and no other, in the order in which it is compared."""
    whole = {name: getattr(record, name) for name in ("base_fingerprint", "towers", "lora", "media")}
    return whole | {name: value for name, value in record.training.items() if name not in PROGRESS}


def _equal_batch(other: RunRecord, mine: RunRecord) -> str:
    """How to have the other run's global batch on this number of processes, where only that number differs."""
    theirs, here = other.training.get("processes"), mine.training["processes"]
    accumulation, rest = divmod(other.training["global_batch"], here)
    if theirs in (None, here) or rest or mine.training["asked"]["rows"] is not None:
        return ""
    return (
        f"A global batch is over all processes, and it ran on {theirs} processes, this is {here}: "
        f"--gradient_accumulation_steps {accumulation} makes them equal. "
    )


def _plain(value: Any) -> str:
    """An enum of transformers as its word."""
    return str(getattr(value, "value", value))


def _rows_print(measured: MeasuredRows) -> str:
    """A short print of which rows are trained, and how often."""
    rows: Any = measured.rows.samples  # a RowIndex
    return hashlib.sha256(rows.file_of.tobytes() + rows.row_of.tobytes()).hexdigest()[:16]


def _data_print(measured: MeasuredRows) -> str:
    """A short print of the data files' rows, in order."""
    rows: Any = measured.rows.samples  # a RowIndex
    digest = hashlib.sha256()
    for file in rows.files:
        digest.update(file.print())
    return digest.hexdigest()[:16]


# ---- what became of the rows of each data file


def data_entries(measured: MeasuredRows) -> list[dict[str, Any]]:
    """The "data" of a run record: per file the rows read, trained and skipped, and those that --over_length changed.

    Of a mix, also the rows that are not drawn, and how many draws an epoch makes: rows = trained + skipped + not_drawn.
    """
    counts, bad = measured.rows.counts, measured.rows.bad
    rows: dict[str, list[dict[str, Any]]] = {file: [] for file in counts}
    for sample, change in measured.changed:
        rows[sample.file].append({"index": sample.index, "id": sample.id, "change": change})
    empty = [
        {"file": file, "rows": count, "trained": count, "skipped": [], **_changes(rows[file])}
        for file, count in counts.items()
    ]
    refused = Counter(row.file for row in bad)
    for entry in empty:
        if (drawn := measured.drawn.get(entry["file"])) is not None:
            left = entry["rows"] - refused[entry["file"]] - drawn.rows
            entry |= {"draws_an_epoch": drawn.draws, "not_drawn": left}
    return with_skipped(empty, list(bad))


def with_skipped(data: list[dict[str, Any]], skipped: list[BadRow]) -> list[dict[str, Any]]:
    """The entries with these rows skipped, too."""
    result = []
    for entry in data:
        known = {row["index"] for row in entry["skipped"]}
        new = [
            {"index": row.index, "id": row.id, "field": row.field, "reason": row.reason}
            for row in skipped
            if _same(row.file, entry["file"]) and row.index not in known
        ]
        rows = sorted([*entry["skipped"], *new], key=lambda row: row["index"])
        trained = entry["rows"] - len(rows) - entry.get("not_drawn", 0)
        result.append({**entry, "skipped": rows, "trained": trained})
    return result


def _same(one: str, other: str) -> bool:
    """Whether two spellings name one file: config.yaml has absolute paths, whatever the flags had."""
    return one == other or os.path.realpath(one) == os.path.realpath(other)


def _changes(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How many rows have fewer pixels, how many fewer media, and which."""
    shrunk = sum(row["change"].startswith("shrunk") for row in rows)
    return {"shrunk": shrunk, "lost_media": len(rows) - shrunk, "changed": rows}
