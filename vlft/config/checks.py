"""Flags against each other: those that cannot act, or cannot be carried out here. Train and plan both ask."""

from __future__ import annotations

from collections.abc import Collection

from vlft.config.device import without_bf16
from vlft.config.flags import REPORTING, DataFlags, ModelFlags, TrainFlags
from vlft.errors import ConfigError

FEW_STEPS = 10
REPORT_ROWS = 4  # the flag's default, which config.yaml of a run without evaluation holds too


def remarks_on_steps(args: TrainFlags, steps: int) -> list[str]:
    """What a run of so many optimizer steps in all should make its user look at."""
    remarks = []
    warmup = args.get_warmup_steps(steps)
    if warmup >= steps:
        remarks.append(
            f"all {steps} steps are warm-up (--warmup_steps {args.warmup_steps:g}), so the learning rate never reaches "
            "its peak. Lower --warmup_steps."
        )
    if steps < FEW_STEPS:
        remarks.append(
            f"{steps} optimizer steps in all are few. For more, lower the global batch (GLOBAL_BATCH in the scripts, "
            "--global_batch) or raise --num_train_epochs."
        )
    return remarks


def remark_on_numbers(args: TrainFlags) -> str | None:
    """What a run on a GPU without bf16 computes in; None elsewhere."""
    card = None if args.use_cpu or args.bf16 else without_bf16()
    if card is None:
        return None
    return (
        f"{card} has no bf16, so this run computes in float32, with torch's own attention: it takes more memory and "
        "time than a GPU of compute capability 8 or newer would."
    )


def check_flags(
    args: TrainFlags, model: ModelFlags, data: DataFlags, given: Collection[str], *, launched: bool = True
) -> None:
    """Refuse flags that cannot act or cannot be carried out here.

    Args:
        given: names of the flags the user set.
        launched: this process is to train; False where it only plans a run that is launched later.

    Raises:
        ConfigError: names the flag, its value and what to do.
    """
    for tower in ("vision", "merger"):
        flag = f"{tower}_lr"
        if flag in given and getattr(model, tower) == "frozen":
            raise ConfigError(
                f"--{flag} {getattr(args, flag)} cannot act: --{tower} is frozen. Drop it, or set --{tower} to full or "
                "lora."
            )
    for flag in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, flag) < 1:
            raise ConfigError(f"--{flag} is {getattr(args, flag)}, must be at least 1")
    _check_batches(args, data, given)
    _check_numbers(args, launched=launched)
    if args.stall_timeout and args.ddp_timeout < args.stall_timeout + REPORTING:
        raise ConfigError(
            f"--ddp_timeout {args.ddp_timeout} would end processes that wait for another one before --stall_timeout "
            f"{args.stall_timeout:g} can say which. Give it at least {args.stall_timeout + REPORTING:g}, drop it, or "
            "lower --stall_timeout."
        )
    if args.max_steps == 0:
        raise ConfigError("--max_steps 0 trains nothing. Give more than 0, or -1 for --num_train_epochs")
    for flag in (
        "learning_rate",
        "vision_lr",
        "merger_lr",
        "weight_decay",
        "max_grad_norm",
        "dataloader_num_workers",
        "max_nonfinite_steps",
        "stall_timeout",
        "report_rows",
    ):
        if (getattr(args, flag) or 0) < 0:
            raise ConfigError(f"--{flag} is {getattr(args, flag):g}, must not be negative")
    if args.logging_nan_inf_filter:
        raise ConfigError(
            "--logging_nan_inf_filter true cannot act: no loss is hidden, one that is not finite stops the run. "
            "Drop it; --max_nonfinite_steps leaves such steps out."
        )
    if args.max_nonfinite_steps and args.deepspeed:
        raise ConfigError(
            f"--max_nonfinite_steps {args.max_nonfinite_steps} cannot act under --deepspeed, whose engine has "
            "moved the weights before the gradient is looked at. Drop one of the two."
        )
    if args.max_steps < 0 and args.num_train_epochs <= 0:
        raise ConfigError(f"--num_train_epochs {args.num_train_epochs:g} trains nothing. Give more than 0")
    if launched and args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs are visible, but this is one process. Start one per GPU: GPUS={args.n_gpu} "
            "scripts/finetune_lora.sh (or torchrun --nproc_per_node), or pick one with CUDA_VISIBLE_DEVICES=0."
        )
    when = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if when != "no" and not data.eval_path:
        raise ConfigError(f"--eval_strategy {when} needs --eval_path")
    if args.report_tokens < 1:
        raise ConfigError(f"--report_tokens is {args.report_tokens}, must be at least 1; --report_rows 0 asks nothing")
    if "report_rows" in given and args.report_rows not in (0, REPORT_ROWS) and not data.eval_path:
        raise ConfigError(
            f"--report_rows {args.report_rows} cannot act without --eval_path: its rows are those that are asked. "
            "Drop it, or name evaluation data."
        )
    if data.eval_path and when == "no":
        raise ConfigError("--eval_path is given, but --eval_strategy is no: set it to steps or epoch")


def _check_numbers(args: TrainFlags, *, launched: bool) -> None:
    """Refuse to compute in what the model or the GPU cannot."""
    if args.fp16:
        raise ConfigError(
            "--fp16 true is not supported: Qwen's models are trained in bf16, and their activations overflow float16, "
            "which ends at 65,504 (QwenLM/Qwen3 issues 670 and 868). Drop it: a GPU that has bf16 computes in bf16, an "
            "older one in float32."
        )
    if launched and args.bf16 and not args.use_cpu and (card := without_bf16()):
        raise ConfigError(
            f"--bf16 true: {card} has no bf16 and would emulate it, slower than float32. Drop it, or set --bf16 false: "
            "the run then computes in float32."
        )


def _check_batches(args: TrainFlags, data: DataFlags, given: Collection[str]) -> None:
    """Refuse what cannot act with, or without, packing."""
    for flag in ("pack_tokens", "pack_patches"):
        value = getattr(data, flag)
        if value is not None and not data.packing:
            raise ConfigError(f"--{flag} {value} cannot act: --packing is false. Drop one of the two.")
        if value is not None and value < 1:
            raise ConfigError(f"--{flag} is {value}, must be at least 1")
    for flag in ("per_device_train_batch_size", "per_device_eval_batch_size"):
        if data.packing and getattr(args, flag) != 1:
            raise ConfigError(
                f"--{flag} {getattr(args, flag)} cannot act: with packing a micro-batch is one pack. Say how large "
                "with --pack_tokens, how many rows make a step with --global_batch, or set --packing false."
            )
    if args.global_batch is not None:
        if args.global_batch < 1:
            raise ConfigError(f"--global_batch is {args.global_batch}, must be at least 1")
        if "gradient_accumulation_steps" in given:
            raise ConfigError(
                f"--global_batch {args.global_batch} and --gradient_accumulation_steps "
                f"{args.gradient_accumulation_steps} both say how large a step is. Give one."
            )
