"""The memory and time report of `vlft plan`: the estimate, the largest rows, and what helps; as JSON and as text."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from vlft.config.flags import ModelFlags, PlanFlags
from vlft.config.machine import check_device
from vlft.config.training import TrainFlags
from vlft.data.order import Order, PackOrder
from vlft.data.sample import Sample
from vlft.model import groups, kernels
from vlft.model.apply import apply_towers
from vlft.model.cards import card_bytes
from vlft.model.load import check_fit, empty_model, load_config
from vlft.model.towers import Towers
from vlft.model.tracing import Load
from vlft.plan.estimate import (
    PARTS,
    Case,
    Change,
    Memory,
    ParameterBytes,
    estimate,
    first_change,
    of_parts,
)
from vlft.plan.measure import MeasuredStep, measure
from vlft.plan.strategies import strategies_for, strategy_of
from vlft.setup import Base, MeasuredRows
from vlft.setup.schedule import largest
from vlft.setup.typical import card_of, load_of, step_of, typical_rows
from vlft.text import counted, duration, printable, table

WITHOUT_BF16 = ("t4", "v100-32")
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
    rate: Literal["given", "measured", "predicted"] | None

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
            lines.append(f"time: {time} of steps at {self.tokens_per_s:,.0f} tokens a second{how}")
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


def check_machine(args: TrainFlags, model: ModelFlags) -> None:
    """Refuse flags that this machine's device cannot carry out. Raises ConfigError."""
    check_device(args, model.attn, model.linear_attn, launched=False)
    kernels.check(args.liger, args.device)


def model_of(base: Base, args: TrainFlags | PlanFlags) -> tuple[torch.nn.Module, list[groups.Group]]:
    """Build the model on the meta device, with its towers; and its parameter groups.

    Raises:
        CheckpointError: config.json and the weights belong to different models.
        ConfigError: a tower cannot be trained as asked.
    """
    check_fit(base.folder, base.family)
    config, _ = load_config(base.folder)
    model = apply_towers(empty_model(config, base.family), base.family, base.towers, masters=False)
    table = groups.parameter_groups(
        model, base.family, learning_rates=args.learning_rates, weight_decay=args.weight_decay
    )
    return model, table


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
    """Estimate memory and time.

    Args:
        base: the opened base.
        model: built, with its towers; may be on the meta device.
        args: flags of the run.
        model_flags: flags of the run.
        rows: the measured rows.
        order: how rows become steps.
        given: names of the flags that the user set.
        gpu: `--gpu`.
        real: `--measure`.
        tokens_per_s: rate of the whole run.
        steps: number of steps of the run.

    Returns:
        the report; None without a card, `--gpu` and `--measure`.

    Raises:
        ConfigError: the card is unknown, or a measured step does not fit.
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
        half = torch.bfloat16  # the default on such a card
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
        delta="torch" if model_flags.linear_attn == "torch" else "fla",
        device="cpu" if cpu else "cuda",
    )
    strategy = strategy_of(args.zero)
    planned = estimate(case, strategy, checkpointing="false" if cpu and args.checkpointing == "auto" else None)
    change = None
    if not planned.fits:
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
        found = measure(base, args, model_flags, samples, checkpointed=planned.checkpointing)
        mine = Load(
            lengths=tuple(rows.costs[i].tokens for i in worst),
            vision_lengths=tuple(p for i in worst if (p := rows.costs[i].patches)),
            supervised=supervised,
        )
        expected = _expected(replace(case, load=mine, world=1), planned.checkpointing)
    rate, how = _rate(base, case, planned.checkpointing, rows, order, card=gpu, given=tokens_per_s, measured=found)
    per_epoch = sum(cost.tokens for cost in rows.costs)
    hours = per_epoch * steps / order.steps / rate / 3600 if rate else None
    return Outlook(
        card=name,
        world=order.world,
        load=load,
        rows=tuple((_name(rows.rows.samples[i]), rows.costs[i].tokens, rows.costs[i].patches) for i in worst),
        memory=planned,
        without_checkpointing=estimate(case, strategy, checkpointing="false"),
        with_checkpointing=estimate(case, strategy, checkpointing="true"),
        auto=() if cpu else estimate(case, strategy, checkpointing="auto").checkpointing,
        strategies=() if cpu else tuple(estimate(case, one) for one in strategies_for(base.family)),
        change=change,
        measured=found,
        measured_estimate=expected,
        hours=hours,
        tokens_per_s=rate,
        rate=how,
    )


def _rate(
    base: Base,
    case: Case,
    checkpointed: Sequence[str],
    rows: MeasuredRows,
    order: Order,
    *,
    card: str | None,
    given: float | None,
    measured: MeasuredStep | None,
) -> tuple[float | None, Literal["given", "measured", "predicted"] | None]:
    """Tokens a second of the whole run, and where the figure is from."""
    if given:
        return given, "given"
    if measured is not None:
        return measured.tokens_per_s * order.world, "measured"
    device = torch.cuda.get_device_name(0) if card is None and torch.cuda.is_available() else None
    known = card_of(card, device=device)
    if case.device == "cpu" or known is None:
        return None, None
    load = load_of([rows.costs[i] for i in typical_rows(order, rows.costs)])
    step = step_of(
        base, load, card=known, half=case.half, checkpointed=checkpointed, fused=case.fused, delta=case.delta
    )
    if step is None:
        return None, None
    return load.tokens / step.quick().seconds * order.world, "predicted"


def _expected(case: Case, checkpointed: Sequence[str]) -> Memory:
    """The estimate for a measured micro-batch, with the same towers recomputing."""
    return of_parts(case, "ddp", tuple(checkpointed))


def _worst(order: Order, rows: MeasuredRows) -> list[int]:
    """Rows of the largest micro-batch of the first epoch, the largest first; a token counts as much as 4 patches."""

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
    """The same run with LoRA instead of full towers; None if no tower is full."""
    modes = {tower: "lora" if mode == "full" else mode for tower, mode in towers.modes.items()}
    if modes == towers.modes:
        return None
    changed = replace(towers, **modes)  # type: ignore[arg-type]
    return changed, ParameterBytes.of(
        apply_towers(empty_model(base.config, base.family), base.family, changed, masters=False)
    )


def _name(sample: Sample) -> str:
    return f"{sample.file}[{sample.index}]"
