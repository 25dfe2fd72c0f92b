"""The objective of a run: the table of all objectives, and the only place where one is chosen."""

from __future__ import annotations

from collections.abc import Callable

from vlft.config.preference import PreferenceFlags
from vlft.objectives import Objective
from vlft.objectives.preference import Preference
from vlft.objectives.sft import Sft
from vlft.setup.base import Base

#: Method -> its objective on a base. A new objective is its own module and one line here.
OBJECTIVES: dict[str, Callable[[Base, str, PreferenceFlags], Objective]] = {
    # With grpo the loss is TRL's (`vlft.train.grpo`); the objective only encodes rows.
    **dict.fromkeys(("sft", "grpo"), lambda base, method, flags: Sft(encoder=base.encoder, collator=base.collator())),
    **dict.fromkeys(
        ("dpo", "orpo", "simpo"),
        lambda base, method, flags: Preference(
            encoder=base.encoder, collator=base.collator(), method=method, flags=flags
        ),
    ),
}


def objective_of(base: Base, method: str = "sft", flags: PreferenceFlags | None = None) -> Objective:
    """Return the objective of a run on this base.

    Args:
        base: encodes the rows and collates them.
        method: a key of `OBJECTIVES`.
        flags: the settings of preference tuning; None: the defaults.
    """
    return OBJECTIVES[method](base, method, flags or PreferenceFlags())
