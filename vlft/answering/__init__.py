"""Answer rows with a model, for the trainer, chat and the demo. Uses data and model, which do not import each other.

row  --question_of-->  conversation that ends in a user turn  --answers-->  Answer
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlft.answering.batches import in_batches
from vlft.config.recipe import Recipe
from vlft.config.thinking import OPEN
from vlft.data.encode import Encoder
from vlft.data.pixel_memory import joined
from vlft.data.positions import patch_positions, time_positions
from vlft.data.rows.parts import question_of as question_of  # for those who answer rows
from vlft.data.sample import EncodedMedia, EncodedPrompt, Sample
from vlft.errors import ConfigError, DataError
from vlft.families import Family
from vlft.model.generate import Prompt, Sampling, Speaker
from vlft.model.patches import split
from vlft.model.scale import PixelScale


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer to one question.

    Attributes:
        text: without the token that ends it.
        tokens: number of generated tokens, including the one that ends it.
        prompt_tokens: number of tokens in the conversation before it.
        cut: whether it reached the limit of tokens before it ended.
        thinking: whether the prompt ends inside a thought, so that the answer begins there.
    """

    text: str
    tokens: int
    prompt_tokens: int
    cut: bool
    thinking: bool = False


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
    """Answer conversations in order, `batch` at a time. A greedy answer does not depend on the rest of its batch.

    Args:
        questions: conversations that end in a user turn, for example from `question_of`, with any media.
        encoder: conversations -> tokens and pixels.
        speaker: the model.
        sampling: for all answers, or one for each. Within a batch only `max_new_tokens` may differ.
        batch: number of questions answered together, padded to the longest. 1: no padding, and the least memory.
        limit: most tokens of prompt and answer together that the model supports; None: no limit.
        stream: called with each new piece of the text; only with one question at a time.

    Yields:
        an answer for each question.

    Raises:
        ConfigError: a conversation does not end in a user turn, or is too long.
        DataError: a picture or video of a row cannot be read.
    """
    groups = (range(start, min(start + batch, len(questions))) for start in range(0, len(questions), batch))
    for places in groups:
        for _, answer in _answer(questions, places, encoder, speaker, sampling, limit=limit, stream=stream):
            yield answer


def answers_by_place(
    questions: Sequence[Sample],
    encoder: Encoder,
    speaker: Speaker,
    sampling: Sampling,
    *,
    order: Sequence[int],
    batch: int,
    limit: int | None = None,
    smaller: Callable[[int], None] = lambda batch: None,
    refuse: Callable[[int, DataError], None] | None = None,
) -> Generator[tuple[int, Answer], None, None]:
    """Answer conversations in any order, with smaller batches where the memory of a GPU does not suffice.

    Args:
        questions: as for `answers`.
        encoder: as for `answers`.
        speaker: as for `answers`.
        sampling: for all answers.
        order: places in `questions`, each once. With the longest first, too large a batch fails at the start.
        batch: most questions that are answered together.
        limit: as for `answers`.
        smaller: as for `in_batches`.
        refuse: as for `in_batches`.

    Returns:
        an iterator over the places of questions, and their answers.

    Raises:
        ConfigError, DataError: the errors of `answers`, from the iterator.
        torch.OutOfMemoryError: the memory does not suffice for one question; from the iterator.
    """
    return in_batches(
        lambda places: list(_answer(questions, places, encoder, speaker, sampling, limit=limit)),
        questions,
        order=order,
        batch=batch,
        smaller=smaller,
        refuse=refuse,
    )


