"""Load a base and prepare it for training: towers, dtypes, checkpointing, attention, kernels, flat forward."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from vlft.checkpoint.start import Start, load_start
from vlft.config.training import TrainFlags
from vlft.model import attention, experts, forward, kernels, linear_attention, memory, tracing
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.scale import PixelScale
from vlft.setup import Base
from vlft.setup.weights import load_for_training
from vlft.train import zero


def prepare_model(
    base: Base,
    args: TrainFlags,
    *,
    choice: attention.Choice,
    linear: linear_attention.Choice = "auto",
    start: Start | None = None,
    say: Callable[[str], None],
    tokens: int = 0,
    patches: int = 0,
    branches: bool = False,
) -> tuple[torch.nn.Module, dict[str, str]]:
    """Load the base and prepare it for training: towers, dtypes, checkpointing, attention, kernels, flat forward.

    Under bf16 autocast, frozen weights keep the base's dtype and trained weights are float32 masters. Without
    autocast everything computes in float32, because a bf16 tower and a float32 tower do not work together. Under
    DeepSpeed with bf16 all weights compute in bf16, and DeepSpeed holds the float32 masters. Under ZeRO-3 the model
    stays on the host.

    Args:
        base: the opened base.
        args: the training flags.
        choice: `--attn`.
        linear: `--linear_attn`.
        start: the adapter whose weights are the first ones; None: new adapters, or a run that resumes.
        say: prints a line for the user.
        tokens: of the largest micro-batch.
        patches: of the largest micro-batch.
        branches: whether answers share their prompt, as in preference rows.

    Returns:
        The model (wrapped by PEFT if a tower has LoRA), and the choices made, for the log.
    """
    half = args.half
    model: Any = load_for_training(base, half=half, device=args.device, say=say)
    model.name_or_path = base.name  # PEFT writes it into adapter_config.json; a cache folder is useless there
    if not zero.shares_weights(args):
        model.to(args.device)
    dtype = half or torch.float32
    backends = attention.install(model, choice, dtype=dtype, device=args.device, branches=branches, say=say)
    fused = kernels.install(model, args.liger, dtype=dtype, device=args.device)
    forward.bind(model, PixelScale.of(base.processor))
    delta = linear_attention.install(model, linear, dtype=dtype, device=args.device, say=say)
    wrapped = apply_towers(model, base.family, base.towers, masters=not (half and args.zero), computing=half)
    if start is not None:
        say(f"loaded {load_start(wrapped, start):,} tensors of the adapter {start.name}")
    kept = memory.activations(base.sizes, base.towers, tokens=tokens, patches=patches, element_bytes=2 if half else 4)
    if args.checkpointing == "auto" and args.device.type == "cuda":
        kept = _forecast(base, args, tokens=tokens, patches=patches, fused=not fused.startswith("off")) or kept
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    parts, checkpointed = memory.choose_checkpointing(
        args.checkpointing,
        kept,
        trained=trained // (args.world_size if args.zero else 1),
        coming=zero.weights_to_come(wrapped, args),
        device=args.device,
    )
    checkpoint_activations(wrapped, parts)
    computed = {"experts": experts.described(wrapped, args.device)} if "experts" in base.family.features else {}
    return wrapped, {
        "attention": ", ".join(f"{tower} {backend}" for tower, backend in backends.items()),
        **({"gated delta nets": delta} if delta else {}),
        "fused kernels": fused,
        **computed,
        "gradient checkpointing": checkpointed,
    }


def _forecast(base: Base, args: TrainFlags, **load: Any) -> dict[memory.Part, memory.Kept] | None:
    """The activation memory that `vlft plan` estimates; None if that fails, which must not stop the run."""
    stored = getattr(base.config, "dtype", None) or torch.float32
    numbers = tracing.numbers_of(stored, args.half, deepspeed=args.zero is not None)
    try:
        return memory.estimate(base.config, base.family, base.towers, numbers=numbers, **load)
    except Exception as error:  # noqa: BLE001 - it runs the model on tensors without contents, a rare use of torch
        print(
            f"note: activations are estimated from their shapes, because counting them failed: {error!r}",
            file=sys.stderr,
        )
        return None
