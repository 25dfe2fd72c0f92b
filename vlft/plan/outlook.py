"""What `vlft plan` says of memory and time, as JSON and as text. `vlft.plan.memory` computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vlft.model.cards import PREDICTED
from vlft.model.tracing import Load
from vlft.plan.change import Change
from vlft.plan.estimate import PARTS, Memory
from vlft.plan.measure import MeasuredStep
from vlft.plan.sampling import Sampling
from vlft.text import counted, duration, printable, table

Rate = Literal["given", "measured", "predicted"]
SHOWN_ROWS = 2
_PREDICTED = "predicted from the card's data sheet, without communication; not measured"
_WORDS = {
    "vision": "activations, vision",
    "merger": "activations, merger",
    "language": "activations, language",
    "working": "one block at work",
    "context": "CUDA",
    "reserve": "fragments, reserve",
}
_TITLES = ("", "weights", "gradients", "optimizer", "activations", "in all", "host", "checkpointing")


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """Memory and time of a run.

    Attributes:
        card: name of the card.
        world: number of processes.
        load: the largest micro-batch.
        rows: rows of the micro-batch that needs the most memory, the largest first, as (row, tokens, patches).
        memory: with the flags of the run.
        without_checkpointing: no tower recomputes its activations.
        with_checkpointing: all towers recompute their activations.
        auto: towers that `--gradient_checkpointing auto` would choose.
        strategies: under each sharding strategy.
        change: the mildest change that makes the run fit; None if it fits, or if nothing known helps.
        measured: a measured step; None without `--measure`.
        measured_estimate: the estimate for the measured step.
        hours: duration of all steps; None without a rate.
        tokens_per_s: the rate, over all processes.
        rate: where the rate is from: `given`, `measured`, or `predicted` from the card's data sheet, without the
            communication of several processes.
        with_reference: whether `hours` include the reference of preference rows.
        sampling: what a step samples (GRPO); None for other methods.
    """

    card: str
    world: int
    load: Load
    rows: tuple[tuple[str, int, int], ...]
    memory: Memory
    without_checkpointing: Memory
    with_checkpointing: Memory
    auto: tuple[str, ...]
    strategies: tuple[Memory, ...]
    change: Change | None
    measured: MeasuredStep | None
    measured_estimate: Memory | None
    hours: float | None
    tokens_per_s: float | None
    rate: Rate | None
    with_reference: bool = False
    sampling: Sampling | None = None

    def as_json(self) -> dict[str, Any]:
        """The "memory" of `vlft plan --json`; sizes are bytes of one process."""
        return {
            "gpu": self.card,
            "gpus": self.world,
            "micro_batch": {
                "tokens": self.load.tokens,
                "patches": self.load.patches,
                "rows": [{"row": row, "tokens": tokens, "patches": patches} for row, tokens, patches in self.rows],
            },
            **self.memory.as_json(),
            "auto": list(self.auto),
            "without_checkpointing": self.without_checkpointing.as_json(),
            "with_checkpointing": self.with_checkpointing.as_json(),
            "strategies": [one.as_json() for one in self.strategies],
            "change": None if self.change is None else self.change.as_json(),
            "measured": None if self.measured is None else self.measured.as_json(),
            "measured_estimate": None if self.measured_estimate is None else self.measured_estimate.as_json(),
            "hours": self.hours,
            "tokens_per_s": self.tokens_per_s,
            "rate": self.rate,
        }

    def as_lines(self) -> list[str]:
        """The report as lines of text."""
        memory = self.memory
        checkpointing = " and ".join(memory.checkpointing) or "off"
        auto = " and ".join(self.auto) or "off"
        status = "" if self.measured else "; estimated, not yet compared with a GPU"
        lines = [
            "",
            f"memory of one process in GB, of {memory.card / 1e9:.1f} ({self.card}){status}:",
            f"  {memory.strategy}, gradient checkpointing: {checkpointing} (auto would choose: {auto})",
        ]
        rows = [(_WORDS.get(part, part), _gb(size), "") for part in PARTS if (size := getattr(memory, part))]
        if self.sampling is not None:
            rows.append(("cache while sampling", _gb(memory.sampling), "instead of gradients and activations"))
        rows.append(("in all", _gb(memory.total), _verdict(memory)))
        lines.append(table(("", "", ""), rows, indent=4, last="left"))
        largest_rows = ", ".join(
            f"{printable(row)} ({tokens:,} tokens, {patches:,} patches)"
            for row, tokens, patches in self.rows[:SHOWN_ROWS]
        )
        more = f" and {len(self.rows) - SHOWN_ROWS:,} more rows" if len(self.rows) > SHOWN_ROWS else ""
        lines += [
            f"  without gradient checkpointing {_gb(self.without_checkpointing.total)}, "
            f"with it everywhere {_gb(self.with_checkpointing.total)}",
            f"  largest micro-batch: {self.load.tokens:,} tokens, {self.load.patches:,} patches",
            f"    its rows: {largest_rows}{more}",
        ]
        if self.sampling is not None:
            lines.append(
                f"  sampled at once: {counted(self.sampling.completions, 'completion')} of up to "
                f"{self.sampling.prompt:,} + {self.sampling.completion:,} tokens"
            )
        if self.strategies:
            strategies = table(_TITLES, [_strategy(one) for one in self.strategies], indent=4, last="left")
            lines += [f"  each strategy on {counted(self.world, 'process')}:", strategies]
        if not memory.fits:
            lines.append(
                "  no known change makes it fit: use a larger card, more cards or smaller pictures (--image_max_pixels)"
                if self.change is None
                else f"  it fits with {self.change.flags}: {_gb(self.change.memory.total)}"
            )
        lines += self._measured_lines()
        if self.hours is not None:
            how = "" if self.rate != "predicted" else f" ({_PREDICTED})"
            time = duration(3600 * self.hours)
            what = "steps and reference" if self.with_reference else "steps"
            most = "" if self.sampling is None else "at most "
            lines.append(f"time: {most}{time} of {what} at {self.tokens_per_s:,.0f} tokens a second{how}")
        elif self.sampling is not None:
            lines.append(
                "time: not predicted, because it is not known how long sampling takes. Give the tokens_per_s of "
                "metrics.jsonl of a GRPO run with --tokens_per_s"
            )
        else:
            lines.append(
                f"time: not predicted. It needs bf16 and a card whose peak is listed ({', '.join(PREDICTED)}). Give "
                "the rate of a run with --tokens_per_s"
            )
        return lines

    def _measured_lines(self) -> list[str]:
        expected = self.measured_estimate
        if self.measured is None or expected is None:
            return []
        rows = []
        for part in ("weights", "gradients", "optimizer", "vision", "merger", "language"):
            real, estimated = getattr(self.measured, part), getattr(expected, part)
            if real or estimated:
                rows.append((_WORDS.get(part, part), _gb(real), _gb(estimated)))
        if self.measured.peak is not None:
            tensors = expected.total - expected.reserve - expected.context
            rows.append(("peak, tensors alone", _gb(self.measured.peak), _gb(tensors)))
        return [
            "  one real step on the largest micro-batch:",
            table(("", "measured", "estimated"), rows, indent=4),
        ]


def _strategy(memory: Memory) -> tuple[str, ...]:
    """One row of the table with the header `_TITLES`."""
    activations = memory.vision + memory.merger + memory.language + memory.working
    sizes = (memory.weights, memory.gradients, memory.optimizer, activations, memory.total, memory.host)
    checkpointing = " and ".join(memory.checkpointing) or "off"
    return (memory.strategy, *map(_gb, sizes), checkpointing + ("" if memory.fits else "  does not fit"))


def _gb(size: int) -> str:
    """Bytes as GB, with two decimals for 0.1 GB and more and with four below."""
    return f"{size / 1e9:.2f}" if size >= 1e8 or not size else f"{size / 1e9:.4f}"


def _verdict(memory: Memory) -> str:
    left = (memory.card - memory.total) / 1e9
    return f"fits, {left:.1f} to spare" if memory.fits else f"does not fit: {-left:.1f} too much"
