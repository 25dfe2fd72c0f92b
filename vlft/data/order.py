"""Who trains which row when. Integers in, lists of row indices out; knows nothing of tokens' meaning or files.

A step takes the same rows whatever world x batch x accumulation makes it up, every row is trained exactly once an
epoch, and where rows do not divide, a micro-batch is an empty list: every rank runs the same number of micro-batches.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from vlft.data.costs.packing import Budget, Pack, pack, split
from vlft.data.sample import Cost

PACK_TRIES = 8  # draws of an epoch's packs, before those of the first epoch are taken again


@dataclass(frozen=True, kw_only=True)
class RowOrder:
    """So many rows a step, dealt out in equal numbers.

    Attributes:
        rows: rows to train.
        rows_per_step: global batch: rows of one optimizer step, over all ranks and micro-batches.
        world: processes.
        accumulation: micro-batches a process runs for one step.
        seed: with the epoch and `rows_per_step`, all that the order depends on.
        shuffle: False keeps file order (evaluation).
    """

    rows: int
    rows_per_step: int
    world: int = 1
    accumulation: int = 1
    seed: int = 42
    shuffle: bool = True

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return -(-self.rows // self.rows_per_step)

    def epoch(self, epoch: int) -> list[int]:
        """All row indices in the order of this epoch."""
        indices = list(range(self.rows))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(indices)  # stable across platforms and Python versions
        return indices

    def micro_batches(self, epoch: int, rank: int) -> Iterator[list[int]]:
        """This rank's micro-batches of an epoch: `steps` x `accumulation` lists of row indices, some maybe empty."""
        indices = self.epoch(epoch)
        slots = self.world * self.accumulation
        for step in range(self.steps):
            rows = indices[step * self.rows_per_step : (step + 1) * self.rows_per_step]
            for micro in range(self.accumulation):
                yield spread(rows, slots)[rank * self.accumulation + micro]


def spread(rows: Sequence[int], slots: int) -> list[list[int]]:
    """Deal rows into `slots` lists whose lengths differ by one at most, neighbours together."""
    size, extra = divmod(len(rows), slots)
    source = iter(rows)
    return [list(islice(source, size + (slot < extra))) for slot in range(slots)]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackOrder:
    """So many packs a step, a pack a micro-batch; rows are packed anew each epoch.

    Attributes:
        costs: of the rows.
        budget: of a pack.
        packs_per_step: over all ranks and micro-batches; with seed, epoch, costs and budget, all that a step's rows
            depend on.
        world, seed, shuffle: as in `RowOrder`.
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
        """All packs in the order of this epoch, of which every epoch has enough for `steps` steps, and no more."""
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
        """As of `RowOrder`. Ranks that work at the same time get packs that are alike in patches."""
        packs = self.epoch(epoch)
        for step in range(self.steps):
            some = packs[step * self.packs_per_step : (step + 1) * self.packs_per_step]
            some.sort(key=lambda one: (one.patches, one.tokens, one.rows), reverse=True)
            for micro in range(self.accumulation):
                at_once = some[micro * self.world : (micro + 1) * self.world]
                # Back and forth, so that no rank has the larger of every few.
                place = rank if micro % 2 == 0 else self.world - 1 - rank
                yield list(at_once[place].rows) if place < len(at_once) else []


Order = RowOrder | PackOrder


class RankBatches:
    """This rank's micro-batches as a torch batch sampler; `epoch` is set by the trainer before each pass."""

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
