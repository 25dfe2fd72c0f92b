"""The objective of a run: the only place where one is chosen."""

from __future__ import annotations

from vlft.objectives import Objective, Sft
from vlft.setup.base import Base


def objective_of(base: Base) -> Objective:
    """The objective of a run on this base."""
    return Sft(encoder=base.encoder, collator=base.collator())
