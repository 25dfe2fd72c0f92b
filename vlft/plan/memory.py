"""What `vlft plan` says of memory and time: the estimate, who is largest, what helps; in JSON and for a person."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlft.config.flags import ModelFlags, TrainFlags
from vlft.data.order import Order, PackOrder
from vlft.data.sample import Sample
from vlft.model.load import empty_model
from vlft.model.towers import Towers, apply_towers
from vlft.model.tracing import Load
from vlft.plan.cards import card_bytes
from vlft.plan.estimate import (
    PARTS,
    STRATEGIES,
    Case,
    Change,
    Memory,
    ParameterBytes,
    estimate,
    first_change,
    of_parts,
    strategy_of,
)
from vlft.plan.measure import MeasuredStep, measure
from vlft.setup import Base, MeasuredRows
from vlft.setup.schedule import largest
from vlft.text import counted, printable, table

WITHOUT_BF16 = ("t4", "v100-32")
SHOWN_ROWS = 2
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
        card: by name. world: processes.
        load: of the largest micro-batch. rows: of the one that holds most, the largest row first, as (row, tokens,
            patches).
        asked: as the flags say. without, with_: no tower recomputes, and all do. auto: what `--gradient_checkpointing
            auto` would choose. shared: under each way to share.
        change: the mildest that lets it fit, where it does not.
        measured: a real step, beside expected: the estimate for it.
        hours: of all steps at so many tokens_per_s; None without a rate.
    """

    card: str
    world: int
    load: Load
    rows: tuple[tuple[str, int, int], ...]
    asked: Memory
    without: Memory
    with_: Memory
    auto: tuple[str, ...]
    shared: tuple[Memory, ...]
    change: Change | None
    measured: MeasuredStep | None
    expected: Memory | None
    hours: float | None
    tokens_per_s: float | None

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
            **self.asked.as_json(),
            "auto": list(self.auto),
            "without_checkpointing": self.without.as_json(),
            "with_checkpointing": self.with_.as_json(),
            "strategies": [one.as_json() for one in self.shared],
            "change": None if self.change is None else self.change.as_json(),
            "measured": None if self.measured is None else self.measured.as_json(),
            "measured_estimate": None if self.expected is None else self.expected.as_json(),
            "hours": self.hours,
            "tokens_per_s": self.tokens_per_s,
        }

    def as_lines(self) -> list[str]:
        """What a person reads."""
        asked = self.asked
        on = " and ".join(asked.checkpointing) or "off"
        judged = "" if self.measured else "; estimated, not yet compared with a GPU"
        lines = [
            "",
            f"memory of one process in GB, of {asked.card / 1e9:.1f} ({self.card}){judged}:",
            f"  {asked.strategy}, gradient checkpointing: {on} (auto would choose: {' and '.join(self.auto) or 'off'})",
        ]
        rows = [(_WORDS.get(part, part), _gb(size), "") for part in PARTS if (size := getattr(asked, part))]
        rows.append(("in all", _gb(asked.total), _verdict(asked)))
        lines.append(table(("", "", ""), rows, indent=4, last="left"))
        named = ", ".join(
            f"{printable(row)} ({tokens:,} tokens, {patches:,} patches)"
            for row, tokens, patches in self.rows[:SHOWN_ROWS]
        )
        more = f" and {len(self.rows) - SHOWN_ROWS:,} more rows" if len(self.rows) > SHOWN_ROWS else ""
        lines += [
            f"  without gradient checkpointing {_gb(self.without.total)}, with it everywhere {_gb(self.with_.total)}",
            f"  largest micro-batch: {self.load.tokens:,} tokens, {self.load.patches:,} patches",
            f"    its rows: {named}{more}",
        ]
        if self.shared:
            shared = table(_TITLES, [_strategy(one) for one in self.shared], indent=4, last="left")
            lines += [f"  shared by {counted(self.world, 'process')}:", shared]
        if not asked.fits:
            lines.append(
                "  nothing known lets it fit: a larger card, more of them, or smaller pictures (--image_max_pixels)"
                if self.change is None
                else f"  it fits with {self.change.flags}: {_gb(self.change.memory.total)}"
            )
        lines += self._measured_lines()
        if self.hours is not None:
            lines.append(f"time: {self.hours:,.2f} hours of steps at {self.tokens_per_s:,.0f} tokens a second")
        return lines

    def _measured_lines(self) -> list[str]:
        if self.measured is None or self.expected is None:
            return []
        rows = []
        for part in ("weights", "gradients", "optimizer", "vision", "merger", "language"):
            real, told = getattr(self.measured, part), getattr(self.expected, part)
            if real or told:
                rows.append((_WORDS.get(part, part), _gb(real), _gb(told)))
        if self.measured.peak is not None:
            tensors = self.expected.total - self.expected.reserve - self.expected.context
            rows.append(("peak, tensors alone", _gb(self.measured.peak), _gb(tensors)))
        return [
            "  one real step on the largest micro-batch:",
            table(("", "measured", "estimated"), rows, indent=4),
        ]


def _strategy(memory: Memory) -> tuple[str, ...]:
    """A row under `_TITLES`."""
    activations = memory.vision + memory.merger + memory.language + memory.working
    sizes = (memory.weights, memory.gradients, memory.optimizer, activations, memory.total, memory.host)
    checkpointing = " and ".join(memory.checkpointing) or "off"
    return (memory.strategy, *map(_gb, sizes), checkpointing + ("" if memory.fits else "  does not fit"))


def _gb(size: int) -> str:
    """Of large models hundredths are enough."""
    return f"{size / 1e9:.2f}" if size >= 1e8 or not size else f"{size / 1e9:.4f}"


