"""Rows -> what a model is asked. Between data, which knows no model, and model, which knows no row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from vlft.config.recipe import Recipe
from vlft.data.sample import EncodedMedia, EncodedPrompt, Sample
from vlft.families import Family
from vlft.model.forward import PixelScale
from vlft.model.generate import Prompt, Speaker


def question_of(sample: Sample) -> Sample:
    """A row up to its last user turn with a trained answer: what a model is asked, to compare it with the row's own."""
    answer = max(place for place, turn in enumerate(sample.turns) if turn.trained != "none")
    last = max(place for place, turn in enumerate(sample.turns[:answer]) if turn.role == "user")
    return replace(sample, turns=sample.turns[: last + 1])


def as_tensors(prompt: EncodedPrompt, recipe: Recipe) -> Prompt:
    """What `vlft.model.generate` takes.

    Args:
        prompt: of an `Encoder`. recipe: its own.
    """
    side, pair = recipe.patch_size, recipe.temporal_patch_size
    stills = [medium for medium in prompt.media if not medium.is_video]
    videos = [medium for medium in prompt.media if medium.is_video]
    no_still, no_video = (torch.zeros(0, 3, *shape, dtype=torch.uint8) for shape in ((side, side), (pair, side, side)))
    return Prompt(
        ids_T=prompt.input_ids_T,
        kinds_T=prompt.kinds_T,
        still_patches=torch.cat([no_still, *(medium.patches for medium in stills)]),
        video_patches=torch.cat([no_video, *(medium.patches for medium in videos)]),
        still_grids_M3=_grids(stills),
        video_grids_M3=_grids(videos),
    )


def _grids(media: Sequence[EncodedMedia]) -> torch.Tensor:
    """int64 [M, 3], also for none."""
    return torch.tensor([[m.grid.t, m.grid.h, m.grid.w] for m in media], dtype=torch.int64).view(-1, 3)


def speaker(model: Any, processor: Any, family: Family) -> Speaker:
    """A model (top class, LoRA layers in it where there are any) that answers, with the words of its processor."""
    tokenizer = processor.tokenizer
    return Speaker(
        model=model,
        tokenizer=tokenizer,
        scale=PixelScale.of(processor),
        end=tokenizer.convert_tokens_to_ids(family.end_of_turn),
        unsaid=frozenset(tokenizer.convert_tokens_to_ids(list(family.control_tokens))),
    )
