"""Pixels -> the ViT's patches, in its order. `vlft.data.media.read` opens and decodes files.

Letters in shapes: P patches; H, W pixels after resizing; F frames; p pixels of a side of a patch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vlft.config.recipe import Recipe
from vlft.data import patch_memory
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
    patches_P1ppC, grid = _split(pixels_3HW[None], recipe, video=False)
    return EncodedMedia(grid=grid, patches=patches_P1ppC[:, 0].permute(0, 3, 1, 2), is_video=False)


def video_patches(frames_F3HW: torch.Tensor, recipe: Recipe) -> EncodedMedia:
    """Split frames into patches as `still_patches` does, ordered by time first, with two frames per patch."""
    patches_P2ppC, grid = _split(frames_F3HW, recipe, video=True)
    return EncodedMedia(grid=grid, patches=patches_P2ppC.permute(0, 4, 1, 2, 3), is_video=True)


def _split(frames_F3HW: torch.Tensor, recipe: Recipe, *, video: bool) -> tuple[torch.Tensor, Grid]:
    """Split a still or frames into patches, in one copy from where they are to their place in the micro-batch.

    Returns:
        uint8 [P, 1 or 2, p, p, 3], contiguous; and the grid.
    """
    frames, _, height, width = frames_F3HW.shape
    p, m, depth = recipe.patch_size, recipe.merge_size, 2 if video else 1
    grid = grid_for(frames // depth, height, width, recipe)
    run = np.dtype((np.void, 3 * p))
    pixels = frames_F3HW.permute(0, 2, 3, 1).contiguous().numpy().reshape(-1).view(run)
    made = patch_memory.empty(frames_F3HW.nbytes, video=video)
    blocks = (grid.h // m, grid.w // m, m, m)
    made.numpy().view(run).reshape(grid.t, *blocks, depth, p)[:] = pixels.reshape(
        grid.t, depth, blocks[0], m, p, blocks[1], m
    ).transpose(0, 2, 5, 3, 6, 1, 4)
    return made.view(grid.patches, depth, p, p, 3), grid
