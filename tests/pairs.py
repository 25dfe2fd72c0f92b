"""Preference rows for tests, made of plain rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from models import tiny_sizes

from vlft.config.recipe import Recipe
from vlft.config.row_flags import RowFlags
from vlft.data.collate import Collator
from vlft.data.encode import Encoder
from vlft.data.rows.records import parse_record
from vlft.data.sample import Part, Sample, Text, Turn
from vlft.families import Family
from vlft.model.load import load_config, load_processor


def encoder_of(base: Path, family: Family, flags: RowFlags | None = None) -> Encoder:
    """The encoder of a base."""
    sizes, processor = family.sizes(load_config(base)[0]), load_processor(base)
    per_second = sizes.vision.tokens_per_second
    recipe = Recipe.of(processor, flags or RowFlags(max_length=32768), family=family, tokens_per_second=per_second)
    recipe.serve(processor)
    return Encoder(family=family, processor=processor, recipe=recipe)


def collator_of(encoder: Encoder, *, shared: bool | None = None) -> Collator:
    """A collator for rows of an encoder; `shared`: other than the family's."""
    sizes = tiny_sizes(encoder.family.model_type).vision
    return Collator(vision=sizes, filler_token=0, shared=encoder.shared if shared is None else shared)


def parsed(raw: dict, folder: Path | None, family: Family) -> Sample:
    image_folder = None if folder is None else str(folder)
    return parse_record(raw, file="t.json", index=0, image_folder=image_folder, family=family)


def rejecting(sample: Sample, *answers: str) -> Sample:
    """The row as a preference row."""
    turns = [Turn(role="assistant", parts=(Text(text=one),), field=f"rejected[{i}]") for i, one in enumerate(answers)]
    return replace(sample, rejected=tuple(turns))


def plain_rows(sample: Sample) -> list[Sample]:
    """The whole conversation with each answer, the chosen one first."""
    plain = replace(sample, rejected=())
    return [plain, *(replace(plain, turns=(*plain.turns[:-1], turn)) for turn in sample.rejected)]


def earlier_untrained(sample: Sample) -> Sample:
    """The row with its last answer alone trained, as in a preference row."""
    *before, last = sample.turns
    masked = [replace(turn, parts=tuple(map(_untrained, turn.parts))) for turn in before]
    return replace(sample, turns=(*masked, last))


def _untrained(part: Part) -> Part:
    return replace(part, trained=False) if isinstance(part, Text) else part
