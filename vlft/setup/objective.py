"""The objective of a run: the table of all objectives, and the only place where one is chosen."""

from __future__ import annotations

from vlft.objectives import Objective
from vlft.objectives.sft import Sft
from vlft.setup.base import Base

#: Method -> its objective. A new objective is its own module and one line here.
OBJECTIVES: dict[str, type[Objective]] = {"sft": Sft}


def objective_of(base: Base, method: str = "sft") -> Objective:
    """Return the objective of a run on this base.

    Args:
        base: encodes the rows and collates them.
        method: a key of `OBJECTIVES`.
    """
    return OBJECTIVES[method](encoder=base.encoder, collator=base.collator())