def _answer(
    questions: Sequence[Sample],
    places: Sequence[int],
    encoder: Encoder,
    speaker: Speaker,
    sampling: Sampling | Sequence[Sampling],
    *,
    limit: int | None,
    stream: Callable[[str], None] | None = None,
) -> Generator[tuple[int, Answer], None, None]:
    """Answer the questions at some places together."""
    some = [sampling if isinstance(sampling, Sampling) else sampling[place] for place in places]
    prompts, thinking = [], []
    for place, own in zip(places, some, strict=True):
        encoded = encoder.prompt(questions[place])
        prompts.append(as_tensors(encoded, encoder.recipe))
        thinking.append(encoded.text.rstrip().endswith(OPEN))
        _check_length(len(prompts[-1].ids_T), own, limit)
    longest = replace(some[0], max_new_tokens=max(own.max_new_tokens for own in some))
    generated = speaker.generate(prompts, longest, stream=stream)
    for place, prompt, own, ids, inside in zip(places, prompts, some, generated, thinking, strict=True):
        ids = ids[: own.max_new_tokens]
        yield (
            place,
            Answer(
                text=speaker.text(ids),
                tokens=len(ids),
                prompt_tokens=len(prompt.ids_T),
                cut=ids[-1] not in speaker.ends,
                thinking=inside,
            ),
        )


def _check_length(tokens: int, sampling: Sampling, limit: int | None) -> None:
    if limit is not None and tokens + sampling.max_new_tokens > limit:
        raise ConfigError(
            f"the conversation is {tokens:,} tokens long and --max_new_tokens is {sampling.max_new_tokens:,}; "
            f"the model supports {limit:,} together. Start a new conversation, use fewer media, or lower "
            "--max_new_tokens."
        )


def as_tensors(prompt: EncodedPrompt, recipe: Recipe) -> Prompt:
    """Convert an encoded prompt for `vlft.model.generate`.

    Args:
        prompt: from an `Encoder`.
        recipe: that of the encoder.
    """
    stills = [medium for medium in prompt.media if not medium.is_video]
    videos = [medium for medium in prompt.media if medium.is_video]
    grids = [medium.grid for medium in (*stills, *videos)]
    still_patches, video_patches = split(
        joined([medium.pixels for medium in stills]),
        joined([medium.pixels for medium in videos]),
        grid=_grids([*stills, *videos]),
        positions=torch.from_numpy(patch_positions(*grids, merge=recipe.merge_size)),
        patch=recipe.patch_size,
        temporal=recipe.temporal_patch_size,
    )
    return Prompt(
        ids_T=prompt.input_ids_T,
        kinds_T=prompt.kinds_T,
        still_patches=still_patches,
        video_patches=video_patches,
        still_grids_M3=_grids(stills),
        video_grids_M3=_grids(videos),
        video_paces_M=torch.tensor([medium.grid.pace for medium in videos], dtype=torch.float32)
        if recipe.video_time == "seconds"
        else None,
    )


def _grids(media: Sequence[EncodedMedia]) -> torch.Tensor:
    """int64 [M, 3], also without media."""
    return torch.tensor([[m.grid.t, m.grid.h, m.grid.w] for m in media], dtype=torch.int64).view(-1, 3)


def seconds_remark(model: Any, recipe: Recipe) -> str | None:
    """Warn if the model's stock forward does not place videos at the seconds that rows are trained with.

    transformers 5.17 truncates the seconds between two time steps to a whole number; 5.23 does not.
    """
    rate = recipe.tokens_per_second
    if recipe.video_time != "seconds" or rate is None:
        return None
    pace, steps = 1.9 / rate, 3
    side = recipe.merge_size
    kinds_1T = torch.full((1, steps), 2, device=model.device)
    positions_31T, _ = model.model.get_rope_index(
        input_ids=torch.zeros_like(kinds_1T),
        mm_token_type_ids=kinds_1T,
        video_grid_thw=torch.tensor([[steps, side, side]], device=model.device),
        second_per_grid_ts=torch.tensor([pace], device=model.device),
    )
    if positions_31T[0, 0].tolist() == time_positions(steps, pace, rate).tolist():
        return None
    return (
        "this version of transformers truncates the seconds between frames, so answers about videos differ from those "
        "of later versions, which count them as in training. Update transformers to 5.23"
    )


def speaker(model: Any, processor: Any, family: Family) -> Speaker:
    """Wrap a model (top class, possibly with LoRA layers) and its processor, to generate answers."""
    tokenizer = processor.tokenizer
    return Speaker(
        model=model,
        tokenizer=tokenizer,
        scale=PixelScale.of(processor),
        end=tokenizer.convert_tokens_to_ids(family.end_of_turn),
        unsaid=frozenset(tokenizer.convert_tokens_to_ids(list(family.control_tokens))),
    )
