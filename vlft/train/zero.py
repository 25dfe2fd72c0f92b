"""DeepSpeed's ZeRO around a run: sharing out a loaded model, collecting what was trained, going on from its state.

Every function is called on every rank. deepspeed is imported where used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

from vlft.config.flags import TrainFlags
from vlft.errors import CheckpointError
from vlft.model.groups import Group

#: Weights that ZeRO-3 keeps whole on a device at a time (DeepSpeed's default for stage3_max_live_parameters).
LIVE_WEIGHTS = 10**9


def shares_weights(args: TrainFlags) -> bool:
    """Whether the weights themselves are shared out (ZeRO-3)."""
    return args.zero is not None and args.zero.startswith("zero3")


@contextlib.contextmanager
def loaded_whole(args: TrainFlags) -> Iterator[None]:
    """Within, `from_pretrained` and PEFT see no ZeRO-3, and make whole tensors on the host.

    transformers would else build the model in pieces, and then neither say which tensors were missing nor let towers
    have dtypes of their own. The price: each process holds the whole model in the host's memory while the run starts
    (2 bytes a weight: 8 x 17 GB on a node of 8 for a 7B model), until `share_out`; a device never does.
    """
    if not args.deepspeed:
        yield
        return
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


def weights_to_come(model: torch.nn.Module, args: TrainFlags) -> int:
    """Bytes that weights will take on a device where they are not there yet."""
    if not shares_weights(args):
        return 0
    weights = sum(p.numel() for p in model.parameters())
    return (2 if args.half else 4) * (weights // args.world_size + min(weights, LIVE_WEIGHTS))


def share_out(model: torch.nn.Module, args: TrainFlags) -> None:
    """Leave each rank its part of every weight under ZeRO-3, tensor by tensor; nothing to do otherwise.

    `deepspeed.initialize` would do so too, but moves the whole model to the device first (DeepSpeed 0.19.8).

    Args:
        model: ready to train, on the host, after `parameter_groups` has looked at its shapes.
    """
    if not shares_weights(args):
        return
    import deepspeed

    config: dict[str, Any] = args.hf_deepspeed_config.config
    for parameter in model.parameters():
        parameter.data = parameter.data.to(
            args.half or torch.float32
        )  # masters of what is trained are kept by DeepSpeed
    for buffer in model.buffers():
        buffer.data = buffer.data.to(args.device)
    deepspeed.init_distributed()  # takes up the group there is; without, the batch is checked against a world of one
    deepspeed.zero.Init(module=model, config_dict_or_path=config)


def trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """What is trained, in float32, by parameter name: on the host of rank 0, nothing elsewhere.

    One tensor at a time crosses between ranks. DeepSpeed's own collecting would take frozen weights along, and their
    16-bit copies in place of the masters.

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
    """Make sure that DeepSpeed's state in a checkpoint may be read, and can be on so many processes.

    Args:
        checkpoint: to go on from.
        world: processes.
        run: `--output_dir`.

    Returns:
        whether its universal form is to be read, which stands beside the one that was saved.

    Raises:
        CheckpointError: the state was written elsewhere, is not whole, or is of another number of processes.
    """
    parts = sorted(checkpoint.glob("global_step*"))
    if not parts:
        return False
    inside = run.resolve()
    if any(inside not in path.resolve().parents for path in (checkpoint, *parts)):
        raise CheckpointError(
            f"--resume_from_checkpoint {checkpoint}: DeepSpeed's state there is not of this run's own --output_dir "
            f"{run}. It is a pickle, which can run any code when it is read, so only what this run wrote itself is. Go "
            "on in the folder it came from; its weights can be merged from anywhere."
        )
    saved = [path for path in parts if not path.name.endswith("_universal")]
    if len(saved) != 1:
        raise CheckpointError(
            f"{checkpoint}: holds {len(saved)} states of DeepSpeed (global_step*), expected 1. Go on from another one."
        )
    state = saved[0]
    saved_by = len(list(state.glob("*zero_pp_rank_*_mp_rank_00_optim_states.pt")))
    if saved_by == world:
        return False
    universal = checkpoint / f"{state.name}_universal"
    if not (universal / "zero").is_dir() or not (checkpoint / "latest_universal").is_file():
        raise CheckpointError(
            f"{checkpoint}: DeepSpeed's state is of {saved_by} processes, this run has {world}. Start as many, "
            f"or convert it once, then start this again:\n"
            f"  python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state --input_folder {state} "
            f"--output_folder {universal}"
        )
    return True


def read_converted(args: TrainFlags) -> None:
    """Have DeepSpeed read a state's universal form."""
    config: dict[str, Any] = args.hf_deepspeed_config.config
    config["checkpoint"] = {**config.get("checkpoint", {}), "load_universal": True}


class ZeroTrainer(Trainer):
    """The Trainer of transformers, with what it and DeepSpeed would do otherwise than plain training does.

    Overridden are `save_model` and `_load_optimizer_and_scheduler`.
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
    """Set right what DeepSpeed 0.19.8 does not bring back as it was, after it has loaded a state.

    Clipping is the old run's, whatever `--max_grad_norm` says now. From a converted state, all groups of ZeRO-3 have
    the rate and decay of the first one, and one tensor as their count of steps, which then grows with each of them.
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
