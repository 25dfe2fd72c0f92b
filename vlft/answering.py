"""Rows -> answers, for the trainer, chat and the demo. Between data and model, which do not know each other.

row  --question_of-->  conversation that ends in a user turn  --answers-->  Answer
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlft.config.recipe import Recipe
from vlft.data.encode import Encoder
from vlft.data.sample import EncodedMedia, EncodedPrompt, Sample
from vlft.errors import ConfigError
from vlft.families import Family
from vlft.model.forward import PixelScale
from vlft.model.generate import Prompt, Sampling, Speaker


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said to one question.

    Attributes:
        text: without the token that ends it.
        tokens: generated, the ending one included.
        prompt_tokens: of the conversation before it.
        cut: it has as many tokens as it may have, and has not ended.
    """

    text: str
    tokens: int
    prompt_tokens: int
    cut: bool


def answers(
    questions: Sequence[Sample],
    encoder: Encoder,
    speaker: Speaker,
    sampling: Sampling | Sequence[Sampling],
    *,
    batch: int = 1,
    limit: int | None = None,
    stream: Callable[[str], None] | None = None,
) -> Iterator[Answer]:
    """Answer conversations in order, `batch` at a time; a greedy answer is the one it would be alone.

    Args:
        questions: conversations that end in a user turn, e.g. of `question_of`; of any mixture of media.
        encoder: turns them into tokens and pixels. speaker: the model.
        sampling: of every answer, or one for each. Those of a batch may differ in `max_new_tokens` only.
        batch: questions answered together, padded to the longest of them. 1: no padding, and the least memory.
        limit: tokens of prompt and answer together that the model was made for.
        stream: called with pieces of the text as they come; one question at a time only.

    Raises:
        ConfigError: a conversation does not end in a user turn, or is too long.
        DataError: a picture or video of a row cannot be read.
    """
    each = [sampling] * len(questions) if isinstance(sampling, Sampling) else sampling
    for start in range(0, len(questions), batch):
        some = each[start : start + batch]
        prompts = []
        for question, own in zip(questions[start : start + batch], some, strict=True):
            prompt = as_tensors(encoder.prompt(question), encoder.recipe)
            _check_length(len(prompt.ids_T), own, limit)
            prompts.append(prompt)
        longest = replace(some[0], max_new_tokens=max(own.max_new_tokens for own in some))
        generated = speaker.generate(prompts, longest, stream=stream)
        for prompt, own, ids in zip(prompts, some, generated, strict=True):
            ids = ids[: own.max_new_tokens]
            yield Answer(
                text=speaker.text(ids),
                tokens=len(ids),
                prompt_tokens=len(prompt.ids_T),
                cut=ids[-1] not in speaker.ends,
            )


def _check_length(tokens: int, sampling: Sampling, limit: int | None) -> None:
    if limit is not None and tokens + sampling.max_new_tokens > limit:
        raise ConfigError(
            f"the conversation is {tokens:,} tokens long and --max_new_tokens is {sampling.max_new_tokens:,}; "
            f"together the model takes {limit:,}. Begin a new conversation, show less, or lower --max_new_tokens."
        )


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
