"""Read a run folder into columns, so that 100,000 logged steps take a few megabytes.

Letters in shapes: L is the number of logged lines.
"""

from __future__ import annotations

import math
import os
import re
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlft.checkpoint import RECORD, RunRecord, read_record
from vlft.errors import CheckpointError
from vlft.report.lines import objects
from vlft.report.sampled import Sampled, read_completions

#: Numbers of a metrics line that become columns. A line that lacks one (from an older version) has NaN in its place.
COLUMNS = (
    *("step", "loss", "grad_norm", "step_s", "data_wait_s", "tokens_per_s", "padding_fraction", "peak_gb", "mfu"),
    *("tokens", "supervised_tokens", "images", "videos", "samples", "time", "save_s", "report_s", "max_steps"),
)
#: Entries of a line that are no statistics of the objective.
NO_STATISTICS = frozenset((*COLUMNS, "epoch", "lr"))
MOST_STATISTICS = 32  # a line of a damaged file may have any number of entries
METRICS, CONFIG = "metrics.jsonl", "config.yaml"
EVALUATED = ("step", "eval_loss", "eval_runtime", "eval_answers_s", "eval_metric_s")


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A row that the model answers at each evaluation.

    Attributes:
        row: its description in `answers.jsonl`: file, index, id, turns, right, media.
        answers: (step, text, whether the answer was cut) of each evaluation, in order.
    """

    row: dict[str, Any]
    answers: list[tuple[int, str, bool]]


@dataclass(frozen=True, kw_only=True)
class Run:
    """The contents of a run folder.

    Attributes:
        folder: path of the run folder.
        record: its `vlft.json`.
        config: text of its `config.yaml`.
        lines: column -> float64 [L], one value per logged step, in order.
        rates: parameter group -> learning rates, float64 [L].
        statistics: name -> float64 [L]: what the objective logs beside its loss.
        evaluations: column -> float64, one value per evaluation, in order. Those of statistics begin with `eval_`.
        answered: rows and their answers.
        notes: reasons why answers are missing.
        sampled: rows and completions of a GRPO run.
        unread: file -> number of its lines that could not be read.
        missing: names of files of a run that the folder lacks.
        logged: when its last line was written, or its record if there is no line, in seconds since the epoch.
    """

    folder: Path
    record: RunRecord
    config: str
    lines: dict[str, np.ndarray]
    rates: dict[str, np.ndarray]
    statistics: dict[str, np.ndarray]
    evaluations: dict[str, np.ndarray]
    answered: list[Answered]
    notes: list[str]
    sampled: list[Sampled]
    unread: dict[str, int]
    missing: tuple[str, ...]
    logged: float

    @property
    def broken(self) -> int:
        """Number of lines that could not be read."""
        return sum(self.unread.values())

    @property
    def damaged(self) -> str:
        """The files with lines that could not be read, each with the number of them; "" if there is none."""
        return ", ".join(f"{file} ({count:,})" for file, count in self.unread.items() if count)

    @property
    def seconds(self) -> np.ndarray:
        """Seconds spent on the steps of each line [L]: tokens / tokens per second.

        A line counts the tokens of all steps since the line before.
        """
        lines = self.lines
        with np.errstate(divide="ignore", invalid="ignore"):
            found = lines["tokens"] / lines["tokens_per_s"]
        steps = np.diff(lines["step"], prepend=0)
        return np.where(np.isfinite(found), found, lines["step_s"] * steps)


def read_run(folder: str | Path) -> Run:
    """Read a run folder.

    A run may be writing it: an incomplete last line is left out, and files that do not exist yet are named.

    Raises:
        CheckpointError: it is no run folder, or its `vlft.json` is incomplete.
        OSError: one of its files cannot be read.
    """
    folder = Path(folder)
    record = _record(folder)
    lines = {name: array("d") for name in COLUMNS}
    rates: dict[str, array] = {}
    statistics: dict[str, array] = {}
    evaluations = {name: array("d") for name in EVALUATED}
    evaluated: dict[str, array] = {}
    broken = 0
    for line in objects(folder / METRICS):
        if line is None or not isinstance(line.get("step"), int):
            broken += 1
        elif "eval_loss" in line:
            more = {name: line[name] for name in line if name.startswith("eval_") and name not in EVALUATED}
            _add(evaluated, more, len(evaluations["step"]))
            _append(evaluations, line)
        else:
            before = len(lines["step"])
            _append(lines, line)
            given = line.get("lr")
            _add(rates, given if isinstance(given, dict) else {}, before)
            _add(statistics, {name: value for name, value in line.items() if name not in NO_STATISTICS}, before)
    for columns, count in (
        (rates, len(lines["step"])),
        (statistics, len(lines["step"])),
        (evaluated, len(evaluations["step"])),
    ):
        _fill(columns, count)
    answered, notes, unread = _answers(folder / "answers.jsonl")
    sampled, unclear = read_completions(folder / "completions.jsonl")
    config = folder / CONFIG
    return Run(
        folder=folder,
        record=record,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        lines={name: np.array(column) for name, column in lines.items()},
        rates={name: np.array(column) for name, column in rates.items()},
        statistics={name: np.array(column) for name, column in statistics.items()},
        evaluations={name: np.array(column) for name, column in {**evaluated, **evaluations}.items()},
        answered=answered,
        notes=notes,
        sampled=sampled,
        unread={METRICS: broken, "answers.jsonl": unread, "completions.jsonl": unclear},
        missing=tuple(name for name in (METRICS, CONFIG) if not (folder / name).is_file()),
        logged=os.stat(folder / (METRICS if (folder / METRICS).is_file() else RECORD)).st_mtime,
    )


def _record(folder: Path) -> RunRecord:
    """Read the record of a run folder, and refuse other folders that have one.

    Raises:
        CheckpointError: the folder does not exist, has no record, or is a checkpoint or a merged model.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "no such folder"
        raise CheckpointError(f"{folder}: {what}. Name the --output_dir of a run.")
    record = read_record(folder)
    if (merged := record.training.get("merged_from")) is not None:
        raise CheckpointError(f"{folder}: is a model that was merged from {merged}. Name that run.")
    if re.fullmatch(r"checkpoint-\d+", folder.absolute().name) and not (folder / METRICS).exists():
        raise CheckpointError(f"{folder}: is a checkpoint. Name the run: {folder.parent}")
    return record


