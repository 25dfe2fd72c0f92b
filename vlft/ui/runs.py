"""Watch run folders, whoever started the run: curves that are read bit by bit, answers, and the process that trains.

Letters in shapes: L is the number of logged lines.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import statistics
import threading
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlft.pages.charts import Chart, Series, chart
from vlft.pages.completions import MALFORMED, ranked
from vlft.pages.completions import described as row_of
from vlft.ui.small import MOST_NUMBER, document, head, opened, step_of, tail

METRICS, ANSWERS, COMPLETIONS = "metrics.jsonl", "answers.jsonl", "completions.jsonl"
RECORD, LOCK = "vlft.json", ".lock"
CHECKPOINT, STATE = re.compile(r"checkpoint-([0-9]{1,15})"), "trainer_state.json"
RECENT, FEW = 20, 3  # steps whose median is the rate, and the least number of them: the first one is slow
MOST_GROUPS = 6  # learning rates that are drawn
MOST_SECONDS = 1e9  # of a step
MOST_ROWS = 6  # rows whose answers are shown
MOST_LINE = 4 << 20  # bytes of the newest completions that are read
FIGURES = ("reward", "loss", "tokens_per_s", "step_s", "peak_gb")  # that are shown of the last line
SHOWN = {"reward": "Reward", "loss": "Loss", "grad_norm": "Gradient norm", "tokens_per_s": "Tokens per second"}


@dataclass
class Curves:
    """The numbers of a `metrics.jsonl` so far.

    Attributes:
        path: the file.
        columns: name -> (steps, values), float64 [L] each; learning rates are named `lr GROUP`.
        last: the step of the last line of training, and those of its `FIGURES` that are numbers.
        most: number of steps of the run; None if unknown.
        recent: seconds of the last steps.
    """

    path: Path
    columns: dict[str, tuple[array, array]] = field(default_factory=dict)
    last: dict[str, Any] = field(default_factory=dict)
    most: int | None = None
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _offset: int = 0
    _file: tuple[int, int] = (0, 0)

    def update(self) -> bool:
        """Read the lines that were added since the last call. Returns whether there were any.

        A resumed run cuts lines: a file that became shorter or was replaced is read from its start.
        """
        try:
            with opened(self.path) as file:
                found = os.fstat(file.fileno())
                if self._file != (found.st_dev, found.st_ino) or found.st_size < self._offset:
                    self.columns, self.last, self.most = {}, {}, None
                    self.recent.clear()
                    self._offset, self._file = 0, (found.st_dev, found.st_ino)
                if found.st_size == self._offset:
                    return False
                file.seek(self._offset)
                for text in file:
                    if not text.endswith(b"\n"):
                        break
                    self._offset += len(text)
                    self._add(text)
        except OSError:
            return False
        return True

    def _add(self, text: bytes) -> None:
        try:
            line = json.loads(text)
            step = step_of(line)
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        if "eval_loss" in line:
            self._put("eval_loss", step, line["eval_loss"])
            return
        figures = {name: value for name in FIGURES if (value := _figure(line.get(name))) is not None}
        self.last = {"step": step, **figures}
        if 0 <= (seconds := figures.get("step_s", -1.0)) < MOST_SECONDS:
            self.recent.append(seconds)
        most = _figure(line.get("max_steps"))
        if most is not None and 0 < most < MOST_NUMBER:
            self.most = int(most)
        for name in SHOWN:
            self._put(name, step, line.get(name))
        rates = line.get("lr")
        for name, rate in list(rates.items())[:MOST_GROUPS] if isinstance(rates, dict) else ():
            self._put(f"lr {name}", step, rate)

    def _put(self, name: str, step: int, value: Any) -> None:
        figure = _figure(value)
        if figure is not None:
            steps, values = self.columns.setdefault(name, (array("d"), array("d")))
            steps.append(step)
            values.append(figure if abs(figure) < 1e300 else math.nan)

    def series(self, name: str, title: str, *, dots: bool = False, place: int | None = None) -> list[Series]:
        """Return a column as a line of a chart; an empty list if there is none."""
        if name not in self.columns:
            return []
        steps, values = self.columns[name]
        return [Series(name=title, x=np.array(steps), y=np.array(values), dots=dots, place=place)]

    def charts(self) -> list[Chart]:
        """Return the charts of the run, each of at most 500 points."""
        loss = [*self.series("loss", "training"), *self.series("eval_loss", "evaluation", dots=True, place=1)]
        rates = [one for name in self.columns if name.startswith("lr ") for one in self.series(name, name[3:])]
        charts = {
            name: chart(title, loss if name == "loss" else self.series(name, title), from_zero=name != "loss")
            for name, title in SHOWN.items()
        }
        found = [*charts.values(), chart("Learning rate", rates, from_zero=True)]
        return [one for one in found if one is not None]


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A run folder at one moment.

    Attributes:
        record: its `vlft.json`, {} before it is written.
        pid: of the process that trains in it; None if none does; 0 if one does that cannot be named.
        step, most: the last logged step and the number of steps, None if unknown.
        left: seconds that the remaining steps take at the median rate of the last lines; None if unknown, or no step is
            left.
        logged: when the last line was logged, in seconds since the epoch; 0.0 without a log.
        saved: the step of the newest checkpoint; None without one.
    """

    folder: Path
    record: dict[str, Any]
    pid: int | None
    step: int | None
    most: int | None
    left: float | None
    logged: float
    saved: int | None

    @property
    def word(self) -> str:
        """The state of the run, as text."""
        if self.pid is not None:
            return "running"
        training = self.record.get("training")
        if isinstance(training, dict) and training.get("finished"):
            return "finished"
        return "stopped before its last step" if self.record else "no run"


