"""M-RoPE positions of a row and the ViT's own patch positions, from grids alone. Integers in, tensors out.

Both are computed in the loader's workers: transformers' `get_rope_index` loops in Python and syncs with the device
several times per picture. Tests compare them with transformers' functions (5.17 and 5.23 agree).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from vlft.data.sample import Grid


def mrope_positions(segments: Sequence[int | Grid], *, merge: int) -> torch.Tensor:
    """Compute the time, height and width positions of a row made of text runs and media.

    In text, all three count up by one. A medium starts where the text before it ends and counts along its merged grid.
    The text after it continues from the larger of its height and width (Qwen2-VL paper, section 2.1; `get_rope_index`).

    Args:
        segments: in order, the length of each text run or the `Grid` of each still or video.
        merge: patches merged into one token along each side (2).

    Returns:
        positions_3T: int64 [3, T].
    """
    pieces, start = [], 0
    for segment in segments:
        if isinstance(segment, int):
            pieces.append(torch.arange(start, start + segment).expand(3, -1))
            start += segment
        else:
            t, h, w = segment.t, segment.h // merge, segment.w // merge
            grid = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
            pieces.append(torch.stack(grid).reshape(3, -1) + start)
            start += max(h, w)
    return torch.cat(pieces, dim=1)


def patch_positions(grid: Grid, *, merge: int) -> torch.Tensor:
    """Compute row and column of every patch of one medium, in the ViT's order (merge blocks stay together).

    Args:
        grid: grid of a still or video.
        merge: side of a merge block in patches (2).

    Returns:
        rc_P2: int64 [P, 2], for the ViT's two-axis rotary embedding.
    """
    return _frame_positions(grid.h, grid.w, merge).repeat(grid.t, 1)


@lru_cache(maxsize=128)  # a frame of 5,000 patches takes 80 kB, in each worker
def _frame_positions(height: int, width: int, merge: int) -> torch.Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    blocks = (height // merge, merge, width // merge, merge)
    return torch.stack([axis.reshape(blocks).transpose(1, 2).flatten() for axis in (rows, columns)], dim=-1)
