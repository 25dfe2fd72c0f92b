"""Plan packs: which rows share a micro-batch. Integers in, index lists out; knows nothing of texts or files.

Best fit in blocks: rows are shuffled and taken a block at a time, and of a block the largest goes first, into the
fullest pack that still has room. Packs that a block leaves with room go on into the next, so only the last are not
full, and a pack mixes long rows with short ones. Sizes are blurred a little, so that another seed gives other packs.

D. S. Johnson, Near-Optimal Bin Packing Algorithms (1973), for best fit and the decreasing order.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlft.data.sample import Cost, Costs

BLOCK = 2048  # rows looked at together; more fills no better
BLUR = 0.3  # of a row's size when rows are sorted, or a few hundred rows would share the same packs every epoch
FULL = 0.99  # of the token budget, above which a pack is not offered to the next block


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a pack may hold: tokens of the language model and patches of the ViT."""

    tokens: int
    patches: int

    def over(self, cost: Cost) -> str | None:
        """Why a row of this cost fits no pack, or None where it fits."""
        for unit, has, may in (("tokens", cost.tokens, self.tokens), ("patches", cost.patches, self.patches)):
            if has > may:
                return (
                    f"{has:,} {unit} fit no pack, --pack_{unit} is {may:,}. Raise it, shorten the row, lower the "
                    "pixel budgets, or let --over_length deal with such rows"
                )
        return None

    def for_rows(self, rows: float, costs: Sequence[Cost]) -> Budget:
        """A budget no larger than this one, of packs that hold about so many rows, and any single one."""
        each = Costs.of(costs).tokens
        tokens = max(rows * int(each.sum(dtype="int64")) / len(each), int(each.max()))
        return replace(self, tokens=min(self.tokens, round(tokens)))


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Rows that share a micro-batch.

    Attributes:
        rows: their indices.
        tokens, patches: of all of them.
    """

    rows: tuple[int, ...]
    tokens: int
    patches: int


@dataclass(kw_only=True)
class _Open:
    rows: list[int]
    tokens: int = 0
    patches: int = 0


def pack(costs: Sequence[Cost], budget: Budget, *, seed: int | str, block: int = BLOCK) -> list[Pack]:
    """Put every row into one pack.

    Args:
        costs: of the rows; each fits the budget (`Budget.over` says nothing of it).
        budget: of a pack.
        seed: with the costs and the budget, all that the packs depend on.
        block: rows looked at together.

    Raises:
        ValueError: a row is larger than the budget.
    """
    costs = list(costs)  # looked at many times, and `Costs` makes one anew each time
    indices = list(range(len(costs)))
    draw = random.Random(f"{seed}/packs")
    draw.shuffle(indices)
    done: list[_Open] = []
    left: list[_Open] = []
    for start in range(0, len(indices), block):
        rows = indices[start : start + block]
        sizes = {row: _share(costs[row], budget) * (1 + BLUR * draw.random()) for row in rows}
        rows.sort(key=sizes.__getitem__, reverse=True)
        fitting = _BestFit(left, budget)
        for row in rows:
            fitting.put(row, costs[row])
        done += [one for one in fitting.packs if one.tokens >= FULL * budget.tokens]
        left = [one for one in fitting.packs if one.tokens < FULL * budget.tokens]
        # Of very many the fullest are closed, or every block would look through those of all blocks before it.
        left.sort(key=lambda one: one.tokens)
        done += left[block // 8 :]
        left = left[: block // 8]
    return [Pack(rows=tuple(one.rows), tokens=one.tokens, patches=one.patches) for one in done + left]


def _share(cost: Cost, budget: Budget) -> float:
    """How much of a pack a row takes, in what it takes most of."""
    return max(cost.tokens / budget.tokens, cost.patches / budget.patches)


class _BestFit:
    """Open packs, sorted by the tokens in them, so that the fullest with room is found by bisection."""

    def __init__(self, packs: Sequence[_Open], budget: Budget) -> None:
        self.packs = list(packs)
        self.budget = budget
        self._by_tokens = sorted((one.tokens, place) for place, one in enumerate(self.packs))

    def put(self, row: int, cost: Cost) -> None:
        if why := self.budget.over(cost):
            raise ValueError(f"row {row}: {why}")
        place = self._take(cost)
        if place is None:
            place = len(self.packs)
            self.packs.append(_Open(rows=[]))
        one = self.packs[place]
        one.rows.append(row)
        one.tokens += cost.tokens
        one.patches += cost.patches
        bisect.insort(self._by_tokens, (one.tokens, place))

    def _take(self, cost: Cost) -> int | None:
        """The fullest pack with room for the row, taken off the list."""
        behind = bisect.bisect_right(self._by_tokens, (self.budget.tokens - cost.tokens, len(self.packs)))
        for position in reversed(range(behind)):
            place = self._by_tokens[position][1]
            if self.packs[place].patches + cost.patches <= self.budget.patches:
                del self._by_tokens[position]
                return place
        return None


def split(packs: Sequence[Pack], costs: Sequence[Cost], count: int) -> list[Pack]:
    """At least `count` packs where the rows suffice, by halving those of the most rows."""
    found = sorted(packs, key=lambda one: len(one.rows))
    while len(found) < count and len(found[-1].rows) > 1:
        rows = found.pop().rows
        for half in (rows[::2], rows[1::2]):
            bisect.insort(found, _pack_of(half, costs), key=lambda one: len(one.rows))
    return found


def _pack_of(rows: Sequence[int], costs: Sequence[Cost]) -> Pack:
    return Pack(
        rows=tuple(rows),
        tokens=sum(costs[row].tokens for row in rows),
        patches=sum(costs[row].patches for row in rows),
    )
