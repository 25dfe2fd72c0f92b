"""Count what is trained between two logged lines, over all ranks, and write `metrics.jsonl`."""

from __future__ import annotations

import json
import math
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
from vlft.model import cards, flops
from vlft.objectives import Loss, Sums
from vlft.setup import Base
from vlft.train.ranks import gather

#: Work outside steps and evaluations, whose time is measured separately.
Beside = Literal["saving", "report"]
COUNTS = ("tokens", "supervised_tokens", "images", "videos", "samples")
#: Entries of a line that the trainer adds.
TRAINERS = {"step", "epoch", "max_steps", "grad_norm", "lr"}


class Meter:
    """Adds up micro-batches. It reads from the device once in each step, in `read`.

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
        self._totals: list[float] = []
        self._wait = 0.0
        self._work = 0.0
        self._padding = 0
        self._since = time.perf_counter()
        self._next_step()

    def _next_step(self) -> None:
        self._before = dict(self._counts), self._work, self._padding
        self._sums = Sums(names=self.statistics)
        self._read: list[float] | None = None

    def read(self, norm: torch.Tensor | float | None) -> float | None:
        """Read the sums of the step that was added, and the norm of its gradient, from the device in one copy.

        It is the only read in a step: lines are made from these values. The host waits here for the backward pass,
        because a step that is not finite must not reach the optimizer. To read a step later would move weights by it.

        Args:
            norm: a scalar on the device, or what the trainer knows already.

        Returns:
            the norm.
        """
        more = [norm] if isinstance(norm, torch.Tensor) else []
        self._read, found = self._sums.read(*more)
        return found[0] if found else norm  # type: ignore[return-value]

    def keep_step(self) -> None:
        """Keep the counts of the step that was added: it moved the weights."""
        if self._read is None:
            self.read(None)
        step = self._read or []
        self._totals = [a + b for a, b in zip(self._totals or [0.0] * len(step), step, strict=True)]
        self._next_step()

    def drop_step(self) -> None:
        """Drop the counts of the step that was added, but not its time: it moved no weight."""
        self._counts, self._work, self._padding = self._before
        self._next_step()

    def add(self, batch: Batch, loss: Loss, *, padding: int = 0) -> None:
        """Count one trained micro-batch and its loss. Nothing is read from the device.

        Args:
            batch: its counts are added.
            loss: of the micro-batch.
            padding: positions of the forward that hold no token; flat rows have none.
        """
        for name in COUNTS:
            self._counts[name] += batch["counts"][name]
        self._padding += padding
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

    def line(self, *, steps: int) -> dict[str, Any]:
        """Return the sums over all ranks since the last line, and reset them. Every rank must call it.

        Args:
            steps: optimizer steps since the last line.

        Returns:
            The entries of a `metrics.jsonl` line except those in `TRAINERS`; the statistics come last.

        Raises:
            ValueError: a statistic has the name of another entry.
        """
        seconds = time.perf_counter() - self._since
        totals = self._totals or Sums(names=self.statistics).read()[0]
        ranks = gather(([self._wait, self._work, self._padding, *self._counts.values(), *totals], peak_gb()))
        wait, work, padding, *numbers = (sum(values) for values in zip(*(values for values, _ in ranks), strict=True))
        counts = dict(zip(COUNTS, map(int, numbers[: len(COUNTS)]), strict=True))
        means, _ = Sums(names=self.statistics).means(numbers[len(COUNTS) :])
        line = {
            "loss": means.pop("loss"),
            **counts,
            "time": time.time(),
            "step_s": seconds / max(1, steps),
            "data_wait_s": wait / len(ranks),
            "tokens_per_s": counts["tokens"] / seconds,
            "padding_fraction": padding / max(1, counts["tokens"] + padding),
            "peak_gb": max(peak for _, peak in ranks),  # that rank runs out of memory first
            "mfu": work / seconds / (self.peak * len(ranks)) if self.peak else None,
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
        branches = dict[str, Any](batch).get("branches")
        return flops.total(
            flops.required_flops(
                sizes,
                base.towers,
                lengths=batch["lengths"] if batch["rows"] else (),
                vision_lengths=batch["vision_lengths"] if pictures else (),
                window_lengths=meta.get("window_lengths") if pictures else (),
                supervised=batch["counts"]["supervised_tokens"],
                key_lengths=branches["key_lengths"] if branches else None,
            )
        )

    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else None
    peak = cards.peak_tflops(name)
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
        name: of the file; `vlft.train.answers` and `vlft.train.grpo.completions` write others in this format.

    Attributes:
        path: of the file.
        last_step: step of the last line that is kept; None if there is none.
    """

    def __init__(
        self, folder: str | Path, *, resume_step: int, evaluation_due: bool = False, name: str = "metrics.jsonl"
    ) -> None:
        self.path = Path(folder) / name
        self.last_step: int | None = None
        kept = []
        if resume_step and self.path.exists():
            for text in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    line = json.loads(text)
                    late = evaluation_due and "loss" not in line
                    if line["step"] <= resume_step - late:
                        kept.append(text + "\n")
                        self.last_step = line["step"]
                except (json.JSONDecodeError, KeyError, TypeError):
                    break  # a kill during a write left an incomplete line; all lines after it are later
        write_text(self.path, "".join(kept))

    def write(self, line: dict[str, Any]) -> None:
        # A metric of the user may apply to no answer of an evaluation, and JSON has no NaN.
        line = {name: None if _is_nan(name, value) else value for name, value in line.items()}
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(line) + "\n")


def _is_nan(name: str, value: Any) -> bool:
    return name.startswith("eval_") and isinstance(value, float) and not math.isfinite(value)
