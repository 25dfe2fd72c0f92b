"""Plan a run without running it: what trains at which rate, the number of rows and steps, and the memory.

It writes nothing. It loads no weights, because the model is built on the meta device; only `--measure` loads them. It
refuses everything that training refuses before its first step, except for the output folder. With `--gpu`, which names
the card of another machine, this machine's device and kernels are not checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlft.config.machine import check_device, remarks_on_steps
from vlft.config.parse import Parsed
from vlft.data.order import Order, PackOrder
from vlft.data.sample import Cost, Sample
from vlft.errors import ConfigError
from vlft.model import groups, kernels
from vlft.model.forward import PixelScale
from vlft.model.load import check_fit, empty_model
from vlft.model.towers import apply_towers
from vlft.plan.memory import Outlook, forecast
from vlft.setup import MeasuredRows, open_base, trainable_rows, training_rows
from vlft.setup.overlap import overlap
from vlft.setup.schedule import described, settings_of, training_order
from vlft.text import counted, printable


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

    @property
    def longest(self) -> tuple[Sample, Cost]:
        """The row with the most tokens."""
        place = int(self.data.costs.tokens.argmax())
        return self.data.rows.samples[place], self.data.costs[place]

    def as_json(self) -> dict[str, Any]:
        """The document of `vlft plan --json`; without packing `packs` is null."""
        sample, cost = self.longest
        return {
            "base": self.base,
            "towers": self.towers,
            "groups": [group.as_json() for group in self.groups],
            "rows": len(self.data.costs),
            "files": _files(self.data),
            "eval_files": _files(self.evaluation) if self.evaluation else [],
            **settings_of(self.order),
            "gpus": self.order.world,
            "epochs": self.epochs,
            "steps_per_epoch": self.order.steps,
            "steps": self.steps,
            "longest": {"file": sample.file, "index": sample.index, "id": sample.id, "tokens": cost.tokens},
            "tokens": sum(cost.tokens for cost in self.data.costs),
            "supervised_tokens": sum(cost.supervised for cost in self.data.costs),
            "packs": len(self.order.first) if isinstance(self.order, PackOrder) else None,
            "notes": list(self.remarks),
            "memory": None if self.outlook is None else self.outlook.as_json(),
        }

    def as_text(self) -> str:
        """The plan as text."""
        sample, cost = self.longest
        name = f" (id {sample.id})" if sample.id is not None else ""
        lines: list[str] = []
        for title, measured in (("train", self.data), ("evaluate", self.evaluation)):
            for file in _files(measured) if measured else []:
                skipped = f", {file['skipped']:,} skipped" if file["skipped"] else ""
                skipped += f", {file['changed']:,} changed to fit (--over_length)" if file["changed"] else ""
                skipped += f", {file['draws_an_epoch']:,} draws an epoch" if "draws_an_epoch" in file else ""
                lines.append(f"{title}: {file['file']}: {file['rows']:,} rows, {file['trained']:,} taken{skipped}")
        lines += [
            f"longest row: {sample.file}[{sample.index}]{name}: {cost.tokens:,} tokens, {cost.patches:,} patches",
            described(self.order),
            f"steps: {self.order.steps:,} an epoch, {self.steps:,} in all ({counted(self.epochs, 'epoch')})",
            *(f"note: {remark}" for remark in self.remarks),
        ]
        memory = self.outlook.as_lines() if self.outlook else ["memory: name a card (--gpu h100) to estimate it"]
        head = [f"base: {printable(self.base)}", "", groups.table(self.groups), ""]
        return "\n".join((*head, *map(printable, lines), *memory))


def plan(
    parsed: Parsed,
    *,
    gpus: int | None,
    gpu: str | None = None,
    measure: bool = False,
    tokens_per_s: float | None = None,
) -> Plan:
    """Plan a run.

    Args:
        parsed: `DataFlags`, `ModelFlags` and `TrainFlags`, in this order.
        gpus: number of processes of the run; None: the number that this one was started with.
        gpu: the card of the run, by name or GB; None: the card of this machine.
        measure: train one real step on the largest micro-batch, on this machine.
        tokens_per_s: rate of the whole run, to compute hours.

    Raises:
        VlftError: training would also refuse the run.
    """
    data, model_flags, args = parsed.flags
    if gpu is None:  # otherwise the run is for another machine
        check_device(args, model_flags.attn, launched=False)
        kernels.check(args.liger, args.device)
    if gpus is not None and gpus != args.world_size > 1:
        raise ConfigError(f"--gpus {gpus}, but {args.world_size} processes were started. Drop --gpus.")
    world = gpus or args.world_size
    base = open_base(data, model_flags, given=parsed.given)
    PixelScale.of(base.processor)
    check_fit(base.folder, base.family)
    model = empty_model(base.config, base.family)
    if measure and gpu is not None:
        raise ConfigError(
            f"--measure runs on this machine's device, and --gpu {gpu} names another card. Drop one of the two."
        )
    wrapped = apply_towers(model, base.family, base.towers, masters=False)
    table = groups.parameter_groups(
        wrapped,
        base.family,
        learning_rates=args.learning_rates,
        weight_decay=args.weight_decay,
    )
    workers = args.dataloader_num_workers
    measured = training_rows(data, base, workers=workers)
    evaluation = trainable_rows(data.eval_path, data, base, workers=workers) if data.eval_path else None
    order = training_order(measured.costs, data, args, world=world)
    steps = args.total_steps(order.steps)
    outlook = forecast(
        base,
        wrapped,
        args,
        model_flags,
        measured,
        order,
        given=parsed.given,
        gpu=gpu,
        real=measure,
        tokens_per_s=tokens_per_s,
        steps=steps,
    )
    return Plan(
        base=str(model_flags.model_id),
        towers=dict(base.towers.modes),
        groups=tuple(table),
        data=measured,
        evaluation=evaluation,
        order=order,
        steps=steps,
        epochs=steps / order.steps if args.max_steps > 0 else args.num_train_epochs,
        remarks=(
            *measured.notes,
            *(evaluation.notes if evaluation else ()),
            *(overlap(measured.marked, evaluation.marked) if evaluation else ()),
            *remarks_on_steps(args, steps),
        ),
        outlook=outlook,
    )


def _files(measured: MeasuredRows) -> list[dict[str, Any]]:
    """For each file: the number of rows read, used, skipped and changed."""
    refused = [row.file for row in measured.rows.bad]
    changed, drawn = [sample.file for sample, _ in measured.changed], measured.drawn
    counts: Mapping[str, int] = measured.rows.counts
    return [
        {
            "file": file,
            "rows": rows,
            "trained": drawn[file].rows if file in drawn else rows - refused.count(file),
            "skipped": refused.count(file),
            "changed": changed.count(file),
            **({"draws_an_epoch": drawn[file].draws} if file in drawn else {}),
        }
        for file, rows in counts.items()
    ]
