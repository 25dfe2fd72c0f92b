"""Load the weights of an opened base as a run trains on them: in its dtypes, and quantised if the flags say so."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch

from vlft.model.load import load_base
from vlft.model.packed import is_quantised, load_quantised, stored_bytes
from vlft.setup.base import Base


def load_for_training(
    base: Base, *, half: torch.dtype | None, device: torch.device, say: Callable[[str], None] = lambda line: None
) -> torch.nn.Module:
    """The model of a base. Quantised layers are on the device, all other weights on the CPU.

    Args:
        base: the opened base.
        half: dtype of autocast; the weights then keep the dtype of the files. None: they become float32.
        device: of the run.
        say: receives a line on what was quantised.

    Raises:
        CheckpointError: the errors of `load_base`.
        ConfigError: bitsandbytes is missing.
    """
    dtype = None if half else torch.float32
    if base.quantisation is None:
        return _with_wide_norms(load_base(base.folder, base.family, dtype=dtype))
    model = load_quantised(base.folder, base.family, base.quantisation, dtype, device=device, say=say)
    packed = {name: module.weight for name, module in model.named_modules() if is_quantised(module)}
    counts = Counter(base.family.tower_of(name) for name in packed)
    layers = ", ".join(f"{count} linear layers of the {tower} model" for tower, count in counts.items())
    size = sum(map(stored_bytes, packed.values())) / 1e9
    say(f"quantised: {layers} to {base.quantisation.label}, {size:.2f} GB; all other weights keep their dtype")
    return _with_wide_norms(model)


def _with_wide_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Convert vectors in float16 to float32, which is exact, in place. Returns the model.

    Autocast to bfloat16 leaves the norms of a float16 base as they are on a CPU, and torch (2.15) has no norm with
    inputs in bfloat16 and weights in float16.
    """
    for parameter in model.parameters():
        if parameter.dtype is torch.float16 and parameter.dim() == 1:
            parameter.data = parameter.data.float()
    return model