def _append(columns: dict[str, array], line: dict[str, Any]) -> None:
    for name, column in columns.items():
        column.append(_number(line.get(name)))


def _add(columns: dict[str, array], values: dict[str, Any], before: int) -> None:
    """Append values to columns that may be new, with NaN in the lines before."""
    for name, value in values.items():
        if name in columns or (len(columns) < MOST_STATISTICS and isinstance(value, int | float | None)):
            column = columns.setdefault(name, array("d"))
            column.extend([math.nan] * (before - len(column)))
            column.append(_number(value))


def _fill(columns: dict[str, array], count: int) -> None:
    for column in columns.values():
        column.extend([math.nan] * (count - len(column)))


def _number(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:  # an integer of 300 digits
        return math.nan


def _answers(path: Path) -> tuple[list[Answered], list[str], int]:
    rows: dict[tuple[str, int], Answered] = {}
    notes: list[str] = []
    broken = 0
    for line in objects(path):
        try:
            if line is None:
                raise KeyError("an object")
            step = int(line["step"])
            if "note" in line:
                notes.append(str(line["note"]))
            for row in line.get("rows", ()):
                rows.setdefault((row["file"], row["index"]), Answered(row=row, answers=[]))
            for answer in line.get("answers", ()):
                found = rows[answer["file"], answer["index"]]
                found.answers.append((step, str(answer["answer"]), bool(answer["cut"])))
        except (KeyError, TypeError, ValueError):
            broken += 1
    return list(rows.values()), list(dict.fromkeys(notes)), broken
