"""How rows become optimizer steps: rows or packs per micro-batch, micro-batches per step. Flags and costs -> `Order`.

Opens no file, and trains nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from vlft.config.flags import DataFlags
from vlft.data.costs.columns import Costs
from vlft.data.costs.packing import Budget, pack
from vlft.data.order import Order, PackOrder, RowOrder
from vlft.data.sample import Cost
from vlft.errors import ConfigError
from vlft.text import counted

if TYPE_CHECKING:
    from vlft.config.flags import PlanFlags
    from vlft.config.training import TrainFlags

PACK_TOKENS = 16384
PATCHES_PER_TOKEN = 4  # of a picture


def pack_budget(data: DataFlags) -> Budget | None:
    """The limits of a pack, from the flags; None without packing."""
    if not data.packing:
        return None
    tokens = data.pack_tokens or max(PACK_TOKENS, data.max_length or 0)
    return Budget(tokens=tokens, patches=data.pack_patches or PATCHES_PER_TOKEN * tokens)


def training_order(
    costs: Sequence[Cost],
    data: DataFlags,
    args: TrainFlags | PlanFlags,
    *,
    world: int,
    kept: Mapping[str, Any] | None = None,
) -> Order:
    """The order of a run. `--global_batch` is resolved here, since the number of rows per pack is known only now.

    With packing, the mean number of rows per pack is at most a process's share of `--global_batch`, and a step has the
    number of packs whose rows come closest to it.

    Args:
        costs: of the rows; each fits into `pack_budget`.
        data: flags of the data.
        args: flags of the run.
        world: number of processes.
        kept: `settings_of` the run that this one resumes, with its `asked_for` under "asked"; None for a new run. If
            the same is asked for, the run keeps its packs, on any number of processes.

    Raises:
        ConfigError: `--global_batch` cannot be reached.
    """
    if data.method == "grpo":
        return prompt_order(len(costs), args, world=world)
    budget, wanted = pack_budget(data), args.global_batch
    accumulation = args.gradient_accumulation_steps
    if budget is None:
        at_once = args.per_device_train_batch_size * world
        if wanted is not None:
            if wanted % at_once:
                raise ConfigError(
                    f"--global_batch {wanted} is not a multiple of {at_once} (--per_device_train_batch_size "
                    f"{args.per_device_train_batch_size} x {world} processes). Change one of them."
                )
            accumulation = wanted // at_once
        rows = at_once * accumulation
        return RowOrder(rows=len(costs), rows_per_step=rows, world=world, accumulation=accumulation, seed=args.seed)
    packs_per_step = accumulation * world
    if wanted is not None and kept and kept.get("asked") == asked_for(data, args):
        budget, packs_per_step = Budget(**kept["packing"]), kept["global_batch"]
    elif wanted is not None:
        budget = budget.for_rows(wanted / world, costs)
        packs = pack(costs, budget, seed=args.seed)
        packs_per_step = world * max(1, round(wanted * len(packs) / len(costs) / world))
    return PackOrder(costs=Costs.of(costs), budget=budget, packs_per_step=packs_per_step, world=world, seed=args.seed)


def prompt_order(rows: int, args: TrainFlags | PlanFlags, *, world: int) -> RowOrder:
    """The order of a GRPO run: a row is a prompt, and a micro-batch holds completions.

    `--global_batch` counts prompts, as it counts rows otherwise. `--per_device_train_batch_size` counts completions, as
    in TRL. `vlft.config.grpo` has checked that a step has whole groups.

    Args:
        rows: number of prompts.
        args: flags of the run.
        world: number of processes.
    """
    at_once, group = args.per_device_train_batch_size * world, args.num_generations
    accumulation = args.gradient_accumulation_steps
    if args.global_batch is not None:
        accumulation = args.global_batch * group // at_once
    return RowOrder(
        rows=rows,
        rows_per_step=at_once * accumulation // group,
        world=world,
        accumulation=accumulation,
        seed=args.seed,
        group=group,
    )


def asked_for(data: DataFlags, args: TrainFlags | PlanFlags) -> dict[str, Any]:
    """The limits of a step and of a pack that the flags ask for, before `training_order` adjusts them."""
    budget = pack_budget(data)
    return {"rows": args.global_batch, **({} if budget is None else asdict(budget))}


def evaluation_order(costs: Sequence[Cost], data: DataFlags, args: TrainFlags, *, world: int) -> Order:
    """The order of an evaluation: every row once, and one micro-batch of each process in place of a step."""
    budget = pack_budget(data)
    if budget is None:
        rows = args.per_device_eval_batch_size * world
        return RowOrder(rows=len(costs), rows_per_step=rows, world=world, shuffle=False)
    return PackOrder(costs=Costs.of(costs), budget=budget, packs_per_step=world, world=world, shuffle=False)


def largest(order: Order, costs: Sequence[Cost]) -> tuple[int, int]:
    """The most tokens and the most patches of a micro-batch."""
    if isinstance(order, PackOrder):
        return max(one.tokens for one in order.first), max(one.patches for one in order.first)
    rows = -(-order.rows_per_step * (order.group or 1) // (order.world * order.accumulation))
    found = Costs.of(costs)
    return rows * int(found.tokens.max()), rows * int(found.patches.max())


def settings_of(order: Order) -> dict[str, Any]:
    """The settings that a resumed run must keep, to have the same steps: rows or packs per step, limits of a pack."""
    if isinstance(order, RowOrder):
        return {"global_batch": order.rows_per_step, "packing": None}
    return {"global_batch": order.packs_per_step, "packing": asdict(order.budget)}


def described(order: Order, *, one: str = "row") -> str:
    """The contents of a step, as one line of text.

    Args:
        one: what is ordered: rows, or the samples that they are split into.
    """
    world = order.world
    if isinstance(order, RowOrder):
        batch = order.rows_per_step * (order.group or 1) // (world * order.accumulation)
        if order.group is not None:
            filled = -order.rows % order.rows_per_step
            return (
                f"global batch: {counted(order.rows_per_step, 'prompt')} with {order.group} completions each ({batch} "
                f"completions a micro-batch x {order.accumulation} accumulated x {counted(world, 'process')}); "
                f"{counted(order.steps, 'step')} an epoch"
                + (f", the last one with {counted(filled, 'prompt')} of the first" if filled else "")
            )
        return (
            f"global batch: {counted(order.rows_per_step, one)} ({batch} a micro-batch x {order.accumulation} "
            f"accumulated x {counted(world, 'process')}); {counted(order.steps, 'step')} an epoch"
        )
    packs, most = order.first, order.budget.tokens
    fill = sum(one.tokens for one in packs) / len(packs) / most
    step = f"{counted(order.packs_per_step, 'pack')} ({order.accumulation} accumulated x {counted(world, 'process')})"
    rows = len(order.costs) / order.steps
    return (
        f"packs: {len(packs):,} of up to {most:,} tokens, {fill:.1%} full; global batch: {step}, {rows:,.4g} {one}s on "
        f"average; {counted(order.steps, 'step')} an epoch"
    )
