"""Who trains which row when. Integers in, lists of row indices out; knows nothing of tokens or files.

A step takes the same rows whatever world x batch x accumulation makes it up, every row is trained exactly once an
epoch, and where rows do not divide, a micro-batch is an empty list: every rank runs the same number of micro-batches.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of one run.

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
