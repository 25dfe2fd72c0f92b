"""[EncodedSample] -> Batch: samples concatenated in one flat row without padding, with all metadata for the forward.

Independent of any model. Letters in shapes are those of `vlft.data.sample`; S is the number of attention segments of
the language model: one per sample, and one per answer of a preference row; A is the number of answers; F is the number
of ViT attention segments: one per still, and one per time step of a video. `vlft.data.layout` places preference rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np
import torch

from vlft.data.encode import UNTRAINED
from vlft.data.ipc import sent
from vlft.data.layout import BranchKeys, Copies, Layout, copies_of, cumulative
from vlft.data.pieces import KIND_IMAGE, KIND_TEXT, KIND_VIDEO
from vlft.data.pixel_memory import joined
from vlft.data.positions import patch_positions
from vlft.data.sample import EncodedMedia, EncodedSample, Grid
from vlft.data.vision_meta import vision_meta
from vlft.errors import BadRow
from vlft.families import VisionSizes


class _Cached(TypedDict, total=False):
    """The part of a batch that `--cache_vision_features` adds. `vision_*` then have only media that are not stored."""

    cached: dict[str, Any]  # "features" [layers, N, H], "rows" int64 [N] as vision_rows, "media" their number
    feature_keys: tuple[tuple[bytes | None, int], ...]  # key and number of features of each in vision_grid


class _Answers(_Cached, total=False):
    """The part of a batch that preference rows add."""

    branches: BranchKeys  # if answers share the tokens of their prompt
    copies: Copies  # if a prompt with pictures or videos is repeated
    answers: dict[str, Any]  # "bounds" int64 [A + 1], "per_sample" tuple; "reference" float32 [A], if it is known


class Batch(_Answers):
    """One micro-batch. The forward takes the tensors; the rest is for counting and for error messages."""

    input_ids: torch.Tensor  # int64 [1, T]
    labels: torch.Tensor  # int64 [1, T], not shifted
    position_ids: torch.Tensor  # int64 [4, 1, T]: index within the sample, then M-RoPE time, height, width
    cu_seqlens: torch.Tensor  # int32 [S + 1], where segments begin and end in the row
    lengths: tuple[int, ...]  # [S], tokens of each segment: a sample, or prompt and answer, or an answer
    still_pixels: torch.Tensor  # uint8 [bytes], the pixels [H, W, 3] of each still, one after the other
    video_pixels: torch.Tensor  # uint8 [bytes], the pixels [F, H, W, 3] of each video
    vision_grid: torch.Tensor  # int64 [M, 3], stills first, then videos; the same order in all `vision_*` below
    vision_cu_seqlens: torch.Tensor  # int32 [F + 1]
    vision_lengths: tuple[int, ...]  # [F]
    vision_positions: torch.Tensor  # int64 [P, 2], row and column of each patch
    vision_meta: dict[str, torch.Tensor | tuple[int, ...]]  # as `vlft.data.vision_meta` says
    vision_rows: torch.Tensor  # int64 [N], row positions that the ViT's features replace, in the ViT's order
    supervised_rows: torch.Tensor  # int64 [K], row positions whose next token is trained; a shared prompt's end repeats
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
        shared: whether the answers of a preference row share the tokens of its prompt. Else each has a copy.
    """

    def __init__(
        self, *, vision: VisionSizes, filler_token: int, filler_picture: bool = True, shared: bool = True
    ) -> None:
        self.vision = vision
        self.filler_token = filler_token
        self.filler_picture = filler_picture
        self.shared = shared

    def __call__(self, items: Sequence[EncodedSample | BadRow]) -> Batch:
        """Collate the rows of one micro-batch. An empty list gives an empty batch (`vlft.data.order` says why)."""
        samples = [item for item in items if not isinstance(item, BadRow)]
        skipped = tuple(item for item in items if isinstance(item, BadRow))
        layout = Layout.of([(len(s.input_ids_T), s.branches) for s in samples] or [(1, ())], shared=self.shared)
        lengths = layout.lengths
        if samples:
            taken_T = layout.taken_T
            ids_T = _placed([s.input_ids_T for s in samples], taken_T)
            labels_T = _placed([s.labels_T for s in samples], taken_T)
            kinds_T = _placed([s.kinds_T for s in samples], taken_T)
            positions_3T = _placed([s.positions_3T for s in samples], taken_T)
        else:
            ids_T, labels_T = torch.tensor([self.filler_token]), torch.tensor([UNTRAINED])
            kinds_T, positions_3T = torch.zeros(1, dtype=torch.uint8), torch.zeros(3, 1, dtype=torch.int64)
        # No token predicts the first one of a sample.
        trained_K = _places((labels_T.numpy() != UNTRAINED) & (layout.before_T.numpy() >= 0))

        media = [m for s in samples for m in s.media if not m.is_video]
        images = len(media)
        media += [m for s in samples for m in s.media if m.is_video]
        own_kinds_T = kinds_T if layout.copied_T is None else kinds_T.masked_fill(layout.copied_T >= 0, KIND_TEXT)
        rows_N = torch.cat([_places(own_kinds_T.numpy() == kind) for kind in (KIND_IMAGE, KIND_VIDEO)])
        vision_rows, more = _without_cached(media, rows_N, cell=self.vision.cell)
        stills = [m for m in media if m.features is None and not m.is_video]
        videos = [m for m in media if m.features is None and m.is_video]
        merge = self.vision.merge
        still_pixels = [m.pixels for m in stills]
        grids = [m.grid for m in (*stills, *videos)]
        if not grids and self.filler_picture:
            # The ViT runs in every micro-batch: in DDP and ZeRO the other ranks would wait for one without pictures.
            # The features of this picture are not used.
            grids = [Grid(t=1, h=merge, w=merge)]
            still_pixels = [torch.zeros(merge * self.vision.patch, merge * self.vision.patch, 3, dtype=torch.uint8)]
        vision_lengths = tuple(grid.h * grid.w for grid in grids for _ in range(grid.t))
        batch = Batch(
            input_ids=ids_T[None],
            labels=labels_T[None],
            position_ids=torch.cat([layout.places_T[None], positions_3T])[:, None],
            cu_seqlens=layout.cu_seqlens,
            lengths=lengths,
            still_pixels=joined(still_pixels),
            video_pixels=joined([m.pixels for m in videos]),
            vision_grid=torch.from_numpy(np.array([(g.t, g.h, g.w) for g in grids], dtype=np.int64).reshape(-1, 3)),
            vision_cu_seqlens=cumulative(vision_lengths),
            vision_lengths=vision_lengths,
            vision_positions=torch.from_numpy(patch_positions(*grids, merge=merge)),
            vision_meta={
                key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                for key, value in (vision_meta(grids, self.vision) if grids else {}).items()
            },
            vision_rows=vision_rows,
            supervised_rows=layout.before_T[trained_K],
            targets=labels_T[trained_K],
            counts={
                "tokens": len(ids_T) if samples else 0,
                "supervised_tokens": len(trained_K),
                "images": images,
                "videos": len(media) - images,
                "samples": len(samples),
            },
            rows=tuple((s.file, s.index) for s in samples),
            skipped=skipped,
        )
        batch.update(more)
        if layout.branches is not None:
            batch["branches"] = layout.branches
        if layout.copied_T is not None:
            seen_N = torch.cat([vision_rows, more["cached"]["rows"]]) if "cached" in more else vision_rows
            if (copies := copies_of(layout.copied_T, kinds_T != KIND_TEXT, seen_N)) is not None:
                batch["copies"] = copies
        if any(s.branches for s in samples):
            batch["answers"] = _answers(samples, layout, trained_K)
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