def _verdict(memory: Memory) -> str:
    left = (memory.card - memory.total) / 1e9
    return f"fits, {left:.1f} to spare" if memory.fits else f"does not fit: {-left:.1f} too much"


def forecast(
    base: Base,
    model: torch.nn.Module,
    args: TrainFlags,
    model_flags: ModelFlags,
    rows: MeasuredRows,
    order: Order,
    *,
    given: frozenset[str],
    gpu: str | None,
    real: bool,
    tokens_per_s: float | None,
    steps: int,
) -> Outlook | None:
    """Estimate memory and time; None where neither is asked for and there is no card.

    Args:
        model: built, with its towers; may be on the meta device.
        given: flags the user set. gpu: `--gpu`. real: `--measure`. tokens_per_s: of the whole run.
        steps: in all.

    Raises:
        ConfigError: an unknown card, or a measured step that does not fit.
    """
    cpu = args.device.type == "cpu" and gpu is None
    card = card_bytes(gpu)
    if card is None:
        if not real:
            return None
        card = "this machine's memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    name, size = card
    half = args.half
    if gpu is not None and "bf16" not in given and name not in WITHOUT_BF16:
        half = torch.bfloat16  # as it is by default there
    tokens, patches = largest(order, rows.costs)
    worst = _worst(order, rows)
    supervised = sum(rows.costs[i].supervised for i in worst)
    load = Load(lengths=(tokens,), vision_lengths=(patches,) if patches else (), supervised=supervised)
    case = Case(
        config=base.config,
        family=base.family,
        towers=base.towers,
        sizes=ParameterBytes.of(model),
        stored=getattr(base.config, "dtype", None) or torch.float32,
        half=half,
        optim=str(getattr(args.optim, "value", args.optim)),
        load=load,
        world=order.world,
        card=size,
        checkpointing=args.checkpointing,
        fused=args.liger != "false" and not cpu,
        device="cpu" if cpu else "cuda",
    )
    strategy = strategy_of(args.zero)
    asked = estimate(case, strategy, checkpointing="false" if cpu and args.checkpointing == "auto" else None)
    change = None
    if not asked.fits:
        at = max(range(len(rows.costs)), key=lambda i: rows.costs[i].tokens)
        most = max(cost.patches for cost in rows.costs)
        longest = Load(
            lengths=(rows.costs[at].tokens,),
            vision_lengths=(most,) if most else (),
            supervised=rows.costs[at].supervised,
        )
        packing = isinstance(order, PackOrder)
        change = first_change(case, strategy, longest=longest, packing=packing, smaller=lambda t: _smaller(base, t))
    found, expected = None, None
    if real:
        samples = [rows.rows.samples[i] for i in worst]
        found = measure(base, args, model_flags, samples, checkpointed=asked.checkpointing)
        mine = Load(
            lengths=tuple(rows.costs[i].tokens for i in worst),
            vision_lengths=tuple(p for i in worst if (p := rows.costs[i].patches)),
            supervised=supervised,
        )
        expected = _expected(replace(case, load=mine, world=1), asked.checkpointing)
    rate = tokens_per_s or (found.tokens_per_s * order.world if found else None)
    per_epoch = sum(cost.tokens for cost in rows.costs)
    hours = per_epoch * steps / order.steps / rate / 3600 if rate else None
    return Outlook(
        card=name,
        world=order.world,
        load=load,
        rows=tuple((_name(rows.rows.samples[i]), rows.costs[i].tokens, rows.costs[i].patches) for i in worst),
        asked=asked,
        without=estimate(case, strategy, checkpointing="false"),
        with_=estimate(case, strategy, checkpointing="true"),
        auto=() if cpu else estimate(case, strategy, checkpointing="auto").checkpointing,
        shared=() if cpu else tuple(estimate(case, one) for one in STRATEGIES),
        change=change,
        measured=found,
        expected=expected,
        hours=hours,
        tokens_per_s=rate,
    )


def _expected(case: Case, checkpointed: Sequence[str]) -> Memory:
    """The estimate for a micro-batch whose towers recompute or not as they did when it was measured."""
    return of_parts(case, "ddp", tuple(checkpointed))


def _worst(order: Order, rows: MeasuredRows) -> list[int]:
    """Rows of the largest micro-batch of the first epoch, the largest first; a patch weighs as in most towers."""

    def weight(tokens: int, patches: int) -> int:
        return 4 * tokens + patches

    if isinstance(order, PackOrder):
        pack = max(order.first, key=lambda one: weight(one.tokens, one.patches))
        found = list(pack.rows)
    else:
        many = -(-order.rows_per_step // (order.world * order.accumulation))
        ranked = sorted(range(len(rows.costs)), key=lambda i: -weight(rows.costs[i].tokens, rows.costs[i].patches))
        found = ranked[:many]
    return sorted(found, key=lambda i: -weight(rows.costs[i].tokens, rows.costs[i].patches))


def _smaller(base: Base, towers: Towers) -> tuple[Towers, ParameterBytes] | None:
    """The same run with LoRA where a tower trains in full."""
    modes = {tower: "lora" if mode == "full" else mode for tower, mode in towers.modes.items()}
    if modes == towers.modes:
        return None
    changed = replace(towers, **modes)  # type: ignore[arg-type]
    return changed, ParameterBytes.of(
        apply_towers(empty_model(base.config, base.family), base.family, changed, masters=False)
    )


def _name(sample: Sample) -> str:
    return f"{sample.file}[{sample.index}]"
