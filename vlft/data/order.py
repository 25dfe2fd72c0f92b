"""The order of training: which rank trains which rows in which step. Integers in, lists of row indices out.

A step takes the same rows for every split of its size into world x batch x accumulation, and every row is trained
exactly once per epoch. If the rows do not divide evenly, some micro-batches are empty lists: every rank runs the same
number of micro-batches. Independent of files and of the meaning of tokens.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from vlft.data.costs.packing import Budget, Pack, pack, split
from vlft.data.sample import Cost

PACK_TRIES = 8  # draws of an epoch's packs before the packs of the first epoch are used again


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """A fixed number of rows per step, divided evenly among ranks and micro-batches.

    Attributes:
        rows: rows to train.
        rows_per_step: global batch: rows of one optimizer step, over all ranks and micro-batches.
        world: number of processes.
        accumulation: micro-batches that a process runs in one step.
        seed: seed of the shuffle. The order depends only on it, the epoch and `rows_per_step`.
        shuffle: False keeps the order of the file (evaluation).
        group: completions of a row, which is a prompt (GRPO); None: rows are trained as they are.
    """

    rows: int
    rows_per_step: int
    world: int = 1
    accumulation: int = 1
    seed: int = 42
    shuffle: bool = True
    group: int | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return -(-self.rows // self.rows_per_step)

    def epoch(self, epoch: int) -> list[int]:
        """Return all row indices in the order of this epoch."""
        indices = list(range(self.rows))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(indices)  # stable across platforms and Python versions
        return indices

    def micro_batches(self, epoch: int, rank: int) -> Iterator[list[int]]:
        """Yield this rank's micro-batches of an epoch: `steps` x `accumulation` lists of row indices, maybe empty."""
        indices = self.epoch(epoch)
        slots = self.world * self.accumulation
        for step in range(self.steps):
            rows = indices[step * self.rows_per_step : (step + 1) * self.rows_per_step]
            for micro in range(self.accumulation):
                yield spread(rows, slots)[rank * self.accumulation + micro]


def spread(rows: Sequence[int], slots: int) -> list[list[int]]:
    """Divide rows into `slots` lists whose lengths differ by one at most; neighbours stay together."""
    size, extra = divmod(len(rows), slots)
    source = iter(rows)
    return [list(islice(source, size + (slot < extra))) for slot in range(slots)]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackOrder:
    """A fixed number of packs per step, one pack per micro-batch. Rows are packed again in each epoch.

    Attributes:
        costs: costs of the rows.
        budget: what a pack may hold.
        packs_per_step: packs of one optimizer step, over all ranks and micro-batches. The rows of a step depend only on
            it, the seed, the epoch, the costs and the budget.
        world: number of processes.
        seed: seed of the packs and of their order.
        shuffle: False uses the packs of the first epoch, in their order (evaluation).
    """

    costs: Sequence[Cost]
    budget: Budget
    packs_per_step: int
    world: int = 1
    seed: int = 42
    shuffle: bool = True

    @functools.cached_property
    def first(self) -> list[Pack]:
        """The packs of the first epoch."""
        return self._packs(0)

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return -(-len(self.first) // self.packs_per_step)

    @property
    def accumulation(self) -> int:
        """Micro-batches a process runs for one step."""
        return -(-self.packs_per_step // self.world)

    def epoch(self, epoch: int) -> list[Pack]:
        """Return all packs in the order of this epoch. Every epoch has as many as `steps` steps need, and no more."""
        if not self.shuffle:
            return list(self.first)
        most = self.steps * self.packs_per_step
        drawn = (self._packs(epoch, attempt) for attempt in range(PACK_TRIES)) if epoch else iter([self.first])
        packs = next((some for some in drawn if len(some) <= most), self.first)
        packs = split(packs, self.costs, most - self.packs_per_step + 1)
        random.Random(f"{self.seed}/{epoch}").shuffle(packs)
        return packs

    def _packs(self, epoch: int, attempt: int = 0) -> list[Pack]:
        return pack(self.costs, self.budget, seed=f"{self.seed}/{epoch}/{attempt}" if epoch else self.seed)

    def micro_batches(self, epoch: int, rank: int) -> Iterator[list[int]]:
        """Yield this rank's micro-batches of an epoch, `steps` x `accumulation` lists of row indices, maybe empty.

        Ranks that run at the same time get packs with similar numbers of patches.
        """
        packs = self.epoch(epoch)
        for step in range(self.steps):
            some = packs[step * self.packs_per_step : (step + 1) * self.packs_per_step]
            some.sort(key=lambda one: (one.patches, one.tokens, one.rows), reverse=True)
            for micro in range(self.accumulation):
                at_once = some[micro * self.world : (micro + 1) * self.world]
                # The direction alternates, so that no rank always gets the largest pack.
                place = rank if micro % 2 == 0 else self.world - 1 - rank
                yield list(at_once[place].rows) if place < len(at_once) else []


Order = RowOrder | PackOrder


class RankBatches:
    """This rank's micro-batches as a torch batch sampler. The trainer sets `epoch` before each pass."""

    def __init__(self, order: Order, *, rank: int) -> None:
        self.order = order
        self.rank = rank
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return self.order.micro_batches(self.epoch, self.rank)

    def __len__(self) -> int:
        return self.order.steps * self.order.accumulation
