"""A model on tensors without contents, prepared as `vlft train` prepares it on a machine with every fused kernel.

Neighbours: `vlft.model.tracing` runs it, `vlft.model.standins` replaces its kernels, `vlft.model.activations` counts
memory and `vlft.model.traffic` operations and bytes.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from typing import Any, Literal

import torch

from vlft.families import Family
from vlft.model import adapt, forward, kernels, recurrent, segments, standins, tracing
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.load import empty_model
from vlft.model.scale import PixelScale, constants
from vlft.model.towers import Towers
from vlft.model.tracing import Numbers

Delta = Literal["fla", "torch"]
SCALE = PixelScale(mean=(0.0,) * 3, std=(1.0,) * 3)


@contextlib.contextmanager
def step(
    config: Any,
    family: Family,
    towers: Towers,
    *,
    numbers: Numbers,
    device: Literal["cpu", "cuda"],
    fused: bool,
    delta: Delta = "fla",
    checkpointed: Collection[str] = (),
) -> Iterator[Any]:
    """A context in which tensors have no contents, with a model that is ready for a training step.

    Args:
        config: transformers' config of the top class.
        family: of the config.
        towers: what trains.
        numbers: the dtypes it computes in.
        device: the device whose kernels are assumed; on "cuda" this includes flash attention.
        fused: whether fused kernels run (`vlft.model.kernels`).
        delta: what computes the delta rule of gated delta nets on "cuda", in 16 bits.
        checkpointed: towers (vision, language) that recompute their blocks.

    Yields:
        the model, in training mode.
    """
    model: Any = empty_model(copy.deepcopy(config), family)  # a kernel is named in the model's config
    half = numbers.computing in standins.HALF
    kernel = None if device == "cpu" else standins.attend if half else standins.attend_in_float32
    for part in adapt.PARTS:
        segments.use_kernel(model, part, "traced" if kernel else "sdpa", kernel)
    if fused:
        kernels.fuse(model, standins.fused_functions())
    forward.bind(model, SCALE)
    if device == "cuda" and half and delta == "fla":
        for layer in adapt.recurrent_layers(model):
            recurrent.bind(layer, recurrent.kernel_rule(standins.delta_rule))
    # This cache outlives the context, so it must not hold tensors without contents.
    constants.cache_clear()
    try:
        with torch.random.fork_rng(devices=[]):
            model = apply_towers(model, family, towers, masters=False)
            with tracing.without_contents(), torch.device(device):
                tracing.fill(model, numbers)
                checkpoint_activations(model, checkpointed)
                constants(SCALE, torch.empty(0).device)  # copied in the first step of a run
                yield model.train()
    finally:
        constants.cache_clear()
