"""Open the result of a run, or any Qwen-VL, and answer conversations with it. Prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vlft.answering import answers
from vlft.answering.opened import enough_memory, open_settings
from vlft.chat.turns import conversation
from vlft.config.thinking import Thinking
from vlft.data.boxes import AnswerBox, boxes_in_answer
from vlft.data.encode import Encoder
from vlft.data.media.read import MediaError, measure
from vlft.data.sample import Sample, Turn
from vlft.errors import ConfigError, DataError
from vlft.families import Family
from vlft.model.generate import Sampling, Speaker

MAX_NEW_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer.

    Attributes:
        text: without the token that ends it.
        tokens: number of generated tokens, including the one that ends it.
        prompt_tokens: number of tokens in the conversation before it.
        boxes: boxes in the text, in pixels of the pictures in the conversation's last turn with pictures.
    """

    text: str
    tokens: int
    prompt_tokens: int
    boxes: tuple[AnswerBox, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Chat:
    """A loaded model that answers with the pixel settings of its training.

    Attributes:
        name: a description of what was opened.
        encoder: conversations -> tokens and pixels, with the run's settings.
        speaker: the model.
        limit: most tokens of prompt and answer together that the model supports.
        notes: for the user, about how an adapter was read.
    """

    name: str
    encoder: Encoder
    speaker: Speaker
    limit: int
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> Family:
        """The family of the model."""
        return self.encoder.family

    def reply(
        self,
        asked: Sample | Sequence[Turn],
        sampling: Sampling | None = None,
        *,
        stream: Callable[[str], None] | None = None,
    ) -> Reply:
        """Answer a conversation that ends in a user turn.

        Args:
            asked: a row without its last answer (`question_of`), or turns (`question`).
            sampling: how to choose tokens; None: greedy, up to 512 tokens.
            stream: called with each new piece of the text.

        Raises:
            ConfigError: the conversation cannot be answered: a picture is unreadable, or it is too long.
            DataError: a row cannot be answered, for the same reasons.
        """
        sampling = sampling or Sampling(max_new_tokens=MAX_NEW_TOKENS)
        sample = asked if isinstance(asked, Sample) else conversation(asked)
        try:
            with enough_memory(self.speaker.model.device):
                (said,) = answers([sample], self.encoder, self.speaker, sampling, limit=self.limit, stream=stream)
        except DataError as error:
            if sample is asked:
                raise
            raise ConfigError(error.row.reason) from error  # its advice is for rows of a file
        boxes = self.boxes(said.text, sample)
        return Reply(text=said.text, tokens=said.tokens, prompt_tokens=said.prompt_tokens, boxes=boxes)

    def boxes(self, answer: str, asked: Sample | Sequence[Turn]) -> tuple[AnswerBox, ...]:
        """The boxes in an answer, if the model writes them in the unit of its family, `Family.box_unit`.

        Args:
            answer: the text of the answer.
            asked: the conversation before it.

        Raises:
            ConfigError: a picture of the conversation can no longer be opened.
        """
        sample = asked if isinstance(asked, Sample) else conversation(asked)
        recipe = self.encoder.recipe
        try:
            return boxes_in_answer(
                answer, sample, lambda part: measure(part, recipe), family=self.family, patch_size=recipe.patch_size
            )
        except MediaError as error:
            raise ConfigError(f"{error.field}: {error.reason}") from error

    def answer(
        self,
        asked: Sample | Sequence[Turn],
        *,
        max_new_tokens: int = MAX_NEW_TOKENS,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """The text of a greedy `reply`."""
        return self.reply(asked, Sampling(max_new_tokens=max_new_tokens), stream=stream).text

    def answers(self, samples: Sequence[Sample], *, max_new_tokens: int = MAX_NEW_TOKENS, batch: int = 8) -> list[str]:
        """Greedy answers to many prompts, `batch` at a time. An answer does not depend on the rest of its batch.

        Args:
            samples: rows without their last answers (`question_of`), with any media.
            max_new_tokens: most tokens of one answer.
            batch: number of prompts generated together, padded to the longest.

        Raises:
            ConfigError: the errors of `reply`.
            DataError: the errors of `reply`.
        """
        sampling = Sampling(max_new_tokens=max_new_tokens)
        with enough_memory(self.speaker.model.device):
            said = answers(samples, self.encoder, self.speaker, sampling, batch=batch, limit=self.limit)
            return [answer.text for answer in said]


def open_model(
    path: str | Path,
    *,
    base_model: str | None = None,
    device: torch.device | str | None = None,
    thinking: Thinking = "auto",
) -> Chat:
    """Load a model to chat with, in bf16 on a GPU that has it and in float32 elsewhere.

    Args:
        path: run folder, `checkpoint-N`, adapter, merged or base model, or the hub id of a complete model.
        base_model: folder or hub id of an adapter's base, if it is not the one that the run names.
        device: where to run the model; None: the GPU if there is one.
        thinking: whether the model thinks before its answers. auto: as it was trained, else as its chat template
            decides.

    Raises:
        CheckpointError: nothing is found, it is incomplete or not a Qwen-VL, the adapter belongs to another base, or
            its base was quantised and bitsandbytes is not installed.
        ConfigError: `base_model` is set for a model that needs none, its chat template takes no `thinking`, or there is
            not enough memory.
    """
    opened = open_settings(path, base_model=base_model, thinking=thinking)  # users type boxes in the model's own unit
    loaded = opened.load(device)
    return Chat(
        name=loaded.name,
        encoder=opened.encoder,
        speaker=loaded.speaker,
        limit=opened.limit,
        notes=(*opened.notes, *loaded.notes),
    )
