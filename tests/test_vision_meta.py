"""Windows and interpolated positions from the workers against transformers' own functions, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
import torch
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_window_index,
)

from vlft.data import vision_meta as meta
from vlft.data.positions import patch_positions
from vlft.data.sample import Grid
from vlft.demo.tiny import tiny_config, tiny_processor
from vlft.families import FAMILIES
from vlft.model import vision

TINY = {family.model_type: family.sizes(tiny_config(tiny_processor(family), family)) for family in FAMILIES.values()}


def _grids() -> list[list[Grid]]:
    """Single media of every edge, and batches of many."""
    cells = [(1, 1, 1), (1, 1, 9), (1, 7, 1), (3, 2, 5), (1, 4, 4), (2, 8, 4), (1, 9, 13), (5, 3, 12), (1, 24, 24)]
    alone = [Grid(t=t, h=2 * h, w=2 * w) for t, h, w in cells]
    draw = random.Random(0)
    mixed = [
        [Grid(t=draw.choice((1, 1, 4)), h=2 * draw.randint(1, 40), w=2 * draw.randint(1, 40)) for _ in range(6)]
        for _ in range(20)
    ]
    return [[grid] for grid in alone] + [alone] + mixed


def _thw(grids) -> torch.Tensor:
    return torch.tensor([[grid.t, grid.h, grid.w] for grid in grids])


@pytest.mark.parametrize(("window", "patch"), [(112, 14), (128, 16), (56, 14), (84, 14)])
def test_windows_are_transformers_own(window, patch):
    for grids in _grids():
        index, cumulative = get_vision_window_index(_thw(grids), 2, window, patch)
        ours, lengths = meta.windows(grids, merge=2, window=window // 2 // patch)
        assert torch.equal(torch.from_numpy(ours), index)
        assert [0, *itertools.accumulate(lengths)] == cumulative.tolist()
        assert min(lengths) > 0


@pytest.mark.parametrize("side", [1, 2, 8, 48])
def test_interpolated_positions_are_transformers_own(side):
    for grids in _grids():
        thw = _thw(grids)
        theirs = get_vision_interpolation_indices_and_weights(
            thw, num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=2
        )
        found = dict(zip(("axis_starts", "axis_taps", "axis_weights"), meta.axes(grids, side=side), strict=True))
        positions = torch.cat([torch.from_numpy(patch_positions(grid, merge=2)) for grid in grids])
        sent = {key: torch.from_numpy(value) for key, value in found.items()}
        ours = vision.interpolation(sent, positions, get_vision_cu_seqlens(thw), side=side)
        for one, other in zip(ours, theirs, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


def test_a_tower_gets_what_its_sizes_need():
    grids, keys = [Grid(t=2, h=10, w=6)], {"qwen2_vl": set()}
    keys["qwen2_5_vl"] = {"window_index", "window_cu_seqlens", "window_lengths"}
    for model_type, sizes in TINY.items():
        found = meta.vision_meta(grids, sizes.vision)
        assert set(found) == keys.get(model_type, {"axis_starts", "axis_taps", "axis_weights"})
        assert sum(found.get("window_lengths", (120,))) == 120


def test_little_is_sent_for_each_patch():
    """Less than 2% of a patch's own pixels, for a picture of ordinary size."""
    grid = Grid(t=1, h=64, w=48)
    for sizes in TINY.values():
        found = meta.vision_meta([grid], sizes.vision)
        sent = sum(8 * len(value) if isinstance(value, tuple) else value.nbytes for value in found.values())
        assert sent < 0.02 * grid.h * grid.w * sizes.vision.channels * sizes.vision.patch**2


def test_what_is_kept_for_the_next_batch_is_not_the_batchs_own():
    """A batch may be written to: the next one with the same grids does not change."""
    grids, both = [Grid(t=1, h=6, w=4)], dataclasses.replace(TINY["qwen2_5_vl"].vision, positions=8)
    first, want = meta.vision_meta(grids, both), meta.vision_meta(grids, both)
    for value in first.values():
        if not isinstance(value, tuple):
            value[:] = 7
    again = meta.vision_meta(grids, both)
    assert {key: list(map(str, value)) for key, value in again.items()} == {
        key: list(map(str, value)) for key, value in want.items()
    }
