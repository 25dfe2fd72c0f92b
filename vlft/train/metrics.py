"""Count what is trained between two logged lines, over all ranks, and write `metrics.jsonl`."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from vlft.config.training import TrainFlags
from vlft.data.collate import Batch
from vlft.files import write_text
from vlft.model import flops
from vlft.objectives import Loss, Sums
from vlft.setup import Base

#: Work outside steps and evaluations, whose time is measured separately.
Beside = Literal["saving", "report"]
COUNTS = ("tokens", "supervised_tokens", "images", "videos", "samples")
#: Entries of a line that the trainer adds.
TRAINERS = {"step", "epoch", "max_steps", "grad_norm", "lr"}


class Meter:
    """Adds up micro-batches without reading from the device until a line is due.

    Args:
        work: the number of operations that training on a micro-batch needs.
        peak: the most operations per second of a device; None if unknown, and then there is no MFU.
        statistics: names of the values that the objective counts beside its loss.
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
        """Keep the counts of the step that was added: it moved the weights."""
        self._before = dict(self._counts), self._sums, self._work

    def drop_step(self) -> None:
        """Drop the counts of the step that was added, but not its time: it moved no weight."""
        self._counts, self._sums, self._work = dict(self._before[0]), *self._before[1:]

    def add(self, batch: Batch, loss: Loss) -> None:
        """Count one trained micro-batch and its loss."""
        for name in COUNTS:
            self._counts[name] += batch["counts"][name]
        if self.peak is not None:
            self._work += self.work(batch)
        self._sums = self._sums.plus(loss)

    def add_wait(self, seconds: float) -> None:
        """Add the time that a step waited for its data."""
        self._wait += seconds

    def exclude(self, seconds: float, what: Beside | None = None) -> None:
        """Exclude time from the steps, such as that of an evaluation; `what` adds it to the time of that work."""
        self._since += seconds
        if what is not None:
            self.beside[what] += seconds

    def line(self, accelerator: Any, *, steps: int) -> dict[str, Any]:
        """Return the sums over all ranks since the last line, and reset them. Every rank must call it.

        Args:
            accelerator: reduces over ranks.
            steps: optimizer steps since the last line.

        Returns:
            The entries of a `metrics.jsonl` line except those in `TRAINERS`; the statistics come last.

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
        # The maximum over ranks: that rank runs out of memory first.
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
        """Return the seconds spent outside steps and evaluations since the last line, and reset them."""
        found = {"save_s": self.beside["saving"], "report_s": self.beside["report"]}
        self.beside = dict.fromkeys(self.beside, 0.0)
        return found


def meter_of(base: Base, args: TrainFlags, statistics: tuple[str, ...]) -> Meter:
    """Return the meter of a run; it reports MFU if the peak of the card is known."""
    sizes = base.sizes

    def work(batch: Batch) -> float:
        pictures, meta = len(batch["vision_rows"]) > 0, dict[str, Any](batch["vision_meta"])
        return flops.total(
            flops.required_flops(
                sizes,
                base.towers,
                lengths=batch["lengths"] if batch["rows"] else (),
                vision_lengths=batch["vision_lengths"] if pictures else (),
                window_lengths=meta.get("window_lengths") if pictures else (),
                supervised=batch["counts"]["supervised_tokens"],
            )
        )

    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else None
    peak = flops.peak_tflops(name)
    return Meter(work, peak=None if peak is None else peak * 1e12, statistics=statistics)


def peak_gb() -> float:
    """The peak memory so far in GB: of the GPU if there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class MetricsFile:
    """`metrics.jsonl`: one object per logged step; on resume the lines after the checkpoint's step are cut.

    Args:
        folder: the run folder.
        resume_step: step of the checkpoint from which the run resumes, 0 for none.
        evaluation_due: whether the evaluation after that step is still to come; its lines are then also cut.
        name: of the file; `vlft.train.answers` writes another file in this format.
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
                    break  # a kill during a write left an incomplete line; all lines after it are later
        write_text(self.path, "".join(kept) if resume_step else "")

    def write(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")
