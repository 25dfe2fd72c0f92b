"""M-RoPE positions of a row and the ViT's own patch positions, from grids alone. Numbers in, arrays out.

Both are computed in the loader's workers: transformers' `get_rope_index` loops in Python and syncs with the device
several times per picture. Tests compare them with transformers' functions. 5.17 and 5.23 agree, except for videos of
Qwen2.5-VL: 5.17 truncates the seconds between two time steps to a whole number. vlft does as 5.23.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from vlft.data.sample import Grid


def mrope_positions(segments: Sequence[int | Grid], *, merge: int, tokens_per_second: int | None = None) -> np.ndarray:
    """Compute the time, height and width positions of a row made of text runs and media.

    In text, all three count up by one. A medium starts where the text before it ends and counts along its merged grid.
    The text after it continues from the larger of its height and width (Qwen2-VL paper, section 2.1; `get_rope_index`).

    Args:
        segments: in order, the length of each text run or the `Grid` of each run of vision tokens.
        merge: patches merged into one token along each side (2).
        tokens_per_second: time positions of one second, for grids with a pace.

    Returns:
        positions_3T: int64 [3, T].
    """
    lengths = [one if isinstance(one, int) else one.tokens(merge) for one in segments]
    positions_3T = np.empty((3, sum(lengths)), np.int64)
    start = done = 0
    for segment, length in zip(segments, lengths, strict=True):
        own = positions_3T[:, done : done + length]
        done += length
        if isinstance(segment, int):
            own[:] = np.arange(start, start + segment)
            start += segment
            continue
        h, w = segment.h // merge, segment.w // merge
        np.add(_counted(segment.t, h, w), start, out=own)
        if segment.pace is not None:
            if tokens_per_second is None:
                raise ValueError("a grid with a pace needs tokens_per_second")
            own[0] = start + time_positions(segment.t, segment.pace, tokens_per_second).repeat(h * w)
        start += max(h, w)
    return positions_3T


def from_prompt(positions_3T: np.ndarray, branches: Sequence[int]) -> np.ndarray:
    """Let the positions of each answer of a preference row continue those of the prompt, which ends with text.

    Args:
        positions_3T: of `mrope_positions`.
        branches: tokens of the prompt, then of each answer; empty for another row, whose positions are returned.
    """
    if not branches:
        return positions_3T
    prompt, *answers = branches
    first_31 = positions_3T[:, prompt, None]
    return np.concatenate([positions_3T[:, :prompt], *(first_31 + np.arange(tokens) for tokens in answers)], axis=1)


@lru_cache(maxsize=128)  # a picture of 1,280 tokens takes 30 kB, in each worker
def _counted(t: int, h: int, w: int) -> np.ndarray:
    """Positions of a medium from 0, in a grid that counts by one on each axis: [3, T]."""
    return np.indices((t, h, w)).reshape(3, -1)


def time_positions(steps: int, pace: float, tokens_per_second: int) -> np.ndarray:
    """Compute the time position of each step of a video whose positions count seconds (Qwen2.5-VL).

    The stock processor returns the pace as a float32 tensor, and the stock model multiplies in float32 and rounds down.

    Args:
        steps: number of time steps.
        pace: seconds from one step to the next.
        tokens_per_second: positions of one second.

    Returns:
        int64 [steps], from 0.
    """
    interval = np.float32(tokens_per_second) * np.float32(pace)
    return (np.arange(steps).astype(np.float32) * interval).astype(np.int64)


def patch_positions(*grids: Grid, merge: int) -> np.ndarray:
    """Compute row and column of every patch of some media, in the ViT's order (merge blocks stay together).

    Args:
        grids: of stills and videos.
        merge: side of a merge block in patches (2).

    Returns:
        rc_P2: int64 [P, 2], for the ViT's two-axis rotary embedding.
    """
    frames = [_frame_positions(grid.h, grid.w, merge) for grid in grids for _ in range(grid.t)]
    return np.concatenate(frames) if frames else np.zeros((0, 2), np.int64)


@lru_cache(maxsize=128)  # a frame of 5,000 patches takes 80 kB, in each worker
def _frame_positions(height: int, width: int, merge: int) -> np.ndarray:
    blocks = (2, height // merge, merge, width // merge, merge)
    return np.ascontiguousarray(np.indices((height, width)).reshape(blocks).swapaxes(2, 3).reshape(2, -1).T)