def _places(mask: np.ndarray) -> torch.Tensor:
    """Where a mask is true. By numpy, whose calls take a third of the time of torch's."""
    return torch.from_numpy(np.flatnonzero(mask))


def _placed(values: Sequence[torch.Tensor], taken_T: torch.Tensor | None) -> torch.Tensor:
    """Join values of samples along their tokens, and take those of each place in the flat row."""
    joined_T = torch.cat(list(values), dim=-1)
    return joined_T if taken_T is None else joined_T[..., taken_T]


def _answers(samples: Sequence[EncodedSample], layout: Layout, trained_K: torch.Tensor) -> dict[str, Any]:
    """Return `answers` of the batch. A plain row counts as one answer.

    Raises:
        ValueError: the reference is known of some preference rows only, or not of each answer.
    """
    per_sample = tuple(max(1, len(s.branches) - 1) for s in samples)
    found = {"bounds": torch.searchsorted(trained_K, layout.cu_seqlens.long()), "per_sample": per_sample}
    if any(s.reference for s in samples):
        values = [s.reference if s.branches else (math.nan,) for s in samples]  # there is no reference of a plain row
        if tuple(map(len, values)) != per_sample:
            raise ValueError(f"{[len(one) for one in values]} values of the reference for {per_sample} answers")
        found["reference"] = torch.tensor([value for one in values for value in one], dtype=torch.float32)
    return found
