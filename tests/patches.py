"""The patches of encoded media, by the function that the model's forward calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from vlft.data.pixel_memory import joined
from vlft.data.positions import patch_positions
from vlft.data.sample import EncodedMedia
from vlft.model.patches import split


def patches_of(media: Sequence[EncodedMedia], *, patch: int = 14) -> tuple[torch.Tensor, torch.Tensor]:
    """Of stills uint8 [P, 3, p, p] and of videos uint8 [P, 3, 2, p, p], each in the order of `media`."""
    stills = [one for one in media if not one.is_video]
    videos = [one for one in media if one.is_video]
    grids = [one.grid for one in (*stills, *videos)]
    return split(
        joined([one.pixels for one in stills]),
        joined([one.pixels for one in videos]),
        grid=torch.tensor([[one.t, one.h, one.w] for one in grids], dtype=torch.int64).view(-1, 3),
        positions=torch.from_numpy(patch_positions(*grids, merge=2)),
        patch=patch,
        temporal=2,
    )


def patches(medium: EncodedMedia, *, patch: int = 14) -> torch.Tensor:
    """Those of one still or one video."""
    return patches_of([medium], patch=patch)[medium.is_video]
