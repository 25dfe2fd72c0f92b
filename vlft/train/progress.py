"""Show how far a run is: a bar on a terminal, a line every minute elsewhere, and when the run will end.

The estimate includes the evaluations and checkpoints that are still to come (`Pace`).
Neighbours: `vlft.train.trainer` reports what it does, `vlft.screen` draws the bar, `vlft.train.metrics` counts.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainerCallback

from vlft import screen
from vlft.screen.row import Bar, Part, Row, clock, eta
from vlft.text import duration

#: Statistics of an objective that are shown beside its loss, with their names there.
SHOWN = {"reward": "reward", "rewards/accuracies": "accuracy", "rewards/margins": "margin"}
#: Work between steps, which takes time of its own.
Aside = Literal["evaluation", "checkpoint"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps after which something is done.

    Attributes:
        every: it is done after each multiple of so many steps; 0: never.
        start: the first step after which it may be done.
        at_end: whether it is also done after the last step.
    """

    every: int
    start: int = 0
    at_end: bool = True

    def count(self, after: int, last: int) -> int:
        """Return how often it is done after steps `after + 1` to `last`, where `last` is the last of the run."""
        low = max(after, self.start - 1)
        if self.every <= 0 or low >= last:
            return 0
        return last // self.every - max(0, low) // self.every + (self.at_end and last % self.every != 0)


def schedules(args: Any, state: Any, *, steps_per_epoch: int) -> dict[Aside, Schedule]:
    """Return when a run evaluates and saves, as transformers' `DefaultFlowCallback` decides it (5.17 and 5.23).

    `--save_strategy best` saves after evaluations that no one can foresee, so it is left out.

    Args:
        args: the training flags.
        state: transformers' state of the trainer, with steps in place of shares.
        steps_per_epoch: optimizer steps of an epoch.
    """
    by_epoch = Schedule(every=steps_per_epoch)
    never = Schedule(every=0)
    evaluation, saving = str(args.eval_strategy.value), str(args.save_strategy.value)
    delay = args.eval_delay * (steps_per_epoch if evaluation == "epoch" else 1)
    start = math.ceil(delay)
    return {
        "evaluation": {
            "steps": Schedule(every=int(state.eval_steps or 0), start=start),
            "epoch": Schedule(every=steps_per_epoch, start=start),
        }.get(evaluation, never),
        "checkpoint": {"steps": Schedule(every=int(state.save_steps or 0)), "epoch": by_epoch}.get(saving, never),
    }


