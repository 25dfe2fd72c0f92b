"""The rows of a run: those that it holds out (`vlft eval RUN --held_out`), and those that it was trained on.

A run folder says in `config.yaml` which data it read and how, in `vlft.json` how many rows of each file it trained, and
in `held_out.jsonl` which rows it left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from vlft.checkpoint import RECORD, read_record
from vlft.checkpoint.held_out import HELD_OUT, read_held_out
from vlft.config.flags import DataFlags
from vlft.errors import CheckpointError, ConfigError
from vlft.evaluation.rows import Place
from vlft.text import counted

CONFIG = "config.yaml"
#: Flags of data that are those of the run unless they are given.
OF_RUN = ("image_folder", "columns", "missing_tags", "allow_remote_media", "allow_outside_folder")


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """The held-out rows of a run.

    Attributes:
        files: its data files.
        data: how they are read.
        rows: absolute path of a data file -> indices of the rows.
    """

    files: tuple[str, ...]
    data: DataFlags
    rows: Mapping[str, frozenset[int]]


def held_out_of(model: str, data: DataFlags) -> RunRows:
    """Return the rows that a run holds out.

    Args:
        model: run folder, or a checkpoint in it.
        data: the flags that are given. Flags of `OF_RUN` at their default become those of the run.

    Raises:
        ConfigError: the run has no such rows, or does not say how it reads its data.
        CheckpointError: its list of rows cannot be read.
    """
    for folder in _run_folders(model):
        rows = read_held_out(folder)
        if rows is None:
            continue
        config = _config(folder)
        if config is None:
            raise ConfigError(
                f"--held_out: {folder / CONFIG} cannot be read, and it says how the run reads its data. Restore it."
            )
        default = {one.name: getattr(DataFlags(), one.name) for one in fields(DataFlags)}
        kept = {name: config[name] for name in OF_RUN if name in config and getattr(data, name) == default[name]}
        made = replace(data, **kept, data_path=config.get("data_path") or [], data_mix=config.get("data_mix"))
        return RunRows(files=tuple(made.training_files), data=made, rows=rows)
    raise ConfigError(
        f"--held_out: {model} has no {HELD_OUT}. A run with --eval_split writes it; else name the data to evaluate on."
    )


def trained_notes(models: Iterable[str], places: Iterable[Place]) -> Iterator[str]:
    """Say which models were trained on some of the rows.

    Args:
        models: folders of models; others are passed over.
        places: the rows.
    """
    counts: Counter[str] = Counter()
    by_file: dict[str, set[int]] = {}
    for file, index in places:
        by_file.setdefault(file, set()).add(index)
    total = sum(map(len, by_file.values()))
    for model in models:
        counts.clear()
        held: Mapping[str, frozenset[int]] | None = None
        for folder in _run_folders(model):
            files = _trained_files(folder)
            if not files:
                continue
            held = _held(folder)
            for file, indices in by_file.items():
                path = os.path.abspath(file)
                if path in files:
                    counts[file] = len(indices - (held or {}).get(path, frozenset()))
            break
        if trained := counts.total():
            also = f". The rows that it holds out: vlft eval {model} --held_out" if held else ""
            yield (
                f"{model} was trained on {trained:,} of {counted(total, 'row')} ({max(counts, key=counts.__getitem__)})"
                f", so their figures say nothing about new rows{also}"
            )


def _held(folder: Path) -> Mapping[str, frozenset[int]] | None:
    try:
        return read_held_out(folder)
    except CheckpointError:
        return None


def _trained_files(folder: Path) -> set[str]:
    """Absolute paths of the data files that a run trained; empty if it does not say."""
    if not (folder / RECORD).is_file():
        return set()
    config = _config(folder) or {}
    found = set()
    try:
        found |= {os.path.abspath(entry["file"]) for entry in read_record(folder).data if entry.get("trained")}
        found |= set(DataFlags(data_path=config.get("data_path") or [], data_mix=config.get("data_mix")).training_files)
    except (CheckpointError, ConfigError):
        return found  # the model itself says what is wrong with it
    return found


def _run_folders(model: str) -> list[Path]:
    """The folder of a model, and that of the run if it is a checkpoint."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return []
    folder = folder.absolute()
    return [folder, *([folder.parent] if folder.name.startswith("checkpoint-") else [])]


def _config(folder: Path) -> dict[str, Any] | None:
    try:
        found = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None
