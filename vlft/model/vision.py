"""How the vision tower computes: patches, learnt positions, windows, and a frozen 16-bit tower without autocast.

`vlft.model.adapt` installs it, and `vlft.model.scale` provides the pixels in the dtype that `pixel_dtype` names.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F

#: The dtype of the run's autocast, while a tower runs without it.
_autocast: ContextVar[torch.dtype | None] = ContextVar("autocast of the run", default=None)


def embed_by_matmul(patch_embed: Any) -> None:
    """Make a patch embedding multiply patches by its weights, in place of a convolution whose stride is its kernel.

    The result is the same. In bf16 on Hopper the convolution is slower by orders of magnitude, and its backward pass
    may have no engine (huggingface/transformers#45750, pytorch/pytorch#166643).

    Args:
        patch_embed: the module with the convolution `proj`. Names and shapes of its parameters stay.
    """
    patch_embed.forward = types.MethodType(_embed, patch_embed)
    patch_embed.proj.forward = types.MethodType(_project, patch_embed.proj)


def _embed(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return self.proj(hidden_states)


def _project(self: Any, patches: torch.Tensor) -> torch.Tensor:
    """[P, ...] -> [P, channels]. The weight is used in the forward of its own module, where ZeRO-3 collects it."""
    weight = self.weight.flatten(1)
    patches = patches.reshape(-1, weight.shape[1])
    if not torch.is_autocast_enabled(patches.device.type):
        patches = patches.to(weight.dtype)
    return F.linear(patches, weight, self.bias)


def pixel_dtype(visual: Any, device: torch.device) -> torch.dtype:
    """The dtype that the patch embedding multiplies in: that of autocast, or of the tower's weights."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return visual.dtype


@contextlib.contextmanager
def without_needless_autocast(weights: Iterable[torch.nn.Parameter], device: torch.device) -> Iterator[None]:
    """A context that switches autocast off, if all weights are frozen and stored in autocast's dtype.

    Autocast would compute each LayerNorm in float32 and write float32 results, which the next linear layer casts back.
    LayerNorm's own 16-bit kernel also computes in float32 and rounds once, with a third of the memory traffic. Modules
    with other weights call `keep_autocast`.

    Args:
        weights: of the modules that run in the context.
        device: where they run.
    """
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    if dtype is None or not _frozen_in(dtype, weights):
        yield
        return
    token = _autocast.set(dtype)
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        _autocast.reset(token)


def keep_autocast(module: torch.nn.Module) -> None:
    """Make a module run under the run's autocast inside `without_needless_autocast`, if its weights need it.

    A merger needs it if it trains, because its weights are then in float32.
    """

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = _autocast.get()
        if dtype is None or _frozen_in(dtype, self.parameters()):
            return type(self).forward(self, *args, **kwargs)
        with torch.autocast(args[0].device.type, dtype=dtype):
            return type(self).forward(self, *args, **kwargs)

    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def _frozen_in(dtype: torch.dtype, weights: Iterable[torch.nn.Parameter]) -> bool:
    return all(weight.dtype == dtype and not weight.requires_grad for weight in weights)


def interpolation(
    meta: Mapping[str, torch.Tensor], positions_P2: torch.Tensor, cu_seqlens: torch.Tensor, *, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which learnt positions each patch lies between, and their weights, bit-equal to transformers' own.

    Args:
        meta: `vision_meta` of the batch: lines of the axes (`vlft.data.vision_meta.axes`).
        positions_P2: row and column of each patch.
        cu_seqlens: where time steps begin and end.
        side: rows and columns of the learnt grid.

    Returns:
        indices_P4: int64, places in the flattened grid.
        weights_P4: float32.
    """
    # Without output_size the host would wait for the sum of the lengths.
    starts_P2 = meta["axis_starts"].repeat_interleave(cu_seqlens.diff(), dim=0, output_size=len(positions_P2))
    lines_P2 = positions_P2 + starts_P2
    rows_P2, columns_P2 = meta["axis_taps"][lines_P2].unbind(1)
    of_rows_P2, of_columns_P2 = meta["axis_weights"][lines_P2].unbind(1)
    indices_P22 = rows_P2[:, :, None] * side + columns_P2[:, None]
    return indices_P22.flatten(1), (of_rows_P2[:, :, None] * of_columns_P2[:, None]).flatten(1)


def over_windows(block: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hook before a block that attends within windows: its segments are the windows."""
    if "window_lengths" not in kwargs:  # transformers' own forward
        return args, kwargs
    rest = {name: value for name, value in kwargs.items() if name != "window_lengths"}
    return args, rest | {"segment_lengths": kwargs["window_lengths"]}


def over_steps(block: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Hook before a block that attends within a whole time step."""
    return args, {name: value for name, value in kwargs.items() if name != "window_lengths"}
