"""Generate answers with transformers' own `generate`, from prompts that are already tensors. Opens no file.

The model runs its stock forward here (no flat rows), so an answer equals that of any server of the same weights.
`vlft.answering` turns conversations into prompts.

Letters in shapes: T tokens of a prompt, P patches, p pixels of a side of a patch, M pictures or videos; B prompts of a
batch, L tokens of the longest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TextStreamer

from vlft.model.scale import PixelScale


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, on the CPU.

    Attributes:
        ids_T: int64, ending in the generation prompt.
        kinds_T: uint8, 0 text, 1 picture, 2 video.
        still_patches: uint8 [P, 3, p, p] of all pictures, in order; [0, ...] without pictures.
        video_patches: uint8 [P, 3, 2, p, p] of all videos, in order; [0, ...] without videos.
        still_grids_M3: int64, patches of each picture in time, height and width.
        video_grids_M3: int64, patches of each video in time, height and width.
        video_paces_M: float32, seconds between time steps of each video, for a model whose positions count them; else
            None.
    """

    ids_T: torch.Tensor
    kinds_T: torch.Tensor
    still_patches: torch.Tensor
    video_patches: torch.Tensor
    still_grids_M3: torch.Tensor
    video_grids_M3: torch.Tensor
    video_paces_M: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: most tokens of an answer, including the token that ends it.
        temperature: 0 picks the most likely token; otherwise logits are divided by it and a token is sampled.
        top_p: sample from the most likely tokens that together have this probability.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Speaker:
    """A loaded model that answers prompts.

    Attributes:
        model: top class of the family, in evaluation mode; may contain LoRA layers.
        tokenizer: of its processor.
        scale: of its processor.
        end: token that ends a turn, in addition to those of the model's generation_config. A base that was never an
            assistant does not list it there, so its answers would not end.
        unsaid: ids that are left out of an answer's text, such as turn control. Other special tokens, such as the boxes
            of grounding answers, stay in the text.
    """

    model: Any
    tokenizer: Any
    scale: PixelScale
    end: int
    unsaid: frozenset[int]

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, *, stream: Callable[[str], None] | None = None
    ) -> list[list[int]]:
        """The ids of each answer, including the token that ends it.

        Several prompts are padded on the left, where attention and M-RoPE positions ignore the padding.

        Args:
            prompts: one, or a batch.
            sampling: how to choose tokens; random numbers come from torch's global generator.
            stream: called with each new piece of the answer's text; one prompt only.

        Returns:
            a list of ids for each prompt.
        """
        ends = self.ends
        inputs = self.inputs(prompts)
        if stream is not None:
            inputs["streamer"] = _Stream(self.tokenizer, stream, unsaid=self.unsaid)
        draw = sampling.temperature > 0
        with torch.inference_mode():
            out_BX = self.model.generate(
                **inputs,
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=ends,
                pad_token_id=self.pad,
                do_sample=draw,
                # Qwen's generation_config has temperature 0.01 and top_k 1, so other values would have no effect.
                # Greedy decoding uses transformers' defaults, for which it does not warn (5.17 to 5.23).
                temperature=sampling.temperature if draw else 1.0,
                top_p=sampling.top_p if draw else 1.0,
                top_k=0 if draw else 50,
            )
        longest = inputs["input_ids"].shape[1]
        return [_upto_end(row, ends) for row in out_BX[:, longest:].tolist()]

    def text(self, ids: Iterable[int]) -> str:
        """The text of an answer."""
        return self.tokenizer.decode([token for token in ids if token not in self.unsaid], **_VERBATIM)

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens that end an answer."""
        own = self.model.generation_config.eos_token_id
        return sorted({self.end, *(own if isinstance(own, list) else [] if own is None else [own])})

    @property
    def pad(self) -> int:
        """Id that fills a batch up to its longest row, where nothing reads it."""
        own = self.tokenizer.pad_token_id
        return self.end if own is None else own

    def inputs(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """Keyword arguments of the stock forward: ids and kinds padded on the left, pictures and videos of all rows."""
        device = self.model.device
        longest = max(len(prompt.ids_T) for prompt in prompts)
        ids_BL = torch.full((len(prompts), longest), self.pad)
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
            paces = [prompt.video_paces_M for prompt in prompts if prompt.video_paces_M is not None]
            if paces:  # without them the stock model takes one second for each
                inputs["second_per_grid_ts"] = torch.cat(paces)
        return {name: tensor.to(device) for name, tensor in inputs.items()}


_VERBATIM = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}


def _upto_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """An answer without the padding that follows its end in a batch."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1]
    return ids


class _Stream(TextStreamer):
    """transformers' streamer, which passes text to a function instead of printing it, without turn control tokens."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None], *, unsaid: Collection[int]) -> None:
        super().__init__(tokenizer, skip_prompt=True, **_VERBATIM)
        self._write, self._unsaid = write, unsaid

    def put(self, value: torch.Tensor) -> None:
        """Receive new ids. The first call has those of the prompt, which the base class skips."""
        if not self.next_tokens_are_prompt:
            value = value[[token not in self._unsaid for token in value.tolist()]]
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Pass on text that later tokens cannot change."""
        if text:
            self._write(text)
