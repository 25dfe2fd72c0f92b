"""Choose the objective of a run. No other module chooses one."""

from __future__ import annotations

from vlft.objectives import Objective, Sft
from vlft.setup.base import Base


def objective_of(base: Base) -> Objective:
    """The objective of a run that trains this base."""
    return Sft(encoder=base.encoder, collator=base.collator())
