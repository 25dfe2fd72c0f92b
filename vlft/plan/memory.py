"""The memory and time of a run on a card: the largest rows, the estimate, a measured step, and what helps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import torch

from vlft.config.flags import ModelFlags, PlanFlags
from vlft.config.machine import check_device
from vlft.config.training import TrainFlags
from vlft.data.order import Order, PackOrder, RowOrder
from vlft.data.sample import Cost, Sample
from vlft.errors import ConfigError
from vlft.model import groups, kernels
from vlft.model.apply import apply_towers
from vlft.model.cards import card_bytes
from vlft.model.load import check_fit, empty_model, load_config
from vlft.model.quantise import Packed, packed_of
from vlft.model.quantised_files import QuantisedFiles, is_stored_quantised
from vlft.model.towers import Towers
from vlft.model.tracing import Load
from vlft.plan.change import first_change
from vlft.plan.estimate import (
    Case,
    Memory,
    ParameterBytes,
    estimate,
    of_parts,
)
from vlft.plan.measure import MeasuredStep, measure
from vlft.plan.outlook import Outlook, Rate
from vlft.plan.sampling import sampling_of
from vlft.plan.strategies import Strategy, strategies_for, strategy_of
from vlft.setup import Base, MeasuredRows
from vlft.setup.schedule import largest
from vlft.setup.typical import card_of, load_of, step_of, typical_rows

WITHOUT_BF16 = ("t4", "v100-32")


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
        model,
        base.family,
        **groups.rates(args),
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
    reference: float = 0.0,
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
        reference: what the reference of preference rows adds, in epochs.

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
    load = replace(
        _of_rows([rows.costs[i] for i in worst], tokens=tokens), vision_lengths=(patches,) if patches else ()
    )
    sampling = None
    if isinstance(order, RowOrder) and order.group is not None:
        if real:
            raise ConfigError(
                "--measure with --method grpo: it trains one step on the rows' own answers, not on completions. Drop "
                "it, or run vlft train with --max_steps 2 and read peak_gb in metrics.jsonl."
            )
        completion, micro_batch = base.completion, args.per_device_train_batch_size
        sampling = sampling_of(order, rows.costs, completion=completion, micro_batch=micro_batch)
    packed = _packed(base)
    case = Case(
        config=base.config,
        family=base.family,
        towers=base.towers,
        sizes=ParameterBytes.of(model, packed),
        stored=getattr(base.config, "dtype", None) or torch.float32,
        half=half,
        optim=str(getattr(args.optim, "value", args.optim)),
        optim_args=args.optim_args,
        load=load if sampling is None else sampling.load,
        world=order.world,
        card=size,
        checkpointing=args.checkpointing,
        fused=args.liger != "false" and not cpu,
        delta="torch" if model_flags.linear_attn == "torch" else "fla",
        device="cpu" if cpu else "cuda",
        sampling=sampling,
    )
    load = case.load
    strategy = strategy_of(args.zero)
    planned = estimate(case, strategy, checkpointing="false" if cpu and args.checkpointing == "auto" else None)
    change = None
    if not planned.fits:
        at = max(range(len(rows.costs)), key=lambda i: rows.costs[i].tokens)
        most = max(cost.patches for cost in rows.costs)
        longest = replace(
            _of_rows([rows.costs[at]], tokens=rows.costs[at].tokens), vision_lengths=(most,) if most else ()
        )
        packing = isinstance(order, PackOrder)
        change = first_change(case, strategy, longest=longest, packing=packing, smaller=lambda t: _smaller(base, t))
    found, expected = None, None
    if real:
        samples = [rows.rows.samples[i] for i in worst]
        found = measure(base, args, model_flags, samples, checkpointed=planned.checkpointing)
        vision = tuple(p for i in worst if (p := rows.costs[i].patches))
        mine = replace(load_of([rows.costs[i] for i in worst]), vision_lengths=vision)
        expected = _expected(replace(case, load=mine, world=1), planned.checkpointing)
    rate, how = _rate(base, case, planned.checkpointing, rows, order, card=gpu, given=tokens_per_s, measured=found)
    per_epoch = sum(cost.tokens + (0 if sampling is None else sampling.completion) for cost in rows.costs)
    per_epoch *= 1 if sampling is None else sampling.each
    hours = per_epoch * (steps / order.steps + reference) / rate / 3600 if rate else None
    return Outlook(
        card=name,
        world=order.world,
        load=load,
        rows=tuple((_name(rows.rows.samples[i]), rows.costs[i].tokens, rows.costs[i].patches) for i in worst),
        memory=planned,
        without_checkpointing=estimate(case, strategy, checkpointing="false"),
        with_checkpointing=estimate(case, strategy, checkpointing="true"),
        auto=() if cpu else estimate(case, strategy, checkpointing="auto").checkpointing,
        strategies=() if cpu else tuple(estimate(case, one) for one in _possible(base, case)),
        change=change,
        measured=found,
        measured_estimate=expected,
        hours=hours,
        tokens_per_s=rate,
        rate=how,
        with_reference=reference > 0,
        sampling=sampling,
    )


def _packed(base: Base) -> Packed:
    """What is quantised of the base."""
    if is_stored_quantised(base.folder):
        return QuantisedFiles.of(base.folder, base.family).packed()
    return packed_of(base.family, base.sizes, base.quantisation)


def _possible(base: Base, case: Case) -> list[Strategy]:
    """Strategies that the base can train with. ZeRO-3 cannot split packed weights; GRPO trains without DeepSpeed."""
    if case.sampling is not None:
        return ["ddp"]
    return [one for one in strategies_for(base.family) if base.quantisation is None or not one.startswith("zero3")]


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
) -> tuple[float | None, Rate | None]:
    """Tokens a second of the whole run, and where the figure is from."""
    if given:
        return given, "given"
    if case.sampling is not None:
        return None, None  # how long sampling takes is not known
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


def _of_rows(costs: Sequence[Cost], *, tokens: int) -> Load:
    """A micro-batch of this many tokens that holds these rows. Only preference rows need segments of their own."""
    found = load_of(costs)
    if not found.key_lengths:
        return replace(found, lengths=(tokens,))
    rest = [tokens - found.tokens] if tokens > found.tokens else []
    return replace(found, lengths=(*found.lengths, *rest), key_lengths=(*found.key_lengths, *rest))


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
        apply_towers(empty_model(base.config, base.family), base.family, changed, masters=False),
        _packed(base),
    )


def _name(sample: Sample) -> str:
    return f"{sample.file}[{sample.index}]"
