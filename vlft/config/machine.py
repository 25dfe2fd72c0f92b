"""Parsed flags against the machine and the number of steps: what is refused here, and what the user is told."""

from __future__ import annotations

from vlft.config.device import without_bf16
from vlft.config.flags import TrainFlags
from vlft.errors import ConfigError

FEW_STEPS = 10


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


def check_device(args: TrainFlags, attn: str, *, launched: bool = True) -> None:
    """Refuse what the device that is here cannot carry out.

    Args:
        attn: `--attn`.
        launched: this process is to train; False where it only plans a run that is launched later.

    Raises:
        ConfigError: names the flag, its value and what to do.
    """
    if launched and args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs are visible, but this is one process. Start one per GPU: GPUS={args.n_gpu} "
            "scripts/finetune_lora.sh (or torchrun --nproc_per_node), or pick one with CUDA_VISIBLE_DEVICES=0."
        )
    if attn not in ("auto", "sdpa") and args.device.type == "cpu":
        raise ConfigError(
            f"--attn {attn}: needs a CUDA device, this is cpu. Use --attn auto, which takes the fastest that works."
        )
    if launched and args.bf16 and not args.use_cpu and (card := without_bf16()):
        raise ConfigError(
            f"--bf16 true: {card} has no bf16 and would emulate it, slower than float32. Drop it, or set --bf16 false: "
            "the run then computes in float32."
        )
