"""Guard each optimizer step: record where it is, and turn errors in it into faults that name the rows.

`vlft.train.faults` writes the messages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from vlft.config.training import TrainFlags
from vlft.data.collate import Batch
from vlft.errors import BadRow, DataError, RunFault
from vlft.train import faults
from vlft.train.faults import MicroBatch
from vlft.train.folder import RunFolder
from vlft.train.ranks import gather
from vlft.train.watchdog import Watchdog


class StepGuard:
    """The guard of a run. The trainer calls it at each stage of a step.

    Args:
        args: the training flags.
        folder: the run folder, for its checkpoints.
        watchdog: learns where this process is.
        packing: whether a micro-batch is a pack.
        say: prints a line for the user (rank 0 only).
    """

    def __init__(
        self, args: TrainFlags, folder: RunFolder, watchdog: Watchdog, *, packing: bool, say: Callable[[str], None]
    ) -> None:
        self.args = args
        self.folder = folder
        self.watchdog = watchdog
        self.packing = packing
        self.say = say
        self.step = 0
        self._batches: list[MicroBatch] = []
        self._losses: list[torch.Tensor] = []

    def loading(self, step: int) -> None:
        """This rank starts to wait for the micro-batches of a step.

        Args:
            step: its number, from 1.
        """
        self.step = step
        self.watchdog.at(f"step {step}, waiting for data")

    def begin(self, batches: Sequence[Batch], *, weight: float, refused: BadRow | None) -> float:
        """The micro-batches of a step have arrived. Every rank must call it.

        Args:
            batches: of this rank.
            weight: of this rank's part of the step's loss.
            refused: a row that cannot be trained and ends the run, or None.

        Returns:
            The weight of the step, over all ranks.

        Raises:
            DataError: on every rank, if any rank has a refused row.
        """
        rank, many = self.args.process_index, len(batches)
        self._batches = [MicroBatch.of_batch(batch, rank=rank, place=i, of=many) for i, batch in enumerate(batches, 1)]
        self._losses = []
        self.watchdog.at(f"step {self.step}, waiting for the other processes' data")
        return sum(gather(weight, failed=None if refused is None else DataError(refused)))

    def begin_rows(self, batches: Sequence[tuple[str, ...]]) -> None:
        """The same for micro-batches of which only the rows are known yet, as file[index]."""
        rank, many = self.args.process_index, len(batches)
        self._batches = [
            MicroBatch(rank=rank, place=i, of=many, rows=rows, tokens=0, patches=0) for i, rows in enumerate(batches, 1)
        ]
        self._losses = []

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """A context around forward and backward of the next micro-batch.

        Raises:
            RunFault: out of memory.
        """
        batch = self._batches[len(self._losses)]
        self.watchdog.at(f"step {self.step}, micro-batch {batch.place} of {batch.of}, forward", batch.rows)
        with self._room_for(batch, f"step {self.step}"):
            yield
        self.watchdog.at(f"step {self.step}, after micro-batch {batch.place} of {batch.of}")

    @contextmanager
    def evaluation(self, batch: Batch, *, place: int, of: int, step: int | None) -> Iterator[None]:
        """A context around the forward of a micro-batch without gradients.

        Args:
            batch: the micro-batch.
            place: its number in the evaluation, from 1.
            of: how many there are.
            step: the last optimizer step; None: the reference of the run is computed.

        Raises:
            RunFault: out of memory.
        """
        rows = MicroBatch.of_batch(batch, rank=self.args.process_index, place=place, of=of)
        where = "reference" if step is None else f"evaluation after step {step}"
        self.watchdog.at(f"{where}, micro-batch {place} of {of}", rows.rows)
        with self._room_for(rows, f"the {where}"):
            yield
        self.watchdog.at(f"{where}, after micro-batch {place} of {of}")

    @contextmanager
    def _room_for(self, batch: MicroBatch, where: str) -> Iterator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            full = isinstance(error, torch.OutOfMemoryError | MemoryError)
            if not full and "can't allocate memory" not in str(error):  # the text of torch's CPU allocator
                raise
            raise faults.out_of_memory(
                error,
                batch,
                where=where,
                checkpoint=self.folder.newest(),
                checkpointed=self.args.checkpointing == "true",
                packing=self.packing,
                grpo=faults.generates(self.folder),
            ) from error

    def add_loss(self, loss: torch.Tensor) -> None:
        """Record the loss of the micro-batch, without reading it from the device."""
        batch = self._batches[len(self._losses)]
        self.watchdog.at(f"step {self.step}, micro-batch {batch.place} of {batch.of}, backward", batch.rows)
        self._losses.append(loss.detach())

    def must_leave_out(self, norm: float | None) -> bool:
        """Whether the step must not change the weights. Call it between the backward pass and the optimizer.

        Args:
            norm: of the whole gradient, equal on every rank, as `Meter.read` returns it; None if unknown, then only the
                losses are checked.

        Raises:
            RunFault: on every rank, if the loss or the gradient is not finite and that ends the run.
        """
        if norm is not None:
            if math.isfinite(norm) and norm >= 0:  # DeepSpeed 0.19 returns -1 if it is not
                return False
        else:
            finite = bool(torch.stack(self._losses).isfinite().all())
            if all(gather(finite)):
                return False
        return self._not_finite(norm)

    def _not_finite(self, norm: float | None) -> bool:
        mine = list(zip(self._batches, (float(loss) for loss in self._losses), strict=True))
        both = [pair for rank in gather(mine) for pair in rank]
        left_out = self.folder.left_out
        if skip := len(left_out) < self.args.max_nonfinite_steps:
            left_out.append(self.step)
        text = faults.not_finite(
            self.step,
            norm=norm,
            losses=[(batch, loss) for batch, loss in both if not math.isfinite(loss)],
            everything=[batch for batch, _ in both],
            left_out=len(left_out) if skip else None,
            checkpoint=self.folder.newest(),
        )
        if skip:
            self.say(text)
            return True
        if left_out:
            text += f"\n  {len(left_out)} steps were left out before it, as --max_nonfinite_steps allows."
        fault = RunFault(text)
        fault.said = self.args.process_index != 0
        raise fault
