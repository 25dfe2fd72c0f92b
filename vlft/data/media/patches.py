"""Pixels -> the ViT's patches, in its order. `vlft.data.media.read` opens and decodes files.

Letters in shapes: P patches; H, W pixels after resizing; F frames; p pixels of a side of a patch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlft.config.recipe import Recipe
from vlft.data import patch_memory
from vlft.data.patch_memory import Room
from vlft.data.sample import EncodedMedia, Grid

if TYPE_CHECKING:
    import torch


def grid_for(t: int, height: int, width: int, recipe: Recipe) -> Grid:
    """Return the grid of `t` time steps of this size."""
    return Grid(t=t, h=height // recipe.patch_size, w=width // recipe.patch_size)


def still_patches(pixels_3HW: torch.Tensor, recipe: Recipe) -> EncodedMedia:
    """Split a still into patches, ordered by row and column of merged patches, then by row and column within one.

    The three colours of a pixel stay adjacent, as decoders and the resizer store them, so that runs of 3 * p bytes are
    copied at once. That takes a fifth of the time of permuting single bytes. The model separates the colours on its
    device.
    """
    room, grid = _split(pixels_3HW.permute(1, 2, 0), 1, recipe, video=False)
    p = recipe.patch_size
    patches_P3pp = room.tensor((grid.patches, 3, p, p), (3 * p * p, 1, 3 * p, 3))
    return EncodedMedia(grid=grid, patches=patches_P3pp, is_video=False)


def video_patches(frames_F3HW: torch.Tensor, recipe: Recipe) -> EncodedMedia:
    """Split frames into patches as `still_patches` does, ordered by time first, with two frames per patch."""
    room, grid = _split(frames_F3HW.permute(0, 2, 3, 1), len(frames_F3HW), recipe, video=True)
    p = recipe.patch_size
    patches_P32pp = room.tensor((grid.patches, 3, 2, p, p), (6 * p * p, 1, 3 * p * p, 3 * p, 3))
    return EncodedMedia(grid=grid, patches=patches_P32pp, is_video=True)


def _split(pixels_FHWC: torch.Tensor, frames: int, recipe: Recipe, *, video: bool) -> tuple[Room, Grid]:
    """Copy pixels once, from where they are to their place in the micro-batch, in the order of patches.

    Returns:
        [P, 1 or 2, p, p, 3], contiguous; and the grid.
    """
    height, width = pixels_FHWC.shape[-3:-1]
    p, m, depth = recipe.patch_size, recipe.merge_size, 2 if video else 1
    grid = grid_for(frames // depth, height, width, recipe)
    t, h, w = grid.t, grid.h // m, grid.w // m
    run = np.dtype((np.void, 3 * p))
    pixels = pixels_FHWC.contiguous().numpy().reshape(-1)
    room = patch_memory.room(pixels.nbytes, video=video)
    patches = room.array.view(run).reshape(t, h, w, m, m, depth, p)
    if not video:  # just resized, so that it is in the processor's caches
        patches[...] = pixels.view(run).reshape(t, depth, h, m, p, w, m).transpose(0, 2, 5, 3, 6, 1, 4)
        return room, grid
    # A clip may be in memory. In the order of patches it is read one line of the cache at a time, which takes 1.6 times
    # as long as row by row of merged patches, each through a buffer that stays in the cache.
    rows = pixels.reshape(t, depth, h, -1)
    row = np.empty((depth, rows.shape[-1]), np.uint8)
    in_order = row.reshape(-1).view(run).reshape(depth, m, p, w, m).transpose(3, 1, 4, 0, 2)
    for step in range(t):
        for place in range(h):
            row[:] = rows[step, :, place]
            patches[step, place] = in_order
    return room, grid
