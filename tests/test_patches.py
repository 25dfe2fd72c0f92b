"""Pixels of a batch become patches on their device: in the order of the stock processors, and without a wait."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from patches import patches_of

from vlft.data.positions import patch_positions
from vlft.data.sample import EncodedMedia, Grid
from vlft.model import tracing
from vlft.model.patches import split

#: (time steps, rows and columns of patches)
STILLS = [(1, 2, 2), (1, 4, 10), (1, 12, 2), (1, 6, 6)]
CLIPS = [(3, 4, 6), (1, 8, 2), (2, 2, 2)]


def drawn(grid: tuple[int, int, int], *, is_video: bool, patch: int) -> EncodedMedia:
    t, h, w = grid
    shape = (2 * t if is_video else 1, h * patch, w * patch, 3)
    pixels = np.random.default_rng(grid).integers(0, 256, shape, dtype=np.uint8)
    return EncodedMedia(grid=Grid(t=t, h=h, w=w), pixels=torch.from_numpy(pixels), is_video=is_video)


def stock_order(media: list[EncodedMedia], patch: int) -> torch.Tensor:
    """[P, 3, frames of a patch, p, p], by the views that the stock processors split a picture with."""
    found = []
    for one in media:
        frames, (t, h, w) = len(one.pixels) // one.grid.t, (one.grid.t, one.grid.h, one.grid.w)
        cut = one.pixels.permute(0, 3, 1, 2).reshape(t, frames, 3, h // 2, 2, patch, w // 2, 2, patch)
        found.append(cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3, frames, patch, patch))
    return torch.cat(found)


@pytest.mark.parametrize("patch", [14, 16])
@pytest.mark.parametrize(
    ("stills", "clips"), [(STILLS, CLIPS), (STILLS, []), ([], CLIPS), (STILLS[:1], []), ([], CLIPS[:1]), ([], [])]
)
def test_patches_are_in_the_order_of_the_stock_processors(stills, clips, patch):
    media = [drawn(grid, is_video=False, patch=patch) for grid in stills]
    videos = [drawn(grid, is_video=True, patch=patch) for grid in clips]
    of_stills, of_videos = patches_of([*videos, *media], patch=patch)
    assert of_stills.shape == (sum(t * h * w for t, h, w in stills), 3, patch, patch)
    assert of_videos.shape == (sum(t * h * w for t, h, w in clips), 3, 2, patch, patch)
    if media:
        assert torch.equal(of_stills, stock_order(media, patch)[:, :, 0])
    if videos:
        assert torch.equal(of_videos, stock_order(videos, patch))


def test_the_host_does_not_wait_and_queues_as_much_for_a_hundred_pictures():
    counts = []
    for stills in (STILLS, STILLS * 25):
        grids = [Grid(t=t, h=h, w=w) for t, h, w in (*stills, *CLIPS)]
        positions = torch.from_numpy(patch_positions(*grids, merge=2))
        sizes = torch.tensor([[one.t, one.h, one.w] for one in grids])
        seen: list[tracing.Op] = []
        with tracing.without_contents():
            device = torch.device("cuda", 0)
            pixels = [
                torch.empty(588 * frames * sum(t * h * w for t, h, w in some), dtype=torch.uint8, device=device)
                for some, frames in ((stills, 1), (CLIPS, 2))
            ]
            where = [torch.empty(one.shape, dtype=one.dtype, device=device) for one in (sizes, positions)]
            with tracing.Watch(tracing.refuse_waits, lambda op, seen=seen: seen.append(op)):
                split(*pixels, grid=where[0], positions=where[1], patch=14, temporal=2)
        counts.append(sum(op.name.startswith("aten.") and not op.function.is_view for op in seen))
    assert counts[0] == counts[1] < 45


def test_pixels_of_other_patches_are_refused():
    still = drawn((1, 4, 4), is_video=False, patch=14)
    with pytest.raises(ValueError, match=r"pixels of 16 \+ 0 patches \(stills, videos\), and 8 positions"):
        split(
            still.pixels.flatten(),
            torch.empty(0, dtype=torch.uint8),
            positions=torch.zeros(8, 2, dtype=torch.int64),
            grid=torch.tensor([[1, 2, 4]]),
            patch=14,
            temporal=2,
        )
