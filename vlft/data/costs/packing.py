"""Plans packs: which rows share a micro-batch. Integers in, index lists out. Independent of texts and files.

Best fit in blocks: rows are shuffled and processed in blocks. Each block places its largest rows first, each into the
fullest pack that still has room. Packs that still have room are offered to the next block, so that only the last packs
are not full, and a pack mixes long rows with short ones. Sizes are varied a little at random, so that another seed
gives other packs.

D. S. Johnson, Near-Optimal Bin Packing Algorithms (1973), for best fit and the decreasing order.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vlft.data.branches import named_parts
from vlft.data.costs.columns import Costs
from vlft.data.sample import Cost

BLOCK = 2048  # rows packed together; larger blocks do not fill packs better
BLUR = 0.3  # random variation of sizes before sorting; else a few hundred rows share the same packs in every epoch
FULL = 0.99  # share of the token budget above which a pack is not offered to the next block


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a pack may hold.

    Attributes:
        tokens: maximum tokens in the language model.
        patches: maximum patches in the ViT.
    """

    tokens: int
    patches: int

    def over(self, cost: Cost) -> str | None:
        """Say why a row of this cost fits no pack; None if it fits."""
        for unit, has, may in (("tokens", cost.tokens, self.tokens), ("patches", cost.patches, self.patches)):
            if has > may:
                parts = f" ({named_parts(cost)})" if unit == "tokens" and cost.branches else ""
                return (
                    f"{has:,} {unit}{parts} fit no pack, --pack_{unit} is {may:,}. Raise it, shorten the row, lower "
                    "the pixel budgets, or let --over_length handle such rows"
                )
        return None

    def over_any(self, cost: Cost) -> str | None:
        """Say why a sample of a row fits no pack; None if all of them fit."""
        for part in cost.samples:
            if why := self.over(part):
                return why if part is cost else f"the row up to turn {part.answer} (counted from 0): {why}"
        return None

    def for_rows(self, rows: float, costs: Sequence[Cost]) -> Budget:
        """Return a budget, no larger than this one, for packs of about `rows` rows. Any single row fits it."""
        each = Costs.of(costs).tokens
        tokens = max(rows * int(each.sum(dtype="int64")) / len(each), int(each.max()))
        return replace(self, tokens=min(self.tokens, round(tokens)))


@dataclass(frozen=True, kw_only=True)
class Pack:
    """Rows that share a micro-batch.

    Attributes:
        rows: indices of the rows.
        tokens: tokens of all its rows.
        patches: patches of all its rows.
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
        costs: costs of the rows; each must fit the budget (`Budget.over` returns None).
        budget: what a pack may hold.
        seed: random seed. The packs depend only on it, the costs and the budget.
        block: rows packed together.

    Raises:
        ValueError: a row is larger than the budget.
    """
    costs = list(costs)  # read many times, and `Costs` builds a new `Cost` each time
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
        # At most block // 8 packs stay open, the emptiest: else each block would search the packs of all before it.
        left.sort(key=lambda one: one.tokens)
        done += left[block // 8 :]
        left = left[: block // 8]
    return [Pack(rows=tuple(one.rows), tokens=one.tokens, patches=one.patches) for one in done + left]


def _share(cost: Cost, budget: Budget) -> float:
    """Return the share of a pack that a row takes, in tokens or patches, whichever is larger."""
    return max(cost.tokens / budget.tokens, cost.patches / budget.patches)


class _BestFit:
    """Open packs, sorted by their tokens, so that bisection finds the fullest one with room."""

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
        """Remove the fullest pack with room for the row from the list, and return its index; None if there is none."""
        behind = bisect.bisect_right(self._by_tokens, (self.budget.tokens - cost.tokens, len(self.packs)))
        for position in reversed(range(behind)):
            place = self._by_tokens[position][1]
            if self.packs[place].patches + cost.patches <= self.budget.patches:
                del self._by_tokens[position]
                return place
        return None


def split(packs: Sequence[Pack], costs: Sequence[Cost], count: int) -> list[Pack]:
    """Halve the packs with the most rows until there are at least `count`, or no pack has two rows."""
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
