"""Split pixels into the ViT's patches, on their device and without waiting for it.

Letters in shapes: P patches, in the ViT's order (merged patches stay together); M stills and videos; p pixels of a side
of a patch; d frames of a patch, 1 of a still.
"""

from __future__ import annotations

import torch


def split(
    still_pixels: torch.Tensor,
    video_pixels: torch.Tensor,
    *,
    grid: torch.Tensor,
    positions: torch.Tensor,
    patch: int,
    temporal: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split the pixels of stills and videos into patches.

    Args:
        still_pixels: uint8 [bytes], the pixels [H, W, 3] of each still, one after the other.
        video_pixels: uint8 [bytes], the pixels [F, H, W, 3] of each video.
        grid: int64 [M, 3], time steps, rows and columns of patches; first those of stills.
        positions: int64 [P, 2], row and column of each patch in its frame.
        patch: p.
        temporal: d of videos.

    Returns:
        stills, uint8 [P_still, 3, p, p], and videos, uint8 [P_video, 3, d, p, p], both in channels-last memory.

    Raises:
        ValueError: there are pixels of more or fewer patches than positions.
    """
    frame_bytes = 3 * patch**2
    stills, videos = len(still_pixels) // frame_bytes, len(video_pixels) // (frame_bytes * temporal)
    if stills + videos != len(positions):
        raise ValueError(f"pixels of {stills} + {videos} patches (stills, videos), and {len(positions)} positions")
    place_P = torch.arange(len(positions), device=positions.device)
    size_M = grid[:, 1] * grid[:, 2]  # patches of a time step
    end_M = (grid[:, 0] * size_M).cumsum(0)
    medium_P = torch.bucketize(place_P, end_M, right=True)
    end_P, size_P, width_P = torch.stack([end_M, size_M, grid[:, 2]])[:, medium_P]
    first_P = place_P - (place_P - end_P) % size_P  # of its time step
    top_P = patch * width_P * positions[:, 0] + positions[:, 1]

    def taken(pixels: torch.Tensor, begin: int, end: int, frames: int) -> torch.Tensor:
        """Patches `begin` to `end`: p runs of p pixels of each frame. A row of pixels has a run for each column."""
        if begin == end:
            return pixels.new_empty(0, 3, frames, patch, patch)
        first, size, width, top = (one_P[begin:end, None, None] for one_P in (first_P, size_P, width_P, top_P))
        frame, run = (torch.arange(count, device=pixels.device) for count in (frames, patch))
        runs_Pdp = patch * frames * (first - begin) + top + patch * size * frame[:, None] + width * run
        found = pixels.view(-1, 3 * patch).index_select(0, runs_Pdp.flatten())
        return found.view(-1, frames, patch, patch, 3).permute(0, 4, 1, 2, 3)

    return taken(still_pixels, 0, stills, 1)[:, :, 0], taken(video_pixels, stills, len(positions), temporal)
