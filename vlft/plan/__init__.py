"""Plan a run without running it: what trains at which rate, the number of rows and steps, and the memory.

It writes nothing and loads no weights, except for `--measure`. It refuses everything that training refuses before its
first step, except for the output folder. Without a card no memory is estimated, and torch is not imported.
`vlft.plan.memory` estimates the memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vlft.checkpoint import check_sharing
from vlft.config.flags import PlanFlags
from vlft.config.machine import remarks_on_cache, remarks_on_steps
from vlft.config.parse import Parsed
from vlft.data.order import Order, PackOrder
from vlft.data.sample import Cost, Sample
from vlft.errors import ConfigError
from vlft.metrics import find
from vlft.model import chosen, groups
from vlft.model.load import check_shapes, loaded_whole
from vlft.model.scale import PixelScale
from vlft.model.towers import check_experts
from vlft.setup import (
    Base,
    MeasuredRows,
    open_base,
    remarks_on_pixels,
    rows_of_run,
    samples_line,
    start_of,
)
from vlft.setup.choices import trained_tokens
from vlft.setup.features import FeatureForecast, feature_forecast
from vlft.setup.metric_rows import check_metrics
from vlft.setup.overlap import overlap
from vlft.setup.pairs import PairCounts, count_pairs
from vlft.setup.schedule import described, settings_of, training_order
from vlft.text import counted, printable

if TYPE_CHECKING:
    from vlft.config.training import TrainFlags
    from vlft.plan.outlook import Outlook


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a run.

    Attributes:
        base: name of the base, as the flags have it.
        towers: tower -> full, lora or frozen.
        groups: parameter groups with their learning rates.
        data: measured rows for training.
        evaluation: measured rows for evaluation; None without them.
        order: how rows become steps.
        steps: number of optimizer steps.
        epochs: passes over the data.
        remarks: notes for the user.
        outlook: memory and time; None if the card is unknown.
        features: the cache of features; None without it.
        pairs: counts of preference rows; None without them.
        reference: what the reference of preference rows costs, as text; "" if it costs nothing.
        lora: settings of LoRA with the factor of its updates, as text; "" without LoRA.
        scaling: that factor; None without LoRA.
        start: the adapter that the run starts from, as text; None without one.
        lineage: the same for vlft.json.
        choices: lines on chosen blocks and trained tokens.
        blocks: tower -> places of its chosen blocks, only for towers with a choice.
        tokens: trained token -> id.
    """

    base: str
    towers: dict[str, str]
    groups: tuple[groups.Group, ...]
    data: MeasuredRows
    evaluation: MeasuredRows | None
    order: Order
    steps: int
    epochs: float
    remarks: tuple[str, ...]
    outlook: Outlook | None = None
    features: FeatureForecast | None = None
    pairs: PairCounts | None = None
    reference: str = ""
    lora: str = ""
    scaling: float | None = None
    start: str | None = None
    lineage: Mapping[str, Any] | None = None
    choices: tuple[str, ...] = ()
    blocks: Mapping[str, Sequence[int]] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)

    @property
    def longest(self) -> tuple[Sample, Cost]:
        """The row with the most tokens, or the sample that it is split into."""
        place = int(self.data.costs.tokens.argmax())
        return self.data.rows.samples[place], self.data.costs[place]

    def as_json(self) -> dict[str, Any]:
        """The document of `vlft plan --json`; without packing `packs` is null."""
        sample, cost = self.longest
        return {
            "base": self.base,
            "adapter": self.lineage,
            "towers": self.towers,
            "lora_scaling": self.scaling,
            **({"blocks": {tower: list(places) for tower, places in self.blocks.items()}} if self.blocks else {}),
            **({"trained_tokens": dict(self.tokens)} if self.tokens else {}),
            "groups": [group.as_json() for group in self.groups],
            "rows": len(self.data.starts),
            "samples": len(self.data.costs),
            "files": _files(self.data),
            "eval_files": _files(self.evaluation) if self.evaluation else [],
            **settings_of(self.order),
            "gpus": self.order.world,
            "epochs": self.epochs,
            "steps_per_epoch": self.order.steps,
            "steps": self.steps,
            "longest": {"file": sample.file, "index": sample.index, "id": sample.id, "tokens": cost.tokens},
            "pairs": None if self.pairs is None else self.pairs.as_json(),
            "tokens": sum(cost.tokens for cost in self.data.costs),
            "supervised_tokens": sum(cost.supervised for cost in self.data.costs),
            "packs": len(self.order.first) if isinstance(self.order, PackOrder) else None,
            "notes": list(self.remarks),
            "vision_cache": None if self.features is None else self.features.as_json(),
            "memory": None if self.outlook is None else self.outlook.as_json(),
        }

    def as_text(self) -> str:
        """The plan as text."""
        sample, cost = self.longest
        name = f" (id {sample.id})" if sample.id is not None else ""
        one = "sample" if self.data.split else "row"
        lines: list[str] = []
        for title, measured in (("train", self.data), ("evaluate", self.evaluation)):
            for file in _files(measured) if measured else []:
                skipped = f", {file['skipped']:,} skipped" if file["skipped"] else ""
                skipped += f", {file['held_out']:,} held out (--eval_split)" if "held_out" in file else ""
                skipped += f", {file['changed']:,} changed to fit (--over_length)" if file["changed"] else ""
                skipped += f", {file['draws_an_epoch']:,} draws an epoch" if "draws_an_epoch" in file else ""
                lines.append(f"{title}: {file['file']}: {file['rows']:,} rows, {file['trained']:,} taken{skipped}")
        lines += [
            *([samples_line(self.data)] if self.data.split else []),
            f"longest {one}: {sample.file}[{sample.index}]{name}: {cost.tokens:,} tokens, {cost.patches:,} patches",
            *([] if self.pairs is None else [self.pairs.as_line()]),
            described(self.order, one=one),
            f"steps: {self.order.steps:,} an epoch, {self.steps:,} in all ({counted(self.epochs, 'epoch')})",
            *([self.reference] if self.reference else []),
            *([] if self.features is None else [self.features.as_line()]),
            *(f"note: {remark}" for remark in self.remarks),
        ]
        memory = self.outlook.as_lines() if self.outlook else ["memory: name a card (--gpu h100) to estimate it"]
        starts = [] if self.start is None else [f"starts from the adapter {printable(self.start)}"]
        notes = (*self.choices, *([self.lora] if self.lora else []))
        head = [f"base: {printable(self.base)}", *starts, "", groups.table(self.groups, notes), ""]
        return "\n".join((*head, *map(printable, lines), *memory))


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The flags of `vlft plan` itself.

    Attributes:
        gpus: number of processes of the run; None: the number that this one was started with.
        gpu: the card of the run, by name or GB; None: the card of this machine.
        measure: train one real step on the largest micro-batch, on this machine.
        tokens_per_s: rate of the whole run, to compute hours.
    """

    gpus: int | None = None
    gpu: str | None = None
    measure: bool = False
    tokens_per_s: float | None = None


def plan(parsed: Parsed, asked: Asked = Asked()) -> Plan:
    """Plan a run.

    Args:
        parsed: `DataFlags`, `ModelFlags` and `TrainFlags`, in this order. With `PlanFlags` in place of `TrainFlags` no
            memory is estimated, and torch is imported only if the base needs it.
        asked: the flags of `vlft plan`.

    Raises:
        VlftError: training would also refuse the run.
    """
    data, model_flags, args = parsed.flags
    if isinstance(args, PlanFlags):
        return _without_memory(parsed, asked)
    from vlft.plan.memory import check_machine, forecast, model_of

    if asked.gpu is None:  # otherwise the run is for another machine
        check_machine(args, model_flags)
    world = _world(args, asked)
    base = open_base(data, model_flags, given=parsed.given, start=start_of(model_flags))
    check_experts(base.family, deepspeed=args.zero)
    check_sharing(base.name, base.quantisation, args.zero)
    PixelScale.of(base.processor)
    if asked.measure and asked.gpu is not None:
        raise ConfigError(
            f"--measure runs on this machine's device, and --gpu {asked.gpu} names another card. Drop one of the two."
        )
    with loaded_whole(args):
        model, table = model_of(base, args)
        planned = _plan(parsed, base, table, world=world)
        outlook = forecast(
            base,
            model,
            args,
            model_flags,
            planned.data,
            planned.order,
            given=parsed.given,
            gpu=asked.gpu,
            real=asked.measure,
            tokens_per_s=asked.tokens_per_s,
            steps=planned.steps,
            reference=_reference(planned.pairs, data.method, args, planned)[0],
        )
    return replace(planned, outlook=outlook)


def _without_memory(parsed: Parsed, asked: Asked) -> Plan:
    data, model_flags, args = parsed.flags
    world = _world(args, asked)
    base = open_base(data, model_flags, given=parsed.given, plain=True, start=start_of(model_flags))
    zero = args.deepspeed if isinstance(args, PlanFlags) else args.zero
    check_experts(base.family, deepspeed=zero)
    check_sharing(base.name, base.quantisation, zero)
    PixelScale.of(base.processor)
    if not base.plain:
        from vlft.plan.memory import model_of

        _, table = model_of(base, args)
    else:
        shapes = base.family.layout(base.sizes)
        check_shapes(base.folder, base.family, shapes, tied=base.tied)
        table = groups.groups_of_shapes(
            base.family,
            base.sizes,
            base.towers,
            **groups.rates(args),
        )
    return _plan(parsed, base, table, world=world)


def _world(args: TrainFlags | PlanFlags, asked: Asked) -> int:
    if asked.gpus is not None and asked.gpus != args.world_size > 1:
        raise ConfigError(f"--gpus {asked.gpus}, but {args.world_size} processes were started. Drop --gpus.")
    return asked.gpus or args.world_size


def _plan(parsed: Parsed, base: Base, table: list[groups.Group], *, world: int) -> Plan:
    """Measure the rows and order them."""
    data, model_flags, args = parsed.flags
    workers = args.dataloader_num_workers
    measured, evaluation = rows_of_run(data, base, workers=workers, seed=args.seed)
    if evaluation is not None and (words := parsed.effective.get("eval_metric")):
        check_metrics(find(words), evaluation, base.encoder)
    order = training_order(measured.costs, data, args, world=world)
    steps = args.total_steps(order.steps)
    half = args.bf16 if "bf16" in parsed.given else True  # the default on a GPU
    every = [measured, *([evaluation] if evaluation else [])]
    pairs = count_pairs(measured.costs, base.sizes, base.towers, shared=base.encoder.shared) if data.pairs else None
    planned = Plan(
        base=str(model_flags.model_id),
        towers=dict(base.towers.modes),
        choices=tuple(chosen.described(base.towers, base.sizes)),
        blocks=chosen.blocks_of(base.towers),
        tokens=trained_tokens(base.towers, base.processor.tokenizer),
        groups=tuple(table),
        data=measured,
        evaluation=evaluation,
        order=order,
        steps=steps,
        epochs=steps / order.steps if args.max_steps > 0 else args.num_train_epochs,
        lora=base.towers.as_line(),
        scaling=base.towers.scaling if base.towers.has_lora else None,
        start=None if base.start is None else base.start.described(parsed.given, quantisation=base.quantisation),
        lineage=None if base.start is None else base.start.lineage,
        remarks=(
            *([base.start.origin] if base.start else []),
            *measured.notes,
            *(evaluation.notes if evaluation else ()),
            *(overlap(measured.marked, evaluation.marked) if evaluation else ()),
            *remarks_on_pixels(base, data),
            *remarks_on_steps(args, steps),
            *_remarks_on_method(parsed),
            *remarks_on_cache(args, steps, order.steps),
        ),
        features=feature_forecast(base, args, every, half=bool(half)),
        pairs=pairs,
    )
    return replace(planned, reference=_reference(pairs, data.method, args, planned)[1])


def _reference(pairs: PairCounts | None, method: str, args: TrainFlags | PlanFlags, planned: Plan) -> tuple[float, str]:
    """What the reference of preference rows adds, in epochs of training, and as text."""
    if pairs is None or method != "dpo" or args.reference == "none":
        return 0.0, ""
    share = pairs.reference
    if args.reference == "live":
        text = f"reference: live, in each step: {share:.0%} more operations"
        return share * planned.steps / planned.order.steps, text
    rows, tokens = len(planned.data.costs), int(planned.data.costs.tokens.sum())
    others = 0
    if planned.evaluation is not None:
        rows += len(planned.evaluation.costs)
        others = int(planned.evaluation.costs.tokens.sum())
    added = share * (tokens + others) / tokens
    text = (
        f"reference: one pass without gradients over {counted(rows, 'row')} before the first step, which takes as many "
        f"operations as {added:.2f} epochs (--reference cached)"
    )
    return added, text


def _remarks_on_method(parsed: Parsed) -> list[str]:
    """Name the learning rate of a method that has a default of its own."""
    data, _, args = parsed.flags
    if data.method == "sft" or "learning_rate" in parsed.given:
        return []
    return [
        f"--learning_rate {args.learning_rate:g} is the default of --method {data.method}. It is lower than that of "
        "sft, because the model is trained already."
    ]


def _files(measured: MeasuredRows) -> list[dict[str, Any]]:
    """For each file: the number of rows read, used, skipped and changed."""
    refused = [row.file for row in measured.rows.bad]
    changed = [sample.file for sample, _ in measured.changed]
    drawn, held = measured.drawn, measured.held_out
    counts: Mapping[str, int] = measured.rows.counts
    return [
        {
            "file": file,
            "rows": rows,
            "trained": drawn[file].rows if file in drawn else rows - refused.count(file) - held.get(file, 0),
            "skipped": refused.count(file),
            "changed": changed.count(file),
            **({"held_out": held[file]} if file in held else {}),
            **({"draws_an_epoch": drawn[file].draws} if file in drawn else {}),
        }
        for file, rows in counts.items()
    ]
