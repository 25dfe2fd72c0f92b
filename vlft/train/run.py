"""The story of a training run, top to bottom: flags -> base -> rows -> folder -> model -> trainer -> weights."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from vlft.batches import described, evaluation_order, largest, training_order
from vlft.checkpoint import read_json
from vlft.config.checks import check_flags, remarks_on_steps
from vlft.config.flags import DataFlags, TrainFlags
from vlft.config.parse import Parsed
from vlft.data.collate import Batch, Collator
from vlft.data.dataset import RowDataset
from vlft.data.order import Order
from vlft.inputs import SHOWN_BAD_ROWS, Base, Measured, open_base, trainable_rows
from vlft.model import attention, flops, forward, groups, kernels, memory, saved, towers
from vlft.model.load import load_base
from vlft.train import faults, zero
from vlft.train.accounts import Meter, MetricsFile
from vlft.train.answers import Answers
from vlft.train.callbacks import AtTheEnd
from vlft.train.folder import RunFolder, settings_there
from vlft.train.guard import StepGuard
from vlft.train.ranks import barrier, on_rank_zero, peer_lost
from vlft.train.record import run_record
from vlft.train.reporting import Reporter
from vlft.train.signals import Notice
from vlft.train.trainer import SAVING, VlftTrainer
from vlft.train.watchdog import Watchdog, shared_store


def train(parsed: Parsed, *, report: Callable[[Path], object] | None = None) -> Path:
    """Train as the flags say.

    Args:
        parsed: `DataFlags`, `ModelFlags` and `TrainFlags`, in this order.
        report: called with the run folder now and then, and at the end, to write a page about it.

    Returns:
        the run folder.

    Raises:
        VlftError: anything the user can mend, before the first step wherever it can be known then.
    """
    data, model_flags, args = parsed.flags
    say = print if args.process_index == 0 else _silent
    check_flags(args, model_flags, data, parsed.given)
    kernels.check(args.liger, args.device)
    base = open_base(data, model_flags, given=parsed.given)
    workers = args.dataloader_num_workers
    measured = on_rank_zero(lambda: trainable_rows(data.data_path, data, base, workers=workers))
    evaluated = None
    if data.eval_path:
        evaluated = on_rank_zero(lambda: trainable_rows(data.eval_path, data, base, workers=workers))
    _report_rows(measured, say)
    if evaluated is not None:
        _report_rows(evaluated, say, word="evaluate on")

    kept = on_rank_zero(lambda: settings_there(args.output_dir, args.resume_from_checkpoint))
    order = training_order(measured.costs, data, args, world=args.world_size, kept=kept)
    args.accumulate(order.accumulation)
    record = run_record(base, data, model_flags, args, measured, order)
    folder = RunFolder(args.output_dir, base, record)
    try:
        how, checkpoint = on_rank_zero(lambda: _claim(folder, args))
        if how == "finished":
            say(f"{folder.path}: this run is finished. Nothing to do.")
        else:
            _run(parsed, base, measured, evaluated, order, folder, checkpoint, say, report)
        _say_result(folder, say)
    except BrokenPipeError:
        raise  # nobody reads what is printed any more
    except (OSError, RuntimeError, SafetensorError) as error:
        newest = folder.newest()
        if isinstance(error, torch.OutOfMemoryError):
            raise faults.no_room(error, checkpoint=newest) from error
        if (fault := faults.disk_full(error, folder=folder.path, checkpoint=newest)) is not None:
            folder.clear()
            raise fault from error
        if (fault := faults.worker_died(error, workers=workers, checkpoint=newest)) is not None:
            raise fault from error
        if (lost := peer_lost(error)) is not None:
            raise lost from error
        raise
    finally:
        folder.lock.release()
    return folder.path


def _run(
    parsed: Parsed,
    base: Base,
    measured: Measured,
    evaluated: Measured | None,
    order: Order,
    folder: RunFolder,
    checkpoint: Path | None,
    say: Callable[[str], None],
    report: Callable[[Path], object] | None,
) -> None:
    """From a claimed folder to final weights."""
    data, model_flags, args = parsed.flags
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
        zero.go_on_from(checkpoint, args, run=folder.path)
        folder.adopt(checkpoint)
    if args.process_index == 0:
        acting = {k: v for k, v in parsed.effective.items() if base.towers.has_lora or not k.startswith("lora_")}
        folder.begin_run(acting)
    tokens, patches = largest(order, measured.costs)
    set_seed(args.seed)  # not before: measuring rows draws numbers, and only where their costs are not kept
    with zero.loaded_whole(args):
        model, chosen = prepare_model(base, args, choice=model_flags.attn, say=say, tokens=tokens, patches=patches)
    table = groups.parameter_groups(
        model, base.family, learning_rates=args.learning_rates, weight_decay=args.weight_decay
    )
    say(groups.table(table))
    say("; ".join(f"{what}: {how}" for what, how in chosen.items()))
    zero.share_out(model, args)
    pages = Reporter(report if args.process_index == 0 else None, folder.path)
    with pages, Notice() as notice, _watchdog(args, folder) as watchdog:
        guard = StepGuard(args, folder, watchdog, packing=data.packing, say=say)
        trainer = _trainer(
            model, table, base, data, args, measured, evaluated, order, folder, guard, notice, checkpoint, say
        )
        pages.watch(trainer)
        if evaluated is not None:
            samples = evaluated.rows.samples
            trainer.answers = Answers.of_run(samples, base, args, folder.path, resume_step=_step(checkpoint), say=say)
        say(described(order))
        for remark in remarks_on_steps(args, args.total_steps(order.steps)):
            say(f"note: {remark}")
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        except AtTheEnd:
            if args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                trainer._load_best_model()
        watchdog.at("saving what was trained", patience=SAVING)
        _finish(trainer, folder)


def _watchdog(args: TrainFlags, folder: RunFolder) -> Watchdog:
    return Watchdog(
        args.stall_timeout,
        rank=args.process_index,
        world=args.world_size,
        store=shared_store(),
        advice=lambda: faults.going_on(folder.newest()),
    )


def prepare_model(
    base: Base,
    args: TrainFlags,
    *,
    choice: attention.Choice,
    say: Callable[[str], None],
    tokens: int = 0,
    patches: int = 0,
) -> tuple[torch.nn.Module, dict[str, str]]:
    """Load the base and make it ready to train: towers, dtypes, checkpointing, attention, kernels, flat forward.

    Under bf16 (or fp16) autocast frozen weights keep the base's dtype and trained ones are float32 masters. Without
    autocast everything computes in float32, since a bf16 tower and a float32 one cannot meet. Under DeepSpeed with
    bf16 all weights compute in bf16, and the float32 masters are DeepSpeed's. Under ZeRO-3 the model stays on the host.

    Args:
        choice: `--attn`.
        tokens, patches: of the largest micro-batch.

    Returns:
        the model (wrapped by PEFT where a tower has LoRA), and what was chosen, for the log.
    """
    half = args.bf16 or args.fp16
    model: Any = load_base(base.folder, base.family, dtype=None if half else torch.float32)
    model.name_or_path = base.name  # PEFT writes it into adapter_config.json, where a cache folder would be of no use
    if not zero.shares_weights(args):
        model.to(args.device)
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    backends = attention.install(model, choice, dtype=dtype, device=args.device, say=say)
    fused = kernels.install(model, args.liger, dtype=dtype, device=args.device)
    forward.bind(model, forward.PixelScale.of(base.processor))
    wrapped = towers.apply_towers(model, base.family, base.towers, masters=not (half and args.zero))
    kept = memory.activations(base.config, base.towers, tokens=tokens, patches=patches, element_bytes=2 if half else 4)
    if args.checkpointing == "auto" and args.device.type == "cuda":
        kept = _foretold(base, args, tokens=tokens, patches=patches, fused=not fused.startswith("off")) or kept
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    parts, checkpointed = memory.choose_checkpointing(
        args.checkpointing,
        kept,
        trained=trained // (args.world_size if args.zero else 1),
        coming=zero.weights_to_come(wrapped, args),
        device=args.device,
    )
    towers.checkpoint_activations(wrapped, parts)
    return wrapped, {
        "attention": ", ".join(f"{tower} {backend}" for tower, backend in backends.items()),
        "Liger kernels": fused,
        "gradient checkpointing": checkpointed,
    }


def _foretold(base: Base, args: TrainFlags, **load: Any) -> dict[memory.Part, memory.Kept] | None:
    """What `vlft plan` says activations take; None where it cannot be told, since a run shall not end for that."""
    half = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    stored = getattr(base.config, "dtype", None) or torch.float32
    numbers = saved.numbers_of(stored, half, deepspeed=args.zero is not None)
    try:
        return memory.foretold(base.config, base.family, base.towers, numbers=numbers, **load)
    except Exception as error:  # noqa: BLE001 - it runs the model on tensors without contents, a rare use of torch
        print(
            f"note: activations are estimated by their shapes, since counting them failed: {error!r}", file=sys.stderr
        )
        return None


def _claim(folder: RunFolder, args: TrainFlags) -> tuple[str, Path | None]:
    folder.lock.take()
    return folder.find_start(args.resume_from_checkpoint or "auto")


def _trainer(
    model: torch.nn.Module,
    table: list[groups.Group],
    base: Base,
    data: DataFlags,
    args: TrainFlags,
    measured: Measured,
    evaluated: Measured | None,
    order: Order,
    folder: RunFolder,
    guard: StepGuard,
    notice: Notice,
    checkpoint: Path | None,
    say: Callable[[str], None],
) -> VlftTrainer:
    def dataset(rows: Measured) -> RowDataset:
        return RowDataset(rows.rows.samples, base.encoder, rows.costs)

    vision = base.config.vision_config
    tokenizer = base.processor.tokenizer
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    trainer = VlftTrainer(
        model=model,
        args=args,
        groups=table,
        train_rows=dataset(measured),
        eval_rows=dataset(evaluated) if evaluated else None,
        order=order,
        eval_order=evaluation_order(evaluated.costs, data, args, world=args.world_size) if evaluated else None,
        collator=Collator(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size, filler_token=filler),
        folder=folder,
        guard=guard,
        notice=notice,
        meter=_meter(base, args),
        metrics=MetricsFile(folder.path, resume_step=_step(checkpoint)) if args.process_index == 0 else None,
        say=say,
        on_bad_row=data.on_bad_row,
    )
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    return trainer


def _step(checkpoint: Path | None) -> int:
    """The step a run goes on from, 0 for a new one."""
    return read_json(checkpoint / "trainer_state.json")["global_step"] if checkpoint else 0


def _meter(base: Base, args: TrainFlags) -> Meter:
    """Counts what is trained; with MFU on a card whose peak is known."""

    def work(batch: Batch) -> float:
        return flops.total(
            flops.required_flops(
                base.config,
                base.towers,
                lengths=batch["lengths"] if batch["rows"] else (),
                vision_lengths=batch["vision_lengths"] if len(batch["vision_rows"]) else (),
                supervised=batch["counts"]["supervised_tokens"],
            )
        )

    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else None
    peak = flops.peak_tflops(name)
    return Meter(work, peak=None if peak is None else peak * 1e12)


def _report_rows(measured: Measured, say: Callable[[str], None], *, word: str = "train") -> None:
    rows, costs = measured.rows, measured.costs
    for note in measured.notes:
        say(f"note: {note}")
    tokens = sorted(cost.tokens for cost in costs)
    for file, count in rows.counts.items():
        skipped = [row for row in rows.bad if row.file == file]
        say(
            f"{file}: {count:,} rows, {count - len(skipped):,} to {word}"
            + (f", {len(skipped)} skipped" if skipped else "")
        )
        for row in skipped[:SHOWN_BAD_ROWS]:
            say(f"  skipped {row}")
        if len(skipped) > SHOWN_BAD_ROWS:
            say(f"  and {len(skipped) - SHOWN_BAD_ROWS} more, all in vlft.json")
    say(
        f"tokens: {sum(tokens):,} in all ({sum(c.supervised for c in costs):,} trained), a row has {tokens[0]:,} to "
        f"{tokens[-1]:,}, half have up to {tokens[len(tokens) // 2]:,}"
    )


def _finish(trainer: VlftTrainer, folder: RunFolder) -> None:
    """Write the final weights from rank 0; every rank takes part in collecting them."""
    skipped = trainer.all_skipped()
    state = zero.trained_weights(trainer.model) if trainer.is_deepspeed_enabled else None
    if trainer.args.process_index == 0:
        folder.account(skipped)
        folder.account_steps(unlogged=trainer.meter.spent())
        folder.finish(trainer.model, state, steps=trainer.state.global_step)
    barrier()


def _say_result(folder: RunFolder, say: Callable[[str], None]) -> None:
    path = folder.path
    say(f"output: {path}")
    if folder.record.kind == "adapter":
        say(f"merge:  vlft merge {path} {str(path).rstrip(os.sep)}-merged")
    else:
        say("merge:  not needed, the folder holds the whole model")


def _silent(*_: Any) -> None:
    pass
