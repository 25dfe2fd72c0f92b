"""[EncodedSample] -> Batch: samples concatenated in one flat row without padding, with all metadata for the forward.

Independent of any model. Letters in shapes are those of `vlft.data.sample`; F is the number of ViT attention segments:
one per still, and one per time step of a video.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch

from vlft.data.encode import UNTRAINED
from vlft.data.ipc import sent
from vlft.data.patch_memory import joined
from vlft.data.pieces import KIND_IMAGE, KIND_VIDEO
from vlft.data.positions import patch_positions
from vlft.data.sample import EncodedMedia, EncodedSample, Grid
from vlft.data.vision_meta import vision_meta
from vlft.errors import BadRow
from vlft.families import VisionSizes


class _Cached(TypedDict, total=False):
    """The part of a batch that `--cache_vision_features` adds. `vision_*` then have only media that are not stored."""

    cached: dict[str, Any]  # "features" [layers, N, H], "rows" int64 [N] as vision_rows, "media" their number
    feature_keys: tuple[tuple[bytes | None, int], ...]  # key and number of features of each in vision_grid


class Batch(_Cached):
    """One micro-batch. The forward takes the tensors; the rest is for counting and for error messages."""

    input_ids: torch.Tensor  # int64 [1, T]
    labels: torch.Tensor  # int64 [1, T], not shifted
    position_ids: torch.Tensor  # int64 [4, 1, T]: index within the sample, then M-RoPE time, height, width
    cu_seqlens: torch.Tensor  # int32 [S + 1], where samples begin and end in the row
    lengths: tuple[int, ...]  # [S], tokens of each sample
    still_patches: torch.Tensor  # uint8 [P_still, 3, patch, patch]
    video_patches: torch.Tensor  # uint8 [P_video, 3, 2, patch, patch]
    vision_grid: torch.Tensor  # int64 [M, 3], stills first, then videos; the same order in all `vision_*` below
    vision_cu_seqlens: torch.Tensor  # int32 [F + 1]
    vision_lengths: tuple[int, ...]  # [F]
    vision_positions: torch.Tensor  # int64 [P, 2], row and column of each patch
    vision_meta: dict[str, torch.Tensor | tuple[int, ...]]  # as `vlft.data.vision_meta` says
    vision_rows: torch.Tensor  # int64 [N], row positions that the ViT's features replace, in the ViT's order
    supervised_rows: torch.Tensor  # int64 [K], row positions whose next token is trained
    targets: torch.Tensor  # int64 [K], the next tokens at those positions
    counts: dict[str, int]  # tokens, supervised_tokens, images, videos, samples
    rows: tuple[tuple[str, int], ...]  # (file, index) of each sample
    skipped: tuple[BadRow, ...]  # rows of this micro-batch that could not be decoded


class Collator:
    """Callable for a DataLoader.

    Args:
        vision: sizes of the ViT, for its metadata and for the placeholder picture of a batch without pictures.
        filler_token: id of the single, untrained token of an empty batch.
        filler_picture: whether a batch without patches has a placeholder picture. Without it the ViT does not run.
    """

    def __init__(self, *, vision: VisionSizes, filler_token: int, filler_picture: bool = True) -> None:
        self.vision = vision
        self.filler_token = filler_token
        self.filler_picture = filler_picture

    def __call__(self, items: Sequence[EncodedSample | BadRow]) -> Batch:
        """Collate the rows of one micro-batch. An empty list gives an empty batch (`vlft.data.order` says why)."""
        samples = [item for item in items if not isinstance(item, BadRow)]
        skipped = tuple(item for item in items if isinstance(item, BadRow))
        if samples:
            ids_T = torch.cat([s.input_ids_T for s in samples])
            labels_T = torch.cat([s.labels_T for s in samples])
            kinds_T = torch.cat([s.kinds_T for s in samples])
            positions_3T = torch.cat([s.positions_3T for s in samples], dim=1)
            lengths = tuple(len(s.input_ids_T) for s in samples)
        else:
            ids_T, labels_T = torch.tensor([self.filler_token]), torch.tensor([UNTRAINED])
            kinds_T, positions_3T, lengths = (
                torch.zeros(1, dtype=torch.uint8),
                torch.zeros(3, 1, dtype=torch.int64),
                (1,),
            )
        places_T = torch.cat([torch.arange(length) for length in lengths])
        # The token after a sample's last one belongs to the next sample: its first label is never a target.
        next_labels_T = torch.where(places_T == 0, UNTRAINED, labels_T).roll(-1)
        next_labels_T[-1] = UNTRAINED
        supervised_rows_K = (next_labels_T != UNTRAINED).nonzero().squeeze(1)

        media = [m for s in samples for m in s.media if not m.is_video]
        images = len(media)
        media += [m for s in samples for m in s.media if m.is_video]
        rows_N = torch.cat([(kinds_T == kind).nonzero().squeeze(1) for kind in (KIND_IMAGE, KIND_VIDEO)])
        vision_rows, more = _without_cached(media, rows_N, cell=self.vision.cell)
        stills = [m for m in media if m.features is None and not m.is_video]
        videos = [m for m in media if m.features is None and m.is_video]
        patch, merge = self.vision.patch, self.vision.merge
        still_patches = [m.patches for m in stills]
        grids = [m.grid for m in (*stills, *videos)]
        if not grids and self.filler_picture:
            # The ViT runs in every micro-batch: in DDP and ZeRO the other ranks would wait for one without pictures.
            # The features of this picture are not used.
            grids = [Grid(t=1, h=merge, w=merge)]
            still_patches = [torch.zeros(self.vision.cell, 3, patch, patch, dtype=torch.uint8)]
        vision_lengths = tuple(grid.h * grid.w for grid in grids for _ in range(grid.t))
        batch = Batch(
            input_ids=ids_T[None],
            labels=labels_T[None],
            position_ids=torch.cat([places_T[None], positions_3T])[:, None],
            cu_seqlens=_cumulative(lengths),
            lengths=lengths,
            still_patches=_joined(still_patches, (3, patch, patch)),
            video_patches=_joined([m.patches for m in videos], (3, 2, patch, patch)),
            vision_grid=torch.tensor([[g.t, g.h, g.w] for g in grids], dtype=torch.int64).view(-1, 3),
            vision_cu_seqlens=_cumulative(vision_lengths),
            vision_lengths=vision_lengths,
            vision_positions=torch.from_numpy(patch_positions(*grids, merge=merge)),
            vision_meta={
                key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                for key, value in (vision_meta(grids, self.vision) if grids else {}).items()
            },
            vision_rows=vision_rows,
            supervised_rows=supervised_rows_K,
            targets=next_labels_T[supervised_rows_K],
            counts={
                "tokens": len(ids_T) if samples else 0,
                "supervised_tokens": len(supervised_rows_K),
                "images": images,
                "videos": len(media) - images,
                "samples": len(samples),
            },
            rows=tuple((s.file, s.index) for s in samples),
            skipped=skipped,
        )
        batch.update(more)
        return sent(batch)


def _without_cached(media: Sequence[EncodedMedia], rows_N: torch.Tensor, *, cell: int) -> tuple[torch.Tensor, _Cached]:
    """Separate the media whose features are stored from those that the ViT sees.

    Args:
        media: in the ViT's order.
        rows_N: row positions of their features, in this order.
        cell: patches of a merged patch.

    Returns:
        vision_rows: of the media that the ViT sees.
        more: `cached` and `feature_keys` of the batch, if there are any.
    """
    more = _Cached()
    counts = [m.grid.patches // cell for m in media]
    seen = [(m.key, count) for m, count in zip(media, counts, strict=True) if m.features is None]
    if any(key is not None for key, _ in seen):
        more["feature_keys"] = tuple(seen)
    features = [m.features for m in media if m.features is not None]
    if features:
        is_cached_N = torch.tensor([m.features is not None for m in media]).repeat_interleave(torch.tensor(counts))
        joined = features[0] if len(features) == 1 else torch.cat(features, dim=1)
        more["cached"] = {"features": joined, "rows": rows_N[is_cached_N], "media": len(features)}
        rows_N = rows_N[~is_cached_N]
    return rows_N, more


def _joined(patches: Sequence[torch.Tensor], shape: tuple[int, ...]) -> torch.Tensor:
    """Concatenate patches, in the memory layout that they have. What was written as one pack is not copied."""
    return joined(patches) if patches else torch.zeros(0, *shape, dtype=torch.uint8)


def _cumulative(lengths: Sequence[int]) -> torch.Tensor:
    """[0, l0, l0+l1, ...] as int32, the form that variable-length attention kernels take."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
