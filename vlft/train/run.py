"""A training run from top to bottom: flags -> base -> rows -> folder -> model -> trainer -> weights."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from vlft import screen
from vlft.checkpoint import check_quantised_run, read_json, read_record, remark_on_carried
from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.machine import check_device, remark_on_numbers, remarks_on_cache, remarks_on_steps
from vlft.config.parse import Parsed
from vlft.config.training import TrainFlags
from vlft.data.costs.cache import cost_folder
from vlft.data.dataset import RowDataset
from vlft.data.order import Order, RowOrder
from vlft.data.workers import workers_end_with_errors
from vlft.model import groups, kernels
from vlft.model.chosen import described as described_choices
from vlft.model.load import check_fit, loaded_whole
from vlft.model.towers import check_experts
from vlft.objectives import Objective
from vlft.objectives.preference import Preference
from vlft.setup import Base, MeasuredRows, open_base, remarks_on_pixels, rows_of_run, start_of
from vlft.setup.features import feature_bytes
from vlft.setup.objective import objective_of
from vlft.setup.overlap import overlap
from vlft.setup.quantised import effective_flags
from vlft.setup.schedule import described, evaluation_order, largest, training_order
from vlft.train import faults, zero
from vlft.train.answers import Answers
from vlft.train.callbacks import AtTheEnd
from vlft.train.claim import record_there, refuse_other
from vlft.train.eval_metrics import EvalMetrics
from vlft.train.features import FeatureCache, check_folder, run_id
from vlft.train.finish import finish
from vlft.train.folder import RunFolder
from vlft.train.grpo.start import Grpo
from vlft.train.metrics import MetricsFile, meter_of
from vlft.train.model_setup import prepare_model
from vlft.train.progress import Progress
from vlft.train.ranks import on_rank_zero
from vlft.train.record import run_record
from vlft.train.reference import ReferencePass, key_of
from vlft.train.reporting import Reporter
from vlft.train.result import read_result
from vlft.train.row_lines import row_lines
from vlft.train.signals import Notice
from vlft.train.step_guard import StepGuard
from vlft.train.trainer import VlftTrainer
from vlft.train.watchdog import Watchdog, watchdog_of


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Everything that is decided before a model is loaded.

    Attributes:
        data: the flags on data.
        model: the flags on the model.
        args: the flags on training.
        effective: all flags, for config.yaml.
        base: the opened base.
        objective: what is optimised.
        grpo: the rewards of --method grpo; None for the other methods.
        rows: the rows to train on.
        evaluated: the rows to evaluate on, or None.
        metrics: of answers to the evaluation rows, or None.
        order: of the rows.
        folder: the run folder.
        notice: of a signal that ends the run.
        report: writes a page about the run, given its folder; None: no page is written.
        say: prints a line for the user (rank 0 only).
    """

    data: DataFlags
    model: ModelFlags
    args: TrainFlags
    effective: dict[str, Any]
    base: Base
    objective: Objective
    grpo: Grpo | None
    rows: MeasuredRows
    evaluated: MeasuredRows | None
    metrics: EvalMetrics | None
    order: Order
    folder: RunFolder
    notice: Notice
    report: Callable[..., object] | None
    say: Callable[[str], None]


