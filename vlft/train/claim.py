"""Check what an output folder holds before a run uses it: nothing, a run, or something that a run would spoil.

Reads names and small files only, so that a wrong folder is refused before the base is opened. `vlft.train.folder`
decides whether a run in the folder is the same run.
"""

from __future__ import annotations

import re
from pathlib import Path

from vlft.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, RECORD, RunRecord, read_record
from vlft.checkpoint.held_out import HELD_OUT
from vlft.config.repeat import MIX
from vlft.errors import CheckpointError
from vlft.families import Family
from vlft.model_files import has_weights

#: Files that a run writes beside its checkpoints before it ends.
STARTED = (
    *("config.yaml", MIX, HELD_OUT, "metrics.jsonl", "answers.jsonl", "completions.jsonl"),
    *("report.html", RECORD),
)
_CHOOSE_ANOTHER = "Choose a new or empty folder."


def holds(path: Path) -> list[str]:
    """Names in a folder, without our dot files: the lock, the staging folder, a record that a kill left incomplete."""
    return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))


def refuse_other(path: Path, *, family: Family | None = None) -> None:
    """Refuse an output folder that holds anything other than a run.

    Args:
        path: `--output_dir`, which may be missing.
        family: of the base; None if it is unknown.

    Raises:
        CheckpointError: the path is a file or a checkpoint of a run, or the folder holds merged weights, a model, an
            adapter or other files, or a run on a base of another family.
    """
    if (path / "trainer_state.json").is_file() or _is_checkpoint_of(path):
        raise CheckpointError(
            f"--output_dir {path}: is a checkpoint of a run, and training into it would spoil it. To resume from it, "
            f"use --output_dir {path.parent}, with --resume_from_checkpoint {path} if it is not the newest. "
            f"{_CHOOSE_ANOTHER}"
        )
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"--output_dir {path}: is a file. {_CHOOSE_ANOTHER}")
    if not path.is_dir() or not (found := holds(path)):
        return
    if RECORD in found:
        record = read_record(path)
        if family is not None and not family.is_of(record.model_type) and not left_nothing(path, record):
            raise CheckpointError(
                f"--output_dir {path}: holds a run on {record.base_model}, a model of the type {record.model_type!r}; "
                f"--model_id is of the type {family.model_type!r}. {_CHOOSE_ANOTHER}"
            )
        if (merged := record.training.get("merged_from")) is not None:
            raise CheckpointError(
                f"--output_dir {path}: holds weights that were merged from {merged}. {_CHOOSE_ANOTHER}"
            )
        return
    what = "is not empty and holds no run of vlft"
    if has_weights(path):
        what = "holds a model"
    elif ADAPTER_CONFIG in found or ADAPTER_WEIGHTS in found:
        what = "holds an adapter that no run of vlft wrote"
    raise CheckpointError(f"--output_dir {path}: {what} (it has {', '.join(found[:3])}). {_CHOOSE_ANOTHER}")


def _is_checkpoint_of(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None and (path.parent / RECORD).is_file()


def complete_checkpoints(path: Path) -> list[Path]:
    """The checkpoints of a run folder from which it can resume."""
    return [
        found
        for found in path.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", found.name) and (found / "trainer_state.json").is_file()
    ]


def left_nothing(path: Path, record: RunRecord) -> bool:
    """Whether a run ended before it saved anything: no complete checkpoint and no weights."""
    weights = has_weights(path) or (path / ADAPTER_WEIGHTS).is_file()
    return not (record.training.get("finished") or weights or complete_checkpoints(path))


def record_there(path: str | Path, resume: str | None) -> RunRecord | None:
    """The record from which a run would resume; None if there is no readable record, or its run saved nothing.

    Args:
        path: `--output_dir`.
        resume: `--resume_from_checkpoint`: "auto", "none" or a path; None: "auto".
    """
    source = Path(path if resume in (None, "auto", "none") else resume)
    try:
        record = read_record(source) if resume != "none" and (source / RECORD).is_file() else None
    except CheckpointError:
        return None  # `vlft.train.folder.RunFolder.find_start` raises it with the reason
    if record is None or (source == Path(path) and left_nothing(source, record)):
        return None
    return record


def start_over(path: Path) -> None:
    """Remove the files of a run that ended before it saved anything."""
    for name in STARTED:
        (path / name).unlink(missing_ok=True)
