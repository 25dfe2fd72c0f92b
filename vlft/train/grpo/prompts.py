"""Rows as TRL's trainer takes them: messages and columns for rewards, and the tokens and pixels of their prompts.

TRL would tokenise messages and resize pictures itself. Here `vlft.data.encode` does both, as for chat, evaluation and
preview, so a model is rewarded for what it says about the pictures that it will see when it is served.

Letters in shapes: B prompts of a batch, L tokens of the longest, M pictures, P patches, X numbers of a patch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlft.answering import as_tensors, question_of
from vlft.config.thinking import OPEN, opening_of, spoken, written_after
from vlft.data.boxes import has_boxes
from vlft.data.render import render
from vlft.data.rows.parts import text_of, trained_answers
from vlft.data.sample import Text, Turn
from vlft.model.generate import Prompt
from vlft.model.scale import PixelScale
from vlft.setup import Base, MeasuredRows

KEPT = 256  # rows that are kept parsed: those of a step are asked for once per completion


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """The prompts of a batch.

    Attributes:
        ids: the tokens of each prompt, B lists.
        kinds: 0 text, 1 picture, for each token.
        pictures: number of pictures of each prompt.
        pixels_PX: float, the normalised patches of all pictures; None without pictures.
        grids_M3: int64, patches of each picture in time, height and width; None without pictures.
    """

    ids: list[list[int]]
    kinds: list[list[int]]
    pictures: list[int]
    pixels_PX: torch.Tensor | None
    grids_M3: torch.Tensor | None

    @property
    def fields(self) -> dict[str, Any]:
        """What `generate` takes besides the tokens."""
        if self.pixels_PX is None:
            return {}
        return {"pixel_values": self.pixels_PX, "image_grid_thw": self.grids_M3, "mm_token_type_ids": self.kinds}

    @property
    def padded(self) -> dict[str, torch.Tensor]:
        """The same for the forward: tokens are padded on the left."""
        longest = max(map(len, self.kinds))
        kinds_BL = torch.tensor([[0] * (longest - len(one)) + one for one in self.kinds])
        return {**self.fields, "mm_token_type_ids": kinds_BL}


class Prompts:
    """The prompts of a run.

    Args:
        rows: the rows to train on.
        base: encodes them.
    """

    def __init__(self, rows: MeasuredRows, base: Base) -> None:
        self.rows = rows
        self.base = base
        self.scale = PixelScale.of(base.processor)
        self.columns = functools.lru_cache(maxsize=KEPT)(self._columns)

    def __len__(self) -> int:
        return len(self.rows.costs)

    def dataset(self) -> Any:
        """A `datasets.Dataset` of the places of the rows, which TRL's loader reads. `columns` has the rows."""
        from datasets import Dataset

        return Dataset.from_dict({"row": list(range(len(self)))})

    def _columns(self, place: int) -> dict[str, Any]:
        """A row as TRL's trainer takes it: its prompt, `COLUMNS`, and how completions begin and the row's would be.

        `opening` is the `<think>` that the prompt ends with, or "". `written` is the row's own answer as the model
        would write it, with the opening.
        """
        encoder, base = self.base.encoder, self.base
        sample = self.rows.rows.samples[place]
        if has_boxes(sample, encoder.recipe.box_format):
            sample = encoder.as_written(sample)
        question = question_of(sample)
        answer = text_of(sample.turns[trained_answers(sample)[-1]])
        shown = render(question, base.processor, base.family, encoder.recipe, unanswered=True)[-1].text
        return {
            "prompt": [_message(turn) for turn in question.turns],
            "opening": opening_of(shown),
            "written": written_after(shown, answer),
            "answer": spoken(answer),
            "full_answer": answer,
            "id": sample.id,
            "file": sample.file,
            "index": sample.index,
            "image_paths": [path for part in question.media for _, path in part.files],
        }

    def name_of(self, place: int) -> str:
        """file[index] of a row."""
        found = self.columns(place)
        return f"{found['file']}[{found['index']}]"

    def encode(self, places: Sequence[int]) -> Encoded:
        """Encode the prompts of some rows. A row that occurs several times is decoded once.

        Raises:
            DataError: a picture cannot be decoded.
        """
        found = {place: self._prompt(place) for place in dict.fromkeys(places)}
        each = [found[place] for place in places]
        made = {
            place: self.scale.patches(prompt.still_patches, prompt.video_patches) for place, prompt in found.items()
        }
        any_picture = any(len(prompt.still_grids_M3) for prompt in each)
        return Encoded(
            ids=[prompt.ids_T.tolist() for prompt in each],
            kinds=[prompt.kinds_T.tolist() for prompt in each],
            pictures=[len(prompt.still_grids_M3) for prompt in each],
            pixels_PX=torch.cat([made[place] for place in places]) if any_picture else None,
            grids_M3=torch.cat([prompt.still_grids_M3 for prompt in each]) if any_picture else None,
        )

    def _prompt(self, place: int) -> Prompt:
        encoder = self.base.encoder
        return as_tensors(encoder.prompt(question_of(self.rows.rows.samples[place])), encoder.recipe)


def _message(turn: Turn) -> dict[str, Any]:
    content = [
        {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"} for part in turn.parts
    ]
    return {"role": turn.role, "content": content}


def part_of(fields: Mapping[str, Any], pictures: Sequence[int], start: int, end: int) -> dict[str, Any]:
    """The pixels of some completions of a batch, as TRL's forward takes them.

    Args:
        fields: those of the batch, by TRL's names; tensors or None.
        pictures: number of pictures of each completion.
        start: the first completion.
        end: the completion after the last.
    """
    some = list(pictures[start:end])
    if not sum(some):
        return dict.fromkeys(("pixel_values", "image_grid_thw", "mm_token_type_ids", "num_images"))
    before, upto = sum(pictures[:start]), sum(pictures[:end])
    grids_M3 = fields["image_grid_thw"]
    ends_M = [0, *grids_M3.prod(dim=-1).cumsum(0).tolist()]
    return {
        "pixel_values": fields["pixel_values"][ends_M[before] : ends_M[upto]],
        "image_grid_thw": grids_M3[before:upto],
        "mm_token_type_ids": fields["mm_token_type_ids"][start:end],
        "num_images": some,
    }


def begun(completion: list[dict[str, Any]], opening: str) -> list[dict[str, Any]]:
    """A completion with the `<think>` that its prompt ends with, unless the model wrote another one."""
    text = completion[0]["content"]
    if not opening or text.lstrip().startswith(OPEN):
        return completion
    return [{**completion[0], "content": opening + text}, *completion[1:]]