def train(
    parsed: Parsed,
    notice: Notice | None = None,
    *,
    report: Callable[..., object] | None = None,
    objective: Callable[[Base], Objective] | None = None,
) -> Path:
    """Train as the flags state.

    Args:
        parsed: `DataFlags`, `ModelFlags` and `TrainFlags`, in this order.
        notice: of a signal that ends the run; None: signals have their usual effect.
        report: called with the run folder from time to time, and at the end with `ended=True`, to write a page.
        objective: makes the objective, given the opened base; None: that of --method.

    Returns:
        The run folder.

    Raises:
        VlftError: anything the user can fix; raised before the first step wherever it can be detected by then.
    """
    data, model, args = parsed.flags
    notice = notice or Notice()
    if cost_folder(os.environ) is not None:
        notice.kept = lambda: "The rows measured so far are cached. Run the same command again."
    say: Callable[[str], None] = partial(print, flush=True) if args.process_index == 0 else _silent
    check_device(args, model.attn, model.linear_attn)
    if (remark := remark_on_numbers(args)) is not None:
        say(f"note: {remark}")
    kernels.check(args.liger, args.device)
    grpo = Grpo.of(data, args)
    if args.cache_vision_features:
        on_rank_zero(lambda: check_folder(args))
    on_rank_zero(lambda: refuse_other(Path(args.output_dir)))
    screen.stage("opening the base")
    there = on_rank_zero(lambda: record_there(args.output_dir, args.resume_from_checkpoint))
    start = start_of(model, resumed=there)
    base = open_base(data, model, given=parsed.given, start=start)
    check_experts(base.family, deepspeed=args.zero)
    check_quantised_run(base.name, base.quantisation, args.zero)
    with loaded_whole(args):
        check_fit(base.folder, base.family)  # before the pass over the rows
    if base.start is not None:
        say(f"starts from the adapter {base.start.described(parsed.given, quantisation=base.quantisation)}")
        say(f"note: {base.start.origin}" if base.start.origin else "note: its run's record is used, not the adapter")
    for remark in remarks_on_pixels(base, data):
        say(f"warning: {remark}")
    screen.stage("reading the data files")
    workers = args.dataloader_num_workers
    rows, evaluated = on_rank_zero(lambda: rows_of_run(data, base, workers=workers, seed=args.seed))
    for line in row_lines(rows, shared=base.encoder.shared if data.pairs else None):
        say(line)
    if evaluated is not None:
        held = "" if data.eval_split is None else f"--eval_split {data.eval_split:g}, --seed {args.seed}"
        for line in row_lines(evaluated, word="evaluate on", asked=held):
            say(line)
        for remark in overlap(rows.marked, evaluated.marked):
            say(f"warning: {remark}")
    metrics = None if evaluated is None else EvalMetrics.of_run(evaluated, base, data, args)
    if metrics is not None:
        on_rank_zero(metrics.check)
    order = training_order(rows.costs, data, args, world=args.world_size, kept=there.training if there else None)
    if grpo is not None and isinstance(order, RowOrder):
        say(grpo.check(rows, base, order))
    args = args.with_accumulation(order.accumulation)
    run = _Run(
        data=data,
        model=model,
        args=args,
        effective=parsed.effective | (dict(base.start.settings) if base.start else {}),
        base=base,
        objective=objective(base) if objective else objective_of(base, data.method, args),
        grpo=grpo,
        rows=rows,
        evaluated=evaluated,
        metrics=metrics,
        order=order,
        folder=RunFolder(args.output_dir, base, run_record(base, data, model, args, rows, order)),
        notice=notice,
        report=report if args.process_index == 0 else None,
        say=say,
    )
    notice.kept = lambda: faults.going_on(run.folder.newest())
    with faults.as_messages(run.folder, workers=args.dataloader_num_workers), workers_end_with_errors():
        how, checkpoint = on_rank_zero(lambda: _claim(run))
        if how == "again":
            say(f"{run.folder.path}: a run ended here before its first checkpoint and saved nothing: starting over.")
        if how == "finished":
            say(f"{run.folder.path}: this run is finished. Nothing to do.")
        else:
            _carry_out(run, checkpoint)
        if args.process_index == 0:
            for line in read_result(run.folder.path).as_lines(best_is_final=args.load_best_model_at_end):
                say(line)
    return run.folder.path


def _claim(run: _Run) -> tuple[str, Path | None]:
    run.folder.hold()
    return run.folder.find_start(run.args.resume_from_checkpoint or "auto")


def _carry_out(run: _Run, checkpoint: Path | None) -> None:
    """Train in a claimed folder, from the checkpoint if there is one, and write the final weights."""
    base, args, folder, order, say = run.base, run.args, run.folder, run.order, run.say
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
        if on_rank_zero(lambda: zero.must_convert(checkpoint, world=args.world_size, run=folder.path)):
            zero.read_converted(args)
        folder.adopt(on_rank_zero(lambda: read_record(checkpoint)))
    cached = run_id(folder) if args.cache_vision_features else None
    if args.process_index == 0:
        held = run.evaluated.places if run.evaluated and run.data.eval_split is not None else None
        effective = effective_flags(run.effective, base.folder)
        flags = {k: v for k, v in effective.items() if base.towers.has_lora or not k.startswith("lora_")}
        folder.begin_run(flags, held_out=held)
    tokens, patches = largest(order, run.rows.costs)
    if folder.record.kind == "full" and (remark := remark_on_carried(base.folder, base.family)) is not None:
        say(f"note: {remark}")
    set_seed(args.seed)  # not earlier: measuring rows draws random numbers, but only if their costs are not cached
    screen.stage("loading the weights")
    with loaded_whole(args):
        model, chosen = prepare_model(
            base,
            args,
            choice=run.model.attn,
            linear=run.model.linear_attn,
            start=base.start if checkpoint is None else None,
            say=say,
            tokens=tokens,
            patches=patches,
            branches=run.data.pairs and base.encoder.shared,
        )
    table = groups.parameter_groups(model, base.family, **groups.rates(args))
    notes = filter(None, (*described_choices(base.towers, base.sizes), base.towers.as_line()))
    say(groups.table(table, tuple(notes)) + "\n" + "; ".join(f"{what}: {how}" for what, how in chosen.items()))
    features = None
    if cached is not None:
        screen.stage("reading the cache of features")
        features = FeatureCache(model, base, args, chosen, run=cached, steps=order.steps)
        rows = [run.rows, *([run.evaluated] if run.evaluated else [])]
        coming = feature_bytes(base, rows, half=args.half is not None)
        say(on_rank_zero(lambda: features.as_line(coming)))
    zero.share_out(model, args)
    with Reporter(run.report, folder.path) as pages, watchdog_of(args, run.notice.kept) as watchdog:
        trainer = _trainer(run, model, table, watchdog, checkpoint, features)
        pages.watch(trainer)
        say(described(order, one="sample" if run.rows.split else "row"))
        steps = args.total_steps(order.steps)
        for remark in (*remarks_on_steps(args, steps), *remarks_on_cache(args, steps, order.steps)):
            say(f"note: {remark}")
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except AtTheEnd:
            with contextlib.suppress(AtTheEnd):
                trainer.evaluate_due()
            if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                trainer._load_best_model()
        finally:
            trainer.progress.close()
            if features is not None:
                features.close()
        if features is not None:
            say(features.as_result())
        screen.stage("saving the trained weights")
        watchdog.at("saving the trained weights", patience=args.saving_patience)
        with run.notice.planning("training is done, and the trained weights are being saved"):
            finish(trainer, folder)


