"""The forward of a flat batch: one vision call, variable-length attention, head on supervised rows only.

It replaces `forward` of the top model, so that PEFT, DDP and DeepSpeed wrap it like any other model. A call without
`cu_seqlens` (from `generate`, or with a padded batch) runs transformers' own forward.

Letters: those of `vlft.data.sample`; C channels and V the vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import ModelOutput

from vlft.families import VisionSizes
from vlft.model import adapt, loss, patches
from vlft.model.features import Features
from vlft.model.scale import PixelScale

#: Keys of `vlft.data.collate.Batch` that the forward takes; the trainer counts with the others.
FORWARD_KEYS = (
    "input_ids",
    "position_ids",
    "cu_seqlens",
    "lengths",
    "still_pixels",
    "video_pixels",
    "vision_grid",
    "vision_cu_seqlens",
    "vision_lengths",
    "vision_positions",
    "vision_meta",
    "vision_rows",
    "supervised_rows",
    "targets",
)
#: Keys that a batch may lack: the stored features of pictures that the ViT does not see (`cached`), the keys of answers
#: that share a prompt (`branches`), and features that are also placed elsewhere, in repeated prompts (`copies`).
OPTIONAL_KEYS = ("cached", "branches", "copies")


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What the forward takes of a batch: all of `FORWARD_KEYS`, and those of `OPTIONAL_KEYS` that the batch has."""
    more = {key: batch[key] for key in OPTIONAL_KEYS if batch.get(key) is not None}
    return {key: batch[key] for key in FORWARD_KEYS} | more


@dataclass
class FlatOutput(ModelOutput):
    """The result of a flat batch.

    Attributes:
        loss: float32 [], the SUM of the cross-entropies of the supervised tokens (the trainer weights it).
        log_probs: float32 [K], the log-probability of each supervised token; returned instead of `loss` on request.
        logits: float32 [K, V] of the supervised rows; only on request.
    """

    loss: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    logits: torch.Tensor | None = None


def bind(model: torch.nn.Module, scale: PixelScale) -> None:
    """Install the flat forward in a loaded base (top class, attention installed), and the chunked loss in its head."""
    loss.bind(adapt.head(model))
    adapt.install(model)
    stock, vision = model.forward, adapt.sizes_of(model).vision

    @functools.wraps(stock)  # generate() reads the signature of `forward`
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("cu_seqlens") is None:
            return stock(*args, **kwargs)
        taken = {k: kwargs[k] for k in FORWARD_KEYS} | {k: kwargs.get(k) for k in OPTIONAL_KEYS}
        return _flat_forward(self, scale, vision, **taken, **_requests(kwargs))

    model.forward = types.MethodType(forward, model)


def _requests(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The optional results that a caller requests. Wrappers (PEFT) add their own arguments as None."""
    ours = ("return_logits", "return_log_probs")
    unknown = {k for k, v in kwargs.items() if k not in (*FORWARD_KEYS, *OPTIONAL_KEYS, *ours) and v is not None}
    unknown -= {"labels", "return_dict"}
    if unknown:
        raise TypeError(f"the flat forward does not take {sorted(unknown)}")
    return {name: bool(kwargs.get(name)) for name in ours}


def _flat_forward(
    self: Any,
    scale: PixelScale,
    vision: VisionSizes,
    *,
    input_ids: torch.Tensor,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
    still_pixels: torch.Tensor,
    video_pixels: torch.Tensor,
    vision_grid: torch.Tensor,
    vision_cu_seqlens: torch.Tensor,
    vision_lengths: tuple[int, ...],
    vision_positions: torch.Tensor,
    vision_meta: Mapping[str, Any],
    vision_rows: torch.Tensor,
    supervised_rows: torch.Tensor,
    targets: torch.Tensor,
    cached: Mapping[str, Any] | None = None,
    branches: Mapping[str, Any] | None = None,
    copies: Mapping[str, torch.Tensor] | None = None,
    return_logits: bool = False,
    return_log_probs: bool = False,
) -> FlatOutput:
    pixels_PX = scale.patches(
        # No variable has its results: they are freed before the ViT runs.
        *patches.split(
            still_pixels, video_pixels, grid=vision_grid, positions=vision_positions,
            patch=vision.patch, temporal=vision.temporal,
        ),
        dtype=adapt.pixel_dtype(self, still_pixels.device),
    )  # fmt: skip
    # A frozen tower needs no graph; under checkpointing it would otherwise be recomputed and run backward.
    trained = any(p.requires_grad for p in adapt.tower(self, "vision").parameters())
    with contextlib.nullcontext() if trained else torch.no_grad():
        features = adapt.vision_features(
            self,
            pixels_PX,
            grid=vision_grid,
            positions=vision_positions,
            cu_seqlens=vision_cu_seqlens,
            lengths=vision_lengths,
            meta=vision_meta,
        )
    embeds_TH = adapt.embeddings(self, input_ids)[0]
    if (
        embeds_TH.dtype is torch.float16
    ):  # of a frozen embedding; under bfloat16 autocast torch refuses the two together
        embeds_TH = embeds_TH.float()
    places, found = vision_rows.shape[0], features.embeds_NH.shape[0]
    if places == 0:  # no pictures: the filler's features are dropped, so the same modules run and get zero gradients
        features = features.first(0)
    elif places != found:
        raise ValueError(f"{places} places in the row for {found} features of the ViT")
    rows = vision_rows
    if cached is not None:
        features = features.and_then(Features.stacked(cached["features"]))
        rows = torch.cat([vision_rows, cached["rows"]])
    if copies is not None:
        features = features.and_then(features.at(copies["of"]))
        rows = torch.cat([rows, copies["rows"]])
    embeds_TH = embeds_TH.index_copy(0, rows, features.embeds_NH.to(embeds_TH.dtype))
    hidden_TH = adapt.hidden_states(
        self, embeds_TH, features, rows,
        position_ids=position_ids, cu_seqlens=cu_seqlens, lengths=lengths, branches=branches,
    )  # fmt: skip
    hidden_KH = hidden_TH.index_select(0, supervised_rows)
    logits_KV = self.lm_head(hidden_KH).float() if return_logits else None
    if return_log_probs:
        return FlatOutput(log_probs=self.lm_head(hidden_KH, targets, summed=False), logits=logits_KV)
    return FlatOutput(loss=self.lm_head(hidden_KH, targets), logits=logits_KV)
