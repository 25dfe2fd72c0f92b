"""The objective of a run: the only place where one is chosen."""

from __future__ import annotations

from vlft.data.collate import Collator
from vlft.objectives import Objective, Sft
from vlft.setup.base import Base


def objective_of(base: Base) -> Objective:
    """The objective of a run on this base."""
    return Sft(encoder=base.encoder, collator=collator_of(base))


def collator_of(base: Base) -> Collator:
    """The collator for encoded rows of this base."""
    vision, tokenizer = base.config.vision_config, base.processor.tokenizer
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return Collator(patch_size=vision.patch_size, merge_size=vision.spatial_merge_size, filler_token=filler)
