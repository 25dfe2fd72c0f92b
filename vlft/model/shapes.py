"""Parts of a batch without contents, for `vlft.model.tracing`: tensors of the right shapes, on the current device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vlft.families import VisionSizes


def branches(key_lengths: Sequence[int]) -> dict[str, Any]:
    """`branches` of a batch whose segments have these numbers of keys."""
    return {
        "kv_rows": torch.zeros(sum(key_lengths), dtype=torch.int64),
        "cu_seqlens_k": torch.zeros(len(key_lengths) + 1, dtype=torch.int32),
        "key_lengths": tuple(key_lengths),
    }


def vision_meta(vision: VisionSizes, segments: Sequence[int]) -> dict[str, Any]:
    """`vision_meta` of a batch for time steps of these numbers of patches. All windows are full, except the last."""
    found: dict[str, Any] = {}
    if vision.window is not None:
        lengths = vision.full_windows(segments)
        found["window_index"] = torch.zeros(sum(segments) // vision.cell, dtype=torch.int64)
        found["window_cu_seqlens"] = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        found["window_lengths"] = lengths
    if vision.positions is not None:
        found["axis_starts"] = torch.zeros(len(segments), 2, dtype=torch.int64)
        found["axis_taps"] = torch.zeros(2, 2, dtype=torch.int64)  # one line serves all rows, another all columns
        found["axis_weights"] = torch.zeros(2, 2)
    return found
