"""The loader that `data_loader` returns. Its micro-batches contain the number of trained tokens of their step."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from vlft.data.collate import Batch
from vlft.data.order import RankBatches
from vlft.data.workers import workers_end_with_errors
from vlft.errors import BadRow, DataError, UsageError
from vlft.train.ranks import gather

LOG = logging.getLogger("vlft")


class Loader:
    """The micro-batches of this process. `data_loader` returns it. Each pass is the next epoch, with another order.

    An optimizer step has `accumulation` micro-batches. Under torchrun each process gets its own micro-batches, the same
    number in every process.

    Attributes:
        steps: optimizer steps of an epoch.
        accumulation: micro-batches of a step in one process.
        skipped: rows that could not be decoded so far (`on_bad_row="skip"`).
    """

    def __init__(self, rows: DataLoader[Any], batches: RankBatches, *, on_bad_row: str) -> None:
        self.steps = batches.order.steps
        self.accumulation = batches.order.accumulation
        self.skipped: list[BadRow] = []
        self._rows = rows
        self._batches = batches
        self._strict = on_bad_row == "error"
        self._epoch = 0

    def __len__(self) -> int:
        return self.steps * self.accumulation

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass, counted from 0.

        Raises:
            UsageError: it is not a whole number of at least 0.
        """
        if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
            raise UsageError(f"set_epoch(): epoch is {epoch!r}, must be a whole number of at least 0")
        self._epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield micro-batches with the keys of `vlft.data.collate.Batch`, and `num_items_in_batch`.

        `num_items_in_batch` is the number of trained tokens of the whole step.

        Raises:
            DataError: a row cannot be decoded, and `on_bad_row` is "error".
        """
        self._batches.set_epoch(self._epoch)
        self._epoch += 1
        with workers_end_with_errors():
            batches: Iterator[Batch] = iter(self._rows)
            while step := list(islice(batches, self.accumulation)):
                yield from self._of_step(step)

    def _of_step(self, step: Sequence[Batch]) -> Iterator[dict[str, Any]]:
        bad = [row for batch in step for row in batch["skipped"]]
        failed = DataError(bad[0]) if bad and self._strict else None
        for row in () if failed else bad:
            LOG.warning("skipped %s", row)
            self.skipped.append(row)
        tokens = sum(gather(sum(batch["counts"]["supervised_tokens"] for batch in step), failed=failed))
        for batch in step:
            yield {**batch, "num_items_in_batch": max(1, tokens)}
