"""What a vision tower needs to know of grids, beyond positions: windows and the interpolation of learnt positions.

Integers in, arrays out, as in `vlft.data.positions`. Both are computed in the loader's workers: transformers computes
windows in Python loops and copies them to the device with a wait. `vlft.model.adapt` passes them to the tower, and
tests compare them with transformers' functions (5.17 and 5.23 agree).

Letters: those of `vlft.data.collate`; W windows, A lines of the axes (rows and columns of all media).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from vlft.data.sample import Grid
from vlft.families import VisionSizes


def vision_meta(grids: Sequence[Grid], vision: VisionSizes) -> dict[str, Any]:
    """Compute the arrays that the features of a vision tower require; none for a tower without them.

    Args:
        grids: of all media, in the tower's order.
        vision: sizes of the tower.

    Returns:
        with windows, `window_index` int64 [N], `window_cu_seqlens` int32 [W + 1] and `window_lengths`, a tuple [W];
        with learnt positions, `axis_starts` int64 [F, 2], `axis_taps` int64 [A, 2], `axis_weights` float32 [A, 2].
    """
    found: dict[str, Any] = {}
    if vision.window is not None:
        found["window_index"], lengths = windows(grids, merge=vision.merge, window=vision.window)
        found["window_cu_seqlens"] = np.cumsum([0, *lengths], dtype=np.int32)
        found["window_lengths"] = lengths
    if vision.positions is not None:
        found["axis_starts"], found["axis_taps"], found["axis_weights"] = axes(grids, side=vision.positions)
    return found


def windows(grids: Sequence[Grid], *, merge: int, window: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """Compute the order of merged patches in which each window is one segment, and the windows' lengths.

    Windows do not cross time steps. Those at the lower and right edges are smaller.

    Args:
        grids: of all media.
        merge: side of a merged patch in patches (2).
        window: side of a window in merged patches (4).

    Returns:
        index_N: int64, for each place in the new order the merged patch that it takes.
        lengths: number of patches in each window.
    """
    indices, lengths, start = [], [], 0
    for grid in grids:
        index, found = _frame_windows(grid.h // merge, grid.w // merge, window)
        starts_T1 = start + len(index) * np.arange(grid.t)[:, None]
        indices.append((starts_T1 + index).reshape(-1))
        lengths += [merge**2 * length for length in found] * grid.t
        start += len(index) * grid.t
    return np.concatenate(indices), tuple(lengths)


@lru_cache(maxsize=128)  # a frame of 5,000 patches takes 10 kB, in each worker
def _frame_windows(rows: int, columns: int, window: int) -> tuple[np.ndarray, tuple[int, ...]]:
    """The order of the merged patches of one frame, and the number of merged patches in each window."""
    across = -(-columns // window)
    window_of = (np.arange(rows) // window)[:, None] * across + np.arange(columns) // window
    return np.argsort(window_of, axis=None, kind="stable"), tuple(np.bincount(window_of.reshape(-1)).tolist())


def axes(grids: Sequence[Grid], *, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compute between which learnt positions the rows and columns of each medium lie.

    A patch needs the four learnt positions around it and their weights, 48 bytes in transformers' form. They are the
    product of a row and a column, and the device multiplies them exactly, so only rows and columns are sent.

    Args:
        grids: of all media.
        side: rows and columns of the learnt grid.

    Returns:
        starts_F2: int64, for each time step the lines of its first row and of its first column.
        taps_A2: int64, for each line the learnt lines before and after it.
        weights_A2: float32, their weights.
    """
    starts, start = [], 0
    for grid in grids:
        starts += [(start, start + grid.h)] * grid.t
        start += grid.h + grid.w
    lines = [_axis(length, side) for grid in grids for length in (grid.h, grid.w)]
    taps, weights = (np.concatenate(found) for found in zip(*lines, strict=True))
    return np.array(starts), taps, weights


@lru_cache(maxsize=256)
def _axis(length: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Learnt lines and weights of an axis; its ends are the ends of the learnt grid. In float32, as in transformers."""
    place = np.arange(length, dtype=np.float32) * np.float32(side - 1) / np.float32(max(length - 1, 1))
    before = np.floor(place)[:, None]
    offsets = np.arange(2, dtype=np.float32)
    weights = np.maximum(1 - np.abs(place[:, None] - before - offsets), 0)
    return np.minimum(before + offsets, side - 1).astype(np.int64), weights
