"""The progress of a run: finished, stopped, stale or running, and for how long its page may stay the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vlft.report.read import Run
from vlft.text import counted

QUIET = 300.0  # seconds without a new line after which a run may be stale, at least
QUIET_MOST = 7200.0  # and at most; a gap may also be the time between a run and its resumption
GAPS = 3.0  # times the longest time between two lines

Word = Literal["finished", "stopped", "stale", "running"]


@dataclass(frozen=True, kw_only=True)
class State:
    """The progress of a run when its page is written.

    Attributes:
        word: `stopped`: it ended before its last step. `stale`: it has written nothing for longer than `patience`.
        step: the last logged step; None before the first.
        of: number of steps, if known.
        left: seconds that the remaining steps take at the rate of the last ones; NaN if unknown.
        quiet: seconds since the run wrote its last line, or its record if it wrote no line.
        patience: seconds without a new line after which the run is stale.
    """

    word: Word
    step: int | None
    of: int | None
    left: float
    quiet: float
    patience: float

    @property
    def progress(self) -> str:
        """The progress as text: `finished after 300 steps`, `running: step 30 of 300`."""
        if self.step is None:
            return f"{self.word}: no step has been logged"
        if self.word == "finished":
            return f"finished after {counted(self.step, 'step')}"
        return f"{self.word}: step {self.step:,}{f' of {self.of:,}' if self.of is not None else ''}"


def state_of(run: Run, *, ended: bool, now: float) -> State:
    """Return the progress of a run.

    Args:
        run: the run.
        ended: the run itself says that it ends now, whether it is finished or not.
        now: seconds since the epoch.
    """
    steps, times = run.lines["step"], run.lines["time"]
    step, most = (int(steps[-1]), run.lines["max_steps"][-1]) if len(steps) else (None, math.nan)
    gaps = np.diff(times[np.isfinite(times)])
    patience = min(max(QUIET, GAPS * float(gaps.max(initial=0.0))), QUIET_MOST)
    quiet = now - run.logged
    word: Word = "stale" if quiet > patience else "running"
    if run.record.training.get("finished"):
        word = "finished"
    elif ended:
        word = "stopped"
    left = math.nan
    if step is not None and word == "running":
        counts = np.diff(steps, prepend=0)
        left = float(run.seconds[-100:].sum() / max(1, counts[-100:].sum()) * (most - step))
    return State(
        word=word,
        step=step,
        of=int(most) if np.isfinite(most) else None,
        left=left,
        quiet=quiet,
        patience=patience,
    )
