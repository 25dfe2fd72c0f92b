"""DeepSpeed's ZeRO in a run: partition a loaded model, collect the trained weights, resume from DeepSpeed's state.

`vlft.model.load.loaded_whole` is for loading it before. Every function must be called on every rank. deepspeed is
imported where used.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

from vlft.config.training import TrainFlags
from vlft.errors import CheckpointError
from vlft.model.groups import Group

#: Weights that ZeRO-3 holds gathered on a device at a time (DeepSpeed's default of stage3_max_live_parameters).
LIVE_WEIGHTS = 10**9


def shares_weights(args: TrainFlags) -> bool:
    """Whether the weights themselves are partitioned over the ranks (ZeRO-3)."""
    return args.zero is not None and args.zero.startswith("zero3")


def weights_to_come(model: torch.nn.Module, args: TrainFlags) -> int:
    """Bytes that the weights will take on a device, if ZeRO-3 has not placed them there yet; else 0."""
    if not shares_weights(args):
        return 0
    weights = sum(p.numel() for p in model.parameters())
    return (2 if args.half else 4) * (weights // args.world_size + min(weights, LIVE_WEIGHTS))


def share_out(model: torch.nn.Module, args: TrainFlags) -> None:
    """Partition every weight over the ranks under ZeRO-3, tensor by tensor. Has no effect otherwise.

    `deepspeed.initialize` also does it, but moves the whole model to the device first (DeepSpeed 0.19.8).

    Args:
        model: ready to train, on the host, after `parameter_groups` has read its shapes.
        args: the training flags.
    """
    if not shares_weights(args):
        return
    import deepspeed

    config: dict[str, Any] = args.hf_deepspeed_config.config
    for parameter in model.parameters():
        parameter.data = parameter.data.to(args.half or torch.float32)  # DeepSpeed holds the masters of trained weights
    for buffer in model.buffers():
        buffer.data = buffer.data.to(args.device)
    deepspeed.init_distributed()  # uses the existing group; without it the batch is checked against a world of 1
    deepspeed.zero.Init(module=model, config_dict_or_path=config)


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """The trained weights in float32 by parameter name, on the host of rank 0. Other ranks return an empty dict.

    One tensor at a time is gathered. DeepSpeed's own function also gathers frozen weights, and the 16-bit copies
    instead of the masters.

    Args:
        model: the unwrapped model of a live engine.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
            if dist.get_rank() == 0:
                weights[name] = whole.detach().to("cpu", copy=True)
    return weights


def must_convert(checkpoint: Path, *, world: int, run: Path) -> bool:
    """Check that DeepSpeed's state in a checkpoint is this run's own, and fits this number of processes.

    Args:
        checkpoint: from which the run resumes.
        world: number of processes.
        run: `--output_dir`.

    Returns:
        Whether to read the state's universal form, which a conversion wrote beside the saved form.

    Raises:
        CheckpointError: the state was written by another run, is incomplete, or is of another number of processes.
    """
    parts = sorted(checkpoint.glob("global_step*"))
    if not parts:
        return False
    inside = run.resolve()
    if any(inside not in path.resolve().parents for path in (checkpoint, *parts)):
        raise CheckpointError(
            f"--resume_from_checkpoint {checkpoint}: DeepSpeed's state there is not of this run's own --output_dir "
            f"{run}. It is a pickle, which can run any code when it is read, so only this run's own state is read. "
            "Resume in the folder it came from; its weights can be merged from anywhere."
        )
    saved = [path for path in parts if not path.name.endswith("_universal")]
    if len(saved) != 1:
        raise CheckpointError(
            f"{checkpoint}: holds {len(saved)} states of DeepSpeed (global_step*), expected 1. Resume from another "
            "checkpoint."
        )
    state = saved[0]
    saved_by = len(list(state.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")))
    if saved_by == world:
        return False
    universal = checkpoint / f"{state.name}_universal"
    if not (universal / "zero").is_dir() or not (checkpoint / "latest_universal").is_file():
        raise CheckpointError(
            f"{checkpoint}: DeepSpeed's state is of {saved_by} processes, this run has {world}. Start {saved_by} "
            f"processes, or convert the state with this command, then start the run again:\n"
            f"  python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {state} "
            f"--output_folder {universal}"
        )
    return True


def read_converted(args: TrainFlags) -> None:
    """Set DeepSpeed's config to read the universal form of a state."""
    config: dict[str, Any] = args.hf_deepspeed_config.config
    config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}


class ZeroTrainer(Trainer):
    """The Trainer of transformers; under DeepSpeed it saves and resumes as plain training does.

    It overrides `save_model` and `_load_optimizer_and_scheduler`.
    """

    args: TrainFlags
    groups: list[Group]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_deepspeed_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir, state_dict=trained_weights(self.model))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled:
            mend_loaded(self.deepspeed, self.lr_scheduler, self.groups, clip=self.args.max_grad_norm)


def mend_loaded(engine: Any, scheduler: Any, groups: Sequence[Group], *, clip: float) -> None:
    """Fix the values that DeepSpeed 0.19.8 restores wrongly when it loads a state.

    It restores the clipping of the old run instead of the current `--max_grad_norm`. From a converted state, all groups
    of ZeRO-3 have the rate and decay of the first group. They also share one tensor as their step count, which then
    grows once per group.

    Args:
        engine: DeepSpeed's, with the state loaded.
        scheduler: of the learning rates, with its state loaded.
        groups: of the optimizer, in its order.
        clip: `--max_grad_norm`.
    """
    engine.optimizer.clip_grad = clip
    if not engine.load_universal_checkpoint():
        return
    optimizer = engine.optimizer.optimizer
    for live, group, lr in zip(optimizer.param_groups, groups, scheduler.get_last_lr(), strict=True):
        live.update(name=group.name, lr=lr, initial_lr=group.lr, weight_decay=group.weight_decay)
    for state in optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()