def _trainer(
    run: _Run,
    model: torch.nn.Module,
    table: list[groups.Group],
    watchdog: Watchdog,
    checkpoint: Path | None,
    features: FeatureCache | None,
) -> Any:
    base, data, args, folder, evaluated = run.base, run.data, run.args, run.folder, run.evaluated
    objective = run.objective
    if run.grpo is not None:
        guard = StepGuard(args, folder, watchdog, packing=False, say=run.say)
        same = {name: getattr(run, name) for name in ("rows", "base", "order", "folder", "notice", "say")}
        return run.grpo.trainer(**same, model=model, args=args, groups=table, checkpoint=checkpoint, guard=guard)

    if features is not None:
        features.collating(objective)

    def dataset(rows: MeasuredRows) -> RowDataset:
        encoder = objective if features is None else features.reading(objective, evaluation=rows is evaluated)
        return RowDataset(rows.rows.samples, encoder, rows.costs)

    train_rows, eval_rows = dataset(run.rows), dataset(evaluated) if evaluated else None
    eval_order = evaluation_order(evaluated.costs, data, args, world=args.world_size) if evaluated else None
    step = read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0
    due = folder.evaluation_due
    trainer = VlftTrainer(
        model=model,
        args=args,
        groups=table,
        train_rows=train_rows,
        eval_rows=eval_rows,
        order=run.order,
        eval_order=eval_order,
        objective=objective,
        folder=folder,
        guard=StepGuard(args, folder, watchdog, packing=data.packing, say=run.say),
        notice=run.notice,
        meter=meter_of(base, args, objective.statistics),
        metrics=MetricsFile(folder.path, resume_step=step, evaluation_due=due) if args.process_index == 0 else None,
        progress=Progress(say=run.say, bar=not args.disable_tqdm, steps_per_epoch=run.order.steps),
        on_bad_row=data.on_bad_row,
        features=features,
        reference=_reference(run, train_rows, (eval_rows, eval_order), resumed=checkpoint is not None),
    )
    trainer.eval_metrics = run.metrics
    if run.metrics is not None:
        trainer.progress.metrics = tuple(one.name for one in run.metrics.metrics)
    if evaluated is not None:
        trainer.answers = Answers.of_run(
            evaluated, base, args, folder.path, resume_step=step, evaluation_due=due, say=run.say
        )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    return trainer


def _reference(
    run: _Run, train_rows: RowDataset, evaluated: tuple[RowDataset | None, Order | None], *, resumed: bool
) -> ReferencePass | None:
    if not isinstance(run.objective, Preference) or run.objective.reference != "cached":
        return None
    eval_rows, eval_order = evaluated
    order = evaluation_order(run.rows.costs, run.data, run.args, world=run.args.world_size)
    return ReferencePass(
        run.objective,
        [(train_rows, order), *([(eval_rows, eval_order)] if eval_rows and eval_order else [])],
        run.folder.path,
        key=key_of(
            run.folder.record, run.base.recipe.as_json(), evaluated=run.evaluated, dtype=run.args.half or torch.float32
        ),
        resumed=resumed,
        say=run.say,
    )


def _silent(*_: Any) -> None:
    pass
