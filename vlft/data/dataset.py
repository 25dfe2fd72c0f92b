"""Rows as a data set for torch's DataLoader, and one pass over all rows before a run."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from vlft.config.recipe import Recipe
from vlft.data import pixel_memory
from vlft.data.branches import laid_out
from vlft.data.encode import UNTRAINED
from vlft.data.media import decode as decoder
from vlft.data.media import read as media_io
from vlft.data.media.jpeg import fast_decoder
from vlft.data.media.read import MediaError
from vlft.data.media.resize import direct_resize
from vlft.data.sample import Cost, EncodedSample, Sample
from vlft.data.workers import loader_options, workers_end_with_errors
from vlft.errors import BadRow, ConfigError, DataError

if TYPE_CHECKING:
    from torch.utils.data import Dataset as _Dataset
else:
    _Dataset = object  # a DataLoader takes any object with these methods, and torch takes seconds to import

T = TypeVar("T")

SCAN_CHUNK = 16  # rows that a worker returns at once
SHORT = 2.0  # seconds of a scan in this process: starting workers, with torch, takes longer
# Seconds before each further attempt at media that cannot be read: a network disk recovers, or a file is moved there.
PAUSES = (0.2, 0.8, 2.0)
PATIENCE = 20  # failed rows of one process after which it pauses only once per row: the fault is not temporary then


class Encodes(Protocol):
    """Turns a row into an item: an `Encoder`, or an objective."""

    def decode(self, sample: Sample) -> Any:
        """Decode the media of a row; raises DataError if the row is refused."""

    def encode(self, sample: Sample, decoded: Any) -> EncodedSample:
        """Return the item of a row whose media are decoded; raises DataError if the row is refused."""


class RowDataset(_Dataset):
    """Parsed samples that are decoded and tokenised on access, in the loader's worker.

    If media cannot be read, reading is tried again after `PAUSES`. A row is returned as its `BadRow` if its media still
    cannot be read, or if its cost differs from the measured one because a file was replaced. It is never raised as an
    exception: a worker's exception reaches the trainer as text. The collator passes the `BadRow` on, and the trainer
    stops or counts it.

    Args:
        samples: parsed rows.
        encoder: turns a row into tokens and pixels.
        costs: the measured cost of each row, or None to skip the comparison.

    Raises:
        ValueError: the numbers of costs and samples differ.
    """

    def __init__(self, samples: Sequence[Sample], encoder: Encodes, costs: Sequence[Cost] | None = None) -> None:
        if costs is not None and len(costs) != len(samples):
            raise ValueError(f"{len(costs)} costs for {len(samples)} samples")
        # Before the workers fork: each of them would test these functions, and report that one is missing.
        fast_decoder()
        direct_resize()
        self.samples = samples
        self.encoder = encoder
        self.costs = costs
        self._given_up: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EncodedSample | BadRow:
        return self._encoded(index, self._decoded(index, self._sample(index)))

    def __getitems__(self, indices: Sequence[int]) -> list[EncodedSample | BadRow]:
        """Return the rows of a micro-batch, with all their pixels in one piece of memory. torch's loader calls it.

        All rows are read first, then all media, then all tokens are made. Decoding a picture drives other code out of
        the processor's caches, and reading a row or making its tokens takes four times as long right after it.
        """
        with pixel_memory.pack():
            samples = list(map(self._sample, indices))
            decoded = list(map(self._decoded, indices, samples))
            return list(map(self._encoded, indices, decoded))

    def _sample(self, index: int) -> Sample | BadRow:
        try:
            return self.samples[index]
        except DataError as error:  # its file has changed since it was measured
            return error.row

    def _encoded(self, index: int, decoded: tuple[Sample, Any] | BadRow) -> EncodedSample | BadRow:
        if isinstance(decoded, BadRow):
            return decoded
        sample, media = decoded
        try:
            row = self.encoder.encode(sample, media)
        except DataError as error:
            return _of_part(sample, error.row)
        if self.costs is not None and (now := cost_of(row)) != self.costs[index]:
            return _of_part(sample, _changed(sample, self.costs[index], now))
        return row

    def _decoded(self, index: int, sample: Sample | BadRow) -> tuple[Sample, Any] | BadRow:
        """Decode the media of a row, or say why that fails. A row that failed before is tried again only once."""
        if isinstance(sample, BadRow):
            return sample
        hopeless = index in self._given_up or len(self._given_up) >= PATIENCE
        pauses = PAUSES[:1] if hopeless else PAUSES
        for pause in (*pauses, None):
            try:
                return sample, self.encoder.decode(sample)
            except DataError as error:
                bad = error.row
                if not isinstance(error.__cause__, MediaError):
                    return _of_part(sample, bad)  # the row itself is wrong: waiting does not help
            if pause is not None:
                time.sleep(pause)
        self._given_up.add(index)
        tried = f" (tried {len(pauses) + 1} times in {sum(pauses):.1f} s)"
        return _of_part(sample, replace(bad, reason=bad.reason + tried))


def cost_of(row: EncodedSample) -> Cost:
    """Return the cost of an encoded row."""
    tokens = laid_out(row.branches, shared=row.shared) if row.branches else len(row.input_ids_T)
    return Cost(
        tokens=tokens,
        supervised=int(np.count_nonzero(row.labels_T.numpy() != UNTRAINED)),  # by numpy, in a third of torch's time
        patches=sum(medium.grid.patches for medium in row.media),
        changed=row.changed,
        branches=row.branches,
    )


def _of_part(sample: Sample, bad: BadRow) -> BadRow:
    """Say which sample of a row is refused, if the row is split: the others may be trained."""
    if sample.answer is None:
        return bad
    return replace(bad, reason=f"the sample that ends with {sample.turns[-1].field}: {bad.reason}")


def _changed(sample: Sample, then: Cost, now: Cost) -> BadRow:
    """Refuse a row whose cost has changed: steps, packs and memory were planned for the measured cost."""
    names = {"tokens": "tokens", "supervised": "trained tokens", "patches": "patches"}
    differing = [name for name in names if getattr(then, name) != getattr(now, name)]
    old = ", ".join(f"{getattr(then, name):,} {names[name]}" for name in differing)
    new = ", ".join(f"{getattr(now, name):,}" for name in differing)
    if not differing:
        old, new = then.changed or "as it is", now.changed or "as it is"
    fields = [medium.field for medium in sample.media]  # the row is the same, so one of its media files has changed
    field = fields[0] if len(fields) == 1 else fields[0].split("[")[0] if fields else "conversations"
    reason = f"one of its files changed since it was measured: {old} then, {new} now. Run again"
    return BadRow(file=sample.file, index=sample.index, id=sample.id, field=field, reason=reason)


class _Scan(Generic[T]):
    def __init__(self, samples: Sequence[Sample], look: Callable[[Sample], T]) -> None:
        self.samples = samples
        self.look = look

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> T | BadRow | ConfigError:
        try:
            return self.look(self.samples[index])
        except DataError as error:
            return error.row
        except ConfigError as error:
            return error  # `scan` raises it: torch would put the worker's traceback into the message


@dataclass(frozen=True, kw_only=True)
class MediaProbe:
    """Replaces an `Encoder` when no base is named: opens the media of rows and counts no tokens.

    Attributes:
        recipe: pixel and frame settings.
    """

    recipe: Recipe

    def cost(self, sample: Sample, *, decode: bool) -> Cost:
        """Return a `Cost` of 0 tokens.

        Raises:
            DataError: a medium cannot be opened or, with `decode`, decoded.
        """
        try:
            for part in sample.media if decode else ():
                decoder.check(part, self.recipe, exact=True)
            grids = [media_io.measure(part, self.recipe) for part in sample.media]
        except MediaError as error:
            row = BadRow(file=sample.file, index=sample.index, id=sample.id, field=error.field, reason=error.reason)
            raise DataError(row) from error
        return Cost(tokens=0, supervised=0, patches=sum(grid.patches for grid in grids))


def scan(
    samples: Sequence[Sample], look: Callable[[Sample], T], *, workers: int, chunk: int = SCAN_CHUNK
) -> Generator[T | BadRow, None, None]:
    """Apply a function to each row, in order.

    Args:
        samples: rows; indexing one may raise `DataError`.
        look: function of a row, e.g. `Encoder.measure`; called in the worker processes.
        workers: worker processes, at most one per core, for what is left after `SHORT`; 0 calls `look` in this process.
        chunk: rows that a worker returns at once.

    Yields:
        one result per sample, or its `BadRow` if the row is refused.

    Raises:
        ConfigError: the settings fit no row, e.g. the chat template leaves out pictures.
    """
    workers = min(workers, _cores())  # more processes than cores only wait for each other
    rows = _Scan(samples, look)
    until = time.monotonic() + SHORT
    done = 0
    while done < len(rows) and (not workers or time.monotonic() < until or len(rows) - done < 4 * chunk):
        yield _checked(rows[done])
        done += 1
    if done == len(rows):
        return
    from torch.utils.data import DataLoader

    chunks: Any = _Chunks(done, len(rows), chunk)  # it yields ranges, while torch's type hints ask for lists
    loader: Any = DataLoader(rows, batch_sampler=chunks, collate_fn=list, **loader_options(workers))  # type: ignore[arg-type]
    with workers_end_with_errors():
        for results in loader:
            for result in results:
                yield _checked(result)


def _checked(result: T | BadRow | ConfigError) -> T | BadRow:
    if isinstance(result, ConfigError):
        raise result
    return result


class _Chunks:
    """A batch sampler that yields runs of neighbouring rows."""

    def __init__(self, first: int, rows: int, size: int) -> None:
        self.first = first
        self.rows = rows
        self.size = size

    def __iter__(self) -> Iterator[range]:
        for start in range(self.first, self.rows, self.size):
            yield range(start, min(start + self.size, self.rows))

    def __len__(self) -> int:
        return -(-(self.rows - self.first) // self.size)


def _cores() -> int:
    """Return the number of cores that this process may use; all cores if the system does not report it (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
