"""Open the result of a run, or any Qwen-VL, and answer conversations with it. Prints nothing."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vlft.answering import answers, seconds_remark, speaker
from vlft.chat.turns import conversation
from vlft.checkpoint import (
    RunRecord,
    attach_adapter,
    check_lineage,
    computing_dtype_of,
    find_adapter_or_model,
    find_base,
    open_processor,
    quantisation_to_answer,
    read_adapter,
    resolve_complete,
)
from vlft.config.device import has_bf16
from vlft.config.recipe import Recipe
from vlft.config.thinking import ENABLE, Thinking, thinking_of_run
from vlft.data.boxes import AnswerBox, boxes_in_answer
from vlft.data.encode import Encoder
from vlft.data.media.read import MediaError, measure
from vlft.data.sample import Sample, Turn
from vlft.errors import ConfigError, DataError
from vlft.families import Family, Sizes
from vlft.model import lora
from vlft.model.generate import Sampling, Speaker
from vlft.model.load import load_base, load_config
from vlft.model.packed import computing_in, load_quantised
from vlft.model.quantise import Quantisation

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
            with _enough_memory(self.speaker.model.device):
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
        with _enough_memory(self.speaker.model.device):
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
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    half = device.type == "cuda" and has_bf16()
    dtype = torch.bfloat16 if half else torch.float32
    found = find_adapter_or_model(path) if Path(path).expanduser().is_dir() else None
    if found is not None and found.kind == "adapter":
        base_id, folder = find_base(path, found, base_model)
        check_lineage(path, found, base_id, folder)
        name = f"{path} (adapter on {base_id})"
    else:
        name, folder = str(path), resolve_complete(path, base_model)
    record = found.record if found else None
    quantisation = quantisation_to_answer(path, record, folder)
    if quantisation is not None:
        name += f", quantised to {quantisation.kind} as in training"
    config, family = load_config(folder)
    adapter = read_adapter(found.folder, folder, family) if found is not None and found.kind == "adapter" else None
    processor = open_processor(folder, adapter.folder if adapter else None)
    sizes = family.sizes(config)
    recipe = _recipe(record, processor, family, sizes, thinking=thinking)
    notes = adapter.notes if adapter is not None else ()
    if record is not None and thinking == "auto" and ENABLE in recipe.switches and recipe.thinking == "auto":
        notes = (*notes, "it was trained with and without thoughts, and its chat template decides; --thinking chooses")
    with _enough_memory(device):
        model: Any = _load(folder, family, quantisation, dtype)
        if adapter is not None:
            model = attach_adapter(model, adapter, family).get_base_model()
            if adapter.magnitudes():
                lora.bind(model)  # DoRA as in training, not as PEFT computes it
        for parameter in model.parameters():  # not model.to(dtype), which would round M-RoPE's frequencies too
            if parameter.is_floating_point():  # bitsandbytes moves its own with the model
                parameter.data = parameter.data.to(device, dtype)
        model.to(device).eval()
        if (rounded_to := getattr(torch, computing_dtype_of(path, record))) is not torch.float32:
            computing_in(model, rounded_to)  # after the move, which makes new weights
    remark = seconds_remark(model, recipe)
    return Chat(
        name=f"{name}, {str(dtype).removeprefix('torch.')} on {device}",
        encoder=Encoder(family=family, processor=processor, recipe=recipe),
        speaker=speaker(model, processor, family),
        limit=sizes.text.max_positions,
        notes=(*notes, *([remark] if remark else [])),
    )


def _load(folder: Path, family: Family, quantisation: Quantisation | None, dtype: torch.dtype) -> Any:
    """The base on the CPU, quantised as in training."""
    if quantisation is None:
        return load_base(folder, family, dtype=dtype)
    return load_quantised(folder, family, quantisation, dtype)


def _recipe(record: RunRecord | None, processor: Any, family: Family, sizes: Sizes, *, thinking: Thinking) -> Recipe:
    """The run's recipe without the settings that apply only to rows; without a run, that of the processor.

    Raises:
        ConfigError: the chat template takes no `thinking`.
    """
    model: dict[str, Any] = {"family": family, "tokens_per_second": sizes.vision.tokens_per_second}
    if record is None:
        recipe = Recipe.of_model(processor, **model)
    else:
        recipe = Recipe.of_run(processor, record.settings, **model)
    if thinking != "auto" and ENABLE not in recipe.switches:
        raise ConfigError(
            f"--thinking {thinking}: the chat template of this model does not take {ENABLE}, so the flag has no "
            "effect. Drop it."
        )
    if thinking == "auto" and record is not None:
        trained = thinking_of_run(record.settings)
        thinking = "auto" if trained is None else "on" if trained else "off"
    recipe = replace(recipe, thinking=thinking)
    # `Chat` checks lengths, which include the answer; and users type boxes in the model's own unit.
    return replace(recipe, max_length=sys.maxsize, fit=None, box_format="as_is")


@contextlib.contextmanager
def _enough_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        raise ConfigError(
            f"not enough memory on {device} ({free:.1f} GiB free). Use fewer media, free the GPU, or hide it: "
            "CUDA_VISIBLE_DEVICES= vlft chat ..."
        ) from error
