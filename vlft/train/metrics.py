"""What was trained between two logged lines, over all ranks."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from vlft.data.collate import Batch
from vlft.files import write_text
from vlft.objectives import Loss, Sums

#: What takes time beside steps and evaluations, and is measured apart.
Beside = Literal["saving", "report"]
COUNTS = ("tokens", "supervised_tokens", "images", "videos", "samples")
#: Entries of a line that are the trainer's.
TRAINERS = {"step", "epoch", "max_steps", "grad_norm", "lr"}


class Meter:
    """Adds up micro-batches without reading from the device until a line is due.

    Args:
        work: operations that training on a micro-batch needs.
        peak: operations a second that a device can do at most; None where that is not known, and there is no MFU.
        statistics: names of what the objective counts beside its loss.
    """

    def __init__(self, work: Callable[[Batch], float], *, peak: float | None, statistics: tuple[str, ...] = ()) -> None:
        self.work = work
        self.peak = peak
        self.statistics = statistics
        self.beside: dict[Beside, float] = {"saving": 0.0, "report": 0.0}  # seconds since the last line
        self._reset()

    def _reset(self) -> None:
        self._counts = dict.fromkeys(COUNTS, 0)
        self._sums = Sums(names=self.statistics)
        self._wait = 0.0
        self._work = 0.0
        self._since = time.perf_counter()
        self.keep_step()

    def keep_step(self) -> None:
        """The step that was added moved the weights."""
        self._before = dict(self._counts), self._sums, self._work

    def drop_step(self) -> None:
        """The step that was added did not: its rows were not trained, though it took its time."""
        self._counts, self._sums, self._work = dict(self._before[0]), *self._before[1:]

    def add(self, batch: Batch, loss: Loss) -> None:
        """Count one trained micro-batch and what the objective made of it."""
        for name in COUNTS:
            self._counts[name] += batch["counts"][name]
        if self.peak is not None:
            self._work += self.work(batch)
        self._sums = self._sums.plus(loss)

    def add_wait(self, seconds: float) -> None:
        """Time the step waited for its data."""
        self._wait += seconds

    def exclude(self, seconds: float, what: Beside | None = None) -> None:
        """Time spent on evaluating and saving, which is no part of a step; `what` enters it into the accounts."""
        self._since += seconds
        if what is not None:
            self.beside[what] += seconds

    def line(self, accelerator: Any, *, steps: int) -> dict[str, Any]:
        """The sums over all ranks since the last line, and start anew. Every rank must call it.

        Args:
            accelerator: reduces over ranks.
            steps: optimizer steps since the last line.

        Returns:
            the entries of a `metrics.jsonl` line that this class knows, the statistics last.

        Raises:
            ValueError: a statistic has the name of another entry.
        """
        seconds = time.perf_counter() - self._since
        mine = torch.tensor([self._wait, self._work, *self._counts.values()], dtype=torch.float64)
        vector = torch.cat([mine.to(accelerator.device), self._sums.as_vector(accelerator.device)])
        # float64 holds every count exactly
        wait, work, *numbers = accelerator.reduce(vector, reduction="sum").tolist()
        counts = dict(zip(COUNTS, map(int, numbers[: len(COUNTS)]), strict=True))
        means, _ = self._sums.means(numbers[len(COUNTS) :])
        # The largest of the ranks: it is the one that runs out.
        peak = accelerator.gather(torch.tensor([peak_gb()], device=accelerator.device)).max().item()
        line = {
            "loss": means.pop("loss"),
            **counts,
            "time": time.time(),
            "step_s": seconds / max(1, steps),
            "data_wait_s": wait / accelerator.num_processes,
            "tokens_per_s": counts["tokens"] / seconds,
            "padding_fraction": 0.0,  # flat rows hold no padding
            "peak_gb": peak,
            "mfu": work / seconds / (self.peak * accelerator.num_processes) if self.peak else None,
            **self.spent(),
        }
        if taken := sorted(set(means) & (set(line) | TRAINERS)):
            raise ValueError(f"statistics {taken} of the objective have names that metrics.jsonl uses already")
        self._reset()
        return line | means

    def spent(self) -> dict[str, float]:
        """Seconds of this process beside steps and evaluations since the last line, and start anew."""
        found = {"save_s": self.beside["saving"], "report_s": self.beside["report"]}
        self.beside = dict.fromkeys(self.beside, 0.0)
        return found


def progress(line: Mapping[str, Any], *, seconds_a_step: float) -> str:
    """A line of metrics as the user reads it, with the time that is left."""
    step, last = line["step"], line["max_steps"]
    left = int(seconds_a_step * (last - step))
    lrs = "/".join(f"{lr:.2g}" for lr in dict.fromkeys(line["lr"].values()))
    norm = f"  grad {line['grad_norm']:.3g}" if line["grad_norm"] is not None else ""
    loss = "left out" if line["loss"] is None else f"{line['loss']:.4f}"
    return (
        f"step {step:>{len(str(last))}}/{last}  loss {loss}{norm}  lr {lrs}  "
        f"{line['tokens_per_s']:,.0f} tok/s  ETA {left // 3600}:{left % 3600 // 60:02}:{left % 60:02}"
    )


def peak_gb() -> float:
    """Most memory held so far in GB: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class MetricsFile:
    """`metrics.jsonl`: one object a logged step; on resume the lines after the checkpoint's step are cut.

    Args:
        folder: of the run.
        resume_step: of the checkpoint it goes on from, 0 for none.
        evaluation_due: the evaluation after that step is still to come, so what there is of it is cut, too.
        name: of the file, for others of its kind.
    """

    def __init__(
        self, folder: str | Path, *, resume_step: int, evaluation_due: bool = False, name: str = "metrics.jsonl"
    ) -> None:
        self.path = Path(folder) / name
        kept = []
        if self.path.exists():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                    late = evaluation_due and "loss" not in line
                    if line["step"] <= resume_step - late:
                        kept.append(text + "\n")
                except (json.JSONDecodeError, KeyError, TypeError):
                    break  # a kill in the middle of a write left half a line; all after it is later still
        write_text(self.path, "".join(kept) if resume_step else "")

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
