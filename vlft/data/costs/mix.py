"""Data mixes: which rows of each data set an epoch holds, and how often. Numbers in, row indices out.

The result depends only on the sets and the seed, not on other settings of the run. All epochs hold the same rows; only
their order changes. Independent of files and of the content of rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Share:
    """How much of a data set an epoch holds. Either all sets have a weight, or none has.

    Attributes:
        rows: rows of the set.
        weight: its share of an epoch, as in `vlft.config.mix.MixedSet`.
        repeat: how often an epoch holds each row, as in `MixedSet`.
        cap: maximum number of its rows that are used, as in `MixedSet`.
    """

    rows: int
    weight: float | None = None
    repeat: float | None = None
    cap: int | None = None

    @property
    def taken(self) -> int:
        """Return the number of rows that an epoch may use. It holds fewer if fewer are drawn."""
        return self.rows if self.cap is None else min(self.rows, self.cap)


def draws(shares: Sequence[Share]) -> list[int]:
    """Return how many rows of each set an epoch holds; at least one.

    With weights, an epoch has as many rows as all sets together may use (`taken`), divided by weight.
    """
    if shares[0].weight is None:
        return [max(1, round(one.taken * (one.repeat or 1))) for one in shares]
    whole, weights = sum(one.taken for one in shares), sum(one.weight or 0 for one in shares)
    return [max(1, round(whole * (one.weight or 0) / weights)) for one in shares]


def places(share: Share, count: int, *, seed: str) -> np.ndarray:
    """Choose the rows of a set that an epoch holds. Each used row appears equally often, and the remainder is drawn.

    Args:
        count: number of rows, as returned by `draws`.
        seed: decides which rows are used under a cap, and which rows appear once more than others.

    Returns:
        int64 [count], ascending.
    """
    draw = random.Random(seed)
    taken = list(range(share.rows)) if share.taken == share.rows else draw.sample(range(share.rows), share.taken)
    often, rest = divmod(count, share.taken)
    return np.sort(np.array(taken * often + draw.sample(taken, rest), dtype=np.int64))
