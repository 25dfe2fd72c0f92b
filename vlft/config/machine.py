"""Compare parsed flags with the machine and the number of steps: errors and remarks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlft.config.device import without_bf16
from vlft.errors import ConfigError

if TYPE_CHECKING:
    from vlft.config.flags import PlanFlags
    from vlft.config.training import TrainFlags

FEW_STEPS = 10


def remarks_on_steps(args: TrainFlags | PlanFlags, steps: int) -> list[str]:
    """Return remarks on a run of `steps` optimizer steps: warm-up that never ends, and very few steps."""
    remarks = []
    warmup = args.get_warmup_steps(steps)
    if warmup >= steps:
        remarks.append(
            f"all {steps} steps are warm-up (--warmup_steps {args.warmup_steps:g}), so the learning rate never reaches "
            "its peak. Lower --warmup_steps."
        )
    if steps < FEW_STEPS:
        remarks.append(
            f"the whole run has few optimizer steps: {steps}. For more, "
            + ("raise --max_steps." if args.max_steps > 0 else "lower --global_batch or raise --num_train_epochs.")
        )
    return remarks


def remarks_on_cache(args: TrainFlags | PlanFlags, steps: int, steps_per_epoch: int) -> list[str]:
    """Return a remark on `--cache_vision_features` in a run of `steps` steps that sees each row at most once."""
    if not args.cache_vision_features or steps > steps_per_epoch:
        return []
    return [
        "--cache_vision_features acts from the second epoch on, and this run has one. It is of use only if the folder "
        "already holds features of its pictures, or for later runs."
    ]


def remark_on_numbers(args: TrainFlags) -> str | None:
    """Return a remark on a GPU without bf16, whose run computes in float32, or on TF32 without a GPU; else None."""
    if args.tf32_of_no_use:
        return "--tf32 true has no effect on this run: TF32 is a mode of NVIDIA GPUs, and it runs on the CPU."
    card = None if args.use_cpu or args.bf16 else without_bf16()
    if card is None:
        return None
    return (
        f"{card} has no bf16, so this run computes in float32, with torch's own attention. It takes more memory and "
        "time than on a GPU of compute capability 8 or newer."
    )


def check_device(args: TrainFlags, attn: str, linear_attn: str = "auto", *, launched: bool = True) -> None:
    """Refuse flags that this machine's device cannot carry out.

    Args:
        args: the parsed flags.
        attn: the value of `--attn`.
        linear_attn: the value of `--linear_attn`.
        launched: True if this process trains; False if it only plans a run that is launched later.

    Raises:
        ConfigError: the device does not support a flag's value, or several GPUs are visible to one process.
    """
    if launched and args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs are visible, but this is one process. Start one per GPU: GPUS={args.n_gpu} "
            "scripts/finetune_lora.sh (or torchrun --nproc_per_node), or pick one with CUDA_VISIBLE_DEVICES=0."
        )
    if attn not in ("auto", "sdpa") and args.device.type == "cpu":
        raise ConfigError(
            f"--attn {attn}: needs a CUDA device, this is cpu. Use --attn auto, which picks the fastest that works."
        )
    if linear_attn == "fla" and args.device.type == "cpu":
        raise ConfigError(
            "--linear_attn fla: needs a CUDA device, this is cpu. Use --linear_attn auto, which uses plain torch here."
        )
    if launched and args.bf16 and not args.use_cpu and (card := without_bf16()):
        raise ConfigError(
            f"--bf16 true: {card} has no bf16 and would emulate it, slower than float32. Drop it, or set --bf16 false. "
            "The run then computes in float32."
        )