class Runs:
    """The run folders that somebody looks at. Their numbers are kept, so that each look reads what is new."""

    def __init__(self) -> None:
        self._curves: dict[str, Curves] = {}
        self._lock = threading.Lock()

    def curves(self, folder: Path) -> Curves:
        """Return the curves of a run, up to date."""
        with self._lock:
            found = self._curves.setdefault(str(folder), Curves(path=folder / METRICS))
            found.update()
            return found

    def watch(self, folder: str | Path) -> Watched:
        """Look at a run folder."""
        folder = Path(folder)
        curves = self.curves(folder)
        record = document(folder / RECORD)
        step = curves.last.get("step")
        left = None
        if curves.most is not None and step is not None and step < curves.most and len(curves.recent) >= FEW:
            left = (curves.most - step) * statistics.median(curves.recent)
        return Watched(
            folder=folder,
            record=record,
            pid=holder(folder),
            step=step,
            most=curves.most,
            left=left,
            logged=_logged(curves.path),
            saved=saved_step(folder),
        )


def saved_step(folder: Path) -> int | None:
    """Return the step of the newest complete checkpoint of a run folder, which a resumed run starts from."""
    try:
        names = [entry.name for entry in os.scandir(folder)]
    except (OSError, ValueError):
        return None
    numbers = [int(found[1]) for name in names if (found := CHECKPOINT.fullmatch(name))]
    return max((one for one in numbers if (folder / f"checkpoint-{one}" / STATE).is_file()), default=None)


def _logged(path: Path) -> float:
    try:
        return os.stat(path).st_mtime
    except (OSError, ValueError):
        return 0.0


def answered(folder: str | Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Return rows that the run asked at each evaluation, and its notes.

    Returns:
        for each row its file, index, id, turns (role, text), right answer and `media`, the paths of its media; with
        `answers`: (step, text) in order.
    """
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    notes: list[str] = []
    for line in _lines(Path(folder) / ANSWERS):
        try:
            if "note" in line:
                notes.append(str(line["note"]))
            for row in line.get("rows", ()):
                described = _described(row)
                rows.setdefault((described["file"], described["index"]), described)
            for one in line.get("answers", ()):
                rows[one["file"], one["index"]]["answers"].append((step_of(line), str(one["answer"])))
        except (AttributeError, KeyError, TypeError, ValueError):
            continue
    return list(rows.values()), notes


def newest(folder: str | Path) -> list[dict[str, Any]]:
    """Return the rows whose completions a GRPO run wrote last, those of one step.

    Returns:
        for each row its file, index, id, turns, right answer and `media`, the paths of its media; with `said`, its
        completions (`vlft.pages.completions.ranked`).
    """
    found: list[dict[str, Any]] = []
    for line in reversed(list(_lines(Path(folder) / COMPLETIONS, newest=True))):
        try:
            step, said, row = step_of(line), ranked(line), row_of(line)
        except MALFORMED:
            continue
        if found and step != found[0]["said"]["step"]:
            break
        found.append({**row, "media": [medium["path"] for medium in row["media"]], "said": said})
    return found[::-1]


def holder(folder: Path) -> int | None:
    """Return the process that trains in a run folder: None if none does, 0 if its number is unknown.

    Linux lists who holds a lock, which does not disturb a run that takes it at this moment.
    """
    path = folder / LOCK
    try:
        inode = path.stat().st_ino
        table = Path("/proc/locks").read_text(encoding="ascii")
    except OSError:
        return _held(path)
    for line in table.splitlines():
        words = line.split()
        # 1: FLOCK  ADVISORY  WRITE 4242 fd:00:131074 0 EOF   (proc_locks(5))
        if len(words) >= 6 and words[1] == "FLOCK" and words[5].rpartition(":")[2] == str(inode):
            pid = int(words[4])
            if pid <= 0:  # a process of another container
                return _held(path)
            with contextlib.suppress(OSError):
                target = os.path.realpath(path)
                if any(os.readlink(one) == target for one in Path(f"/proc/{pid}/fd").iterdir()):
                    return pid
    return None


def _held(path: Path) -> int | None:
    """Whether the lock is held, as 0 or None, where the system has no list of locks."""
    from vlft.files import lock_handle

    try:
        with opened(path) as file:
            return 0 if lock_handle(file.fileno(), shared=True) is False else None
    except OSError:
        return None


def stop(pid: int) -> None:
    """Ask a run to finish its step, save and end."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, signal.SIGTERM)


def _figure(value: Any) -> float | None:
    """Return a number of a log as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _described(row: Any) -> dict[str, Any]:
    """Return the description of a row with all its keys, whatever else a file holds.

    Raises:
        AttributeError, KeyError, TypeError: it is no description.
    """
    turns, media = row.get("turns"), row.get("media")
    turns = [turn for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    media = [medium.get("path") for medium in media if isinstance(medium, dict)] if isinstance(media, list) else []
    return {
        "file": row["file"],
        "index": row["index"],
        "id": row.get("id"),
        "turns": [{"role": str(turn.get("role", "")), "text": str(turn.get("text", ""))} for turn in turns],
        "right": str(row.get("right", "")),
        "media": [path for path in media if isinstance(path, str)],
        "answers": [],
    }


def _lines(path: Path, *, newest: bool = False) -> Iterator[dict[str, Any]]:
    try:
        text = tail(path, MOST_LINE) if newest else head(path)
    except OSError:
        return
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value
