"""Answers of a model: transformers' own `generate` on prompts that are tensors already. Knows no conversation, no file.

The model goes its stock way here (no flat rows), so an answer is what any server of the same weights gives.

Letters in shapes: T tokens of a prompt, P patches, M pictures or videos; B prompts of a batch, L the longest of them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from vlft.model.forward import PixelScale


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What the model is asked, on the CPU.

    Attributes:
        ids_T: int64, ending in the generation prompt.
        kinds_T: uint8, 0 text, 1 picture, 2 video.
        still_patches: uint8 [P, 3, 14, 14] of all pictures, in order; [0, ...] where there are none.
        video_patches: uint8 [P, 3, 2, 14, 14] of all videos.
        still_grids_M3, video_grids_M3: int64, patches of each in time, height and width.
    """

    ids_T: torch.Tensor
    kinds_T: torch.Tensor
    still_patches: torch.Tensor
    video_patches: torch.Tensor
    still_grids_M3: torch.Tensor
    video_grids_M3: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: of an answer, its end included.
        temperature: 0 takes the likeliest token; else logits are divided by it and one is drawn.
        top_p: draw among the likeliest tokens that together have this probability.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A loaded model that answers.

    Attributes:
        model: top class of the family, in evaluation mode; may have LoRA layers in it.
        tokenizer: of its processor.
        scale: of its processor.
        end: token that ends a turn, beside those of the model's generation_config (a base that was never an assistant
            does not list it there, and would run on).
        unsaid: ids that are no part of an answer's text: turn control. Others, such as the boxes of grounding answers,
            stay, though the tokenizer calls them special too.
    """

    model: Any
    tokenizer: Any
    scale: PixelScale
    end: int
    unsaid: frozenset[int]

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, stream: Callable[[str], None] | None = None
    ) -> list[list[int]]:
        """The ids each prompt is answered with, up to and with the token that ends the answer.

        Several prompts are padded on the left, where attention and M-RoPE positions leave the pads out.

        Args:
            prompts: one, or a batch.
            sampling: how to choose; draws come from torch's global generator.
            stream: called with pieces of the answer's text as they come; one prompt only.
        """
        ends = self.ends
        inputs = self._inputs(prompts)
        if stream is not None:
            inputs["streamer"] = _Stream(self.tokenizer, stream, unsaid=self.unsaid)
        draw = sampling.temperature > 0
        with torch.inference_mode():
            out_BX = self.model.generate(
                **inputs,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=ends,
                pad_token_id=self._pad(),
                do_sample=draw,
                # Qwen's generation_config says temperature 0.01 and top_k 1, which would make any other inert; greedy
                # takes transformers' neutral values, at which it does not warn (5.17 to 5.23).
                temperature=sampling.temperature if draw else 1.0,
                top_p=sampling.top_p if draw else 1.0,
                top_k=0 if draw else 50,
            )
        longest = inputs["input_ids"].shape[1]
        return [_upto_end(row, ends) for row in out_BX[:, longest:].tolist()]

    def text(self, ids: Iterable[int]) -> str:
        """The text of an answer."""
        return self.tokenizer.decode([token for token in ids if token not in self.unsaid], **_AS_IT_STANDS)

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer."""
        own = self.model.generation_config.eos_token_id
        return sorted({self.end, *(own if isinstance(own, list) else [] if own is None else [own])})

    def _pad(self) -> int:
        own = self.tokenizer.pad_token_id
        return self.end if own is None else own

    def _inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Keyword arguments of the stock forward: ids and kinds padded on the left, pictures and videos of all rows."""
        device = self.model.device
        longest = max(len(prompt.ids_T) for prompt in prompts)
        ids_BL = torch.full((len(prompts), longest), self._pad())
        kinds_BL, mask_BL = torch.zeros_like(ids_BL, dtype=torch.int32), torch.zeros_like(ids_BL)
        for row, prompt in enumerate(prompts):
            start = longest - len(prompt.ids_T)
            ids_BL[row, start:], kinds_BL[row, start:], mask_BL[row, start:] = prompt.ids_T, prompt.kinds_T, 1
        inputs = {"input_ids": ids_BL, "attention_mask": mask_BL, "mm_token_type_ids": kinds_BL}
        stills = torch.cat([prompt.still_patches for prompt in prompts]).to(device)
        videos = torch.cat([prompt.video_patches for prompt in prompts]).to(device)
        pixels_PX = self.scale.patches(stills, videos)
        if len(stills):
            inputs["pixel_values"] = pixels_PX[: len(stills)]
            inputs["image_grid_thw"] = torch.cat([prompt.still_grids_M3 for prompt in prompts])
        if len(videos):
            inputs["pixel_values_videos"] = pixels_PX[len(stills) :]
            inputs["video_grid_thw"] = torch.cat([prompt.video_grids_M3 for prompt in prompts])
        return {name: tensor.to(device) for name, tensor in inputs.items()}


_AS_IT_STANDS = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def _upto_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """Without what pads an answer that ended before the longest of its batch."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


class _Stream(TextStreamer):
    """transformers' streamer, handing text to a function instead of printing it, without turn control tokens."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], *, unsaid: Collection[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, **_AS_IT_STANDS)
        self._write, self._unsaid = write, unsaid

    def put(self, value: torch.Tensor) -> None:
        """New ids (first of all the prompt's, which the base class skips)."""
        if not self.next_tokens_are_prompt:
            value = value[[token not in self._unsaid for token in value.tolist()]]
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Text that later tokens cannot change."""
        if text:
            self._write(text)
