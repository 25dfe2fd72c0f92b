"""Which rows of which data set an epoch holds, and how often. Numbers in, places out; knows neither files nor rows.

The same sets give the same places, whatever else a run is asked to do. They stay over the epochs: only their order
changes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much of a data set is wanted; see `vlft.config.mix.MixedSet`.

    Attributes:
        rows: it has.
        weight, repeat, cap: as there; either all sets have a weight, or none has.
    """

    rows: int
    weight: float | None = None
    repeat: float | None = None
    cap: int | None = None

    @property
    def taken(self) -> int:
        """Rows that are trained at all, unless even fewer are drawn."""
        return self.rows if self.cap is None else min(self.rows, self.cap)


def draws(shares: Sequence[Share]) -> list[int]:
    """How many rows of each set an epoch holds; at least one.

    With weights, an epoch has as many rows as are taken of all sets together, each set its share of them.
    """
    if shares[0].weight is None:
        return [max(1, round(one.taken * (one.repeat or 1))) for one in shares]
    whole, weights = sum(one.taken for one in shares), sum(one.weight or 0 for one in shares)
    return [max(1, round(whole * (one.weight or 0) / weights)) for one in shares]


def places(share: Share, count: int, *, seed: str) -> np.ndarray:
    """The rows of a set that an epoch holds: each taken one equally often, and the rest drawn.

    Args:
        count: as `draws` gives it.
        seed: decides which rows are taken under a cap, and which are drawn once more than others.

    Returns:
        int64 [count], ascending.
    """
    draw = random.Random(seed)
    taken = list(range(share.rows)) if share.taken == share.rows else draw.sample(range(share.rows), share.taken)
    often, rest = divmod(count, share.taken)
    return np.sort(np.array(taken * often + draw.sample(taken, rest), dtype=np.int64))