class Pace:
    """Estimates the rest of a run from the mean durations of its steps, evaluations and checkpoints so far.

    The first step is slower than the others, so it counts only while it is the only one. An evaluation or checkpoint
    counts once one was measured.

    Args:
        step: the step at which the run starts or resumes.
        last: its last step.
        plan: when it evaluates and saves.
        now: returns the time in seconds.
    """

    def __init__(
        self, *, step: int, last: int, plan: Mapping[Aside, Schedule], now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.began = now()
        self.last = last
        self._plan = plan
        self._now = now
        self._start = self._step = step
        self._asides: dict[Aside, list[float]] = {"evaluation": [], "checkpoint": []}
        self._done: dict[Aside, int] = dict.fromkeys(self._asides, step)  # the last step after which it was done
        self._counted_from = self.began  # after the first step: its end
        self._others = 0.0  # seconds of asides since then
        self._step_s: float | None = None
        self._at = self.began  # when the last step or aside ended

    def stepped(self, step: int) -> None:
        """Record that a step has ended."""
        self._step, self._at = step, self._now()
        steps = step - self._start
        self._step_s = (self._at - self._counted_from - self._others) / max(1, steps - 1)
        if steps == 1:
            self._counted_from, self._others = self._at, 0.0

    def took(self, what: Aside, step: int, seconds: float) -> None:
        """Record an evaluation or a checkpoint after this step."""
        self._asides[what].append(seconds)
        self._done[what] = step
        self._others += seconds
        self._at += seconds

    def exclude(self, seconds: float) -> None:
        """Leave out time before the first step that is no part of it."""
        self._counted_from += seconds

    def left(self) -> float | None:
        """Return the seconds until the run ends; None before the first step has ended."""
        if self._step_s is None:
            return None
        steps = (self.last - self._step) * self._step_s
        asides = sum(
            sum(seconds) / len(seconds) * self._plan[what].count(self._done[what], self.last)
            for what, seconds in self._asides.items()
            if seconds
        )
        return max(0.0, steps + asides - (self._now() - self._at))


def facts(line: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return loss, learning rates and tokens per second of a line of metrics, as text."""
    rates = "/".join(f"{rate:.2g}" for rate in dict.fromkeys(line["lr"].values()))
    loss = "left out" if line["loss"] is None else f"{line['loss']:.4f}"
    return f"loss {loss}", f"lr {rates}", f"{line['tokens_per_s']:,.0f} tok/s"


def as_text(line: Mapping[str, Any], *, left: float | None) -> str:
    """Return a line of metrics as text for a log.

    Args:
        line: of `metrics.jsonl`.
        left: seconds until the run ends; None if unknown.
    """
    norm = f"grad {line['grad_norm']:.3g}" if line["grad_norm"] is not None else ""
    loss, rates, speed = facts(line)
    place = _place(line["step"], line["max_steps"])
    return "  ".join(filter(None, [place, loss, *statistics(line), norm, rates, speed, eta(left)]))


def statistics(line: Mapping[str, Any], *, before: str = "") -> list[str]:
    """Return the statistics of a line that are shown beside the loss, as text.

    Args:
        line: of `metrics.jsonl`.
        before: what their names begin with: "eval_" in the line of an evaluation.
    """
    found = ((word, line.get(before + name)) for name, word in SHOWN.items())
    return [f"{word} {value:.3g}" for word, value in found if value is not None]


def _place(step: int, last: int) -> str:
    return f"step {step:>{len(str(last))}}/{last}"


class Progress(TrainerCallback):
    """Shows a run on rank 0: a bar where the terminal has one (`vlft.screen`), and lines where stdout is no terminal.

    Args:
        say: prints a line for the user; other ranks print nothing.
        bar: whether a bar may be drawn (not with `--disable_tqdm`).
        steps_per_epoch: optimizer steps of an epoch.
    """

    def __init__(self, *, say: Callable[[str], None], bar: bool, steps_per_epoch: int) -> None:
        self.say = say
        self.pace: Pace | None = None
        self.metrics: tuple[str, ...] = ()  # of answers, which evaluations also show
        self._live = screen.active() if bar else None
        self._lines = self._live is None or not sys.stdout.isatty()
        self._steps_per_epoch = steps_per_epoch
        self._step = 0
        self._line: Mapping[str, Any] | None = None
        self._doing = ""
        self._told: float | None = None  # when the last line of metrics was printed
        self._heard = time.monotonic()  # when the last line of any kind was printed

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._heard = time.monotonic()
        plan = schedules(args, state, steps_per_epoch=self._steps_per_epoch)
        self._step = state.global_step
        self.pace = Pace(step=state.global_step, last=state.max_steps, plan=plan)
        screen.stage("")
        if self._live is not None:
            self._live.show(self._row)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.pace is None:
            return
        self._step = state.global_step
        self.pace.stepped(self._step)
        if self._told is None and self._lines and not control.should_log:
            # With sparse log lines, the first one may come hours later.
            self._told = self._heard = time.monotonic()
            seconds = duration(time.perf_counter() - self.pace.began)
            self.say(f"{_place(self._step, state.max_steps)}  done after {seconds}")

    def close(self) -> None:
        """Leave the bar on the terminal as it is. Call it when training ends, for whatever reason."""
        if self._live is not None and self.pace is not None:
            self._live.leave()
        self.pace = None

    def logged(self, line: Mapping[str, Any]) -> None:
        """Show a line of metrics; on a log, if it is the first or the last of the run or the last was a minute ago."""
        self._line = line
        now = time.monotonic()
        if self._lines and (
            self._told is None or now - self._told >= screen.MINUTE or line["step"] >= line["max_steps"]
        ):
            self._told = self._heard = now
            self.say(as_text(line, left=None if self.pace is None else self.pace.left()))

    def evaluated(self, line: Mapping[str, Any]) -> None:
        """Show the line of metrics of an evaluation."""
        found = [f"loss {line['eval_loss']:.4f}", *statistics(line, before="eval_")]
        found += [f"{name} {line[key]:.4f}" for name in self.metrics if (key := f"eval_{name}") in line]
        self.say(f"  evaluation after step {line['step']:,}: {', '.join(found)}")

    def doing(self, what: str) -> None:
        """Show what the run does between two steps, on a log once a minute; "" for training."""
        self._doing = what
        now = time.monotonic()
        if what and self._lines and now - self._heard >= screen.MINUTE:
            self._heard = now
            self.say(f"  {what}")

    def exclude(self, seconds: float) -> None:
        """Leave out of the estimate what was done before the first step."""
        if self.pace is not None:
            self.pace.exclude(seconds)

    @contextlib.contextmanager
    def aside(self, what: Aside, step: int, *, doing: str) -> Iterator[None]:
        """Measure an evaluation or a checkpoint, for the estimate. It does not count if it ends in an exception.

        Args:
            what: the kind of work.
            step: the last step before it.
            doing: what the bar shows meanwhile.
        """
        start = time.perf_counter()
        self.doing(doing)
        try:
            yield
        finally:
            self.doing("")
        if self.pace is not None:
            self.pace.took(what, step, time.perf_counter() - start)

    def _row(self) -> Row:
        """The bar at this moment. Called by the thread that draws."""
        pace = self.pace
        if pace is None:
            return Row(parts=())
        loss, rates, speed = ("", "", "") if self._line is None else facts(self._line)
        return Row(
            parts=(
                Part(text=f"{self._step}/{pace.last}"),
                Bar(share=self._step / max(1, pace.last), rank=4),
                Part(text=self._doing, rank=2),
                Part(text=loss, rank=1 if not self._doing else 3),
                Part(text=rates, rank=7),
                Part(text=speed, rank=5),
                Part(text=clock(time.perf_counter() - pace.began), rank=6),
                Part(text=eta(pace.left()), rank=1),
            )
        )
