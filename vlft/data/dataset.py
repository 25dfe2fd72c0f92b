"""Rows as a torch dataset, and one pass over all of them before a run. Joins records, encode and workers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

from torch.utils.data import DataLoader, Dataset

from vlft.config.recipe import Recipe
from vlft.data.encode import UNTRAINED
from vlft.data.media import read as media_io
from vlft.data.media.jpeg import fast_decoder
from vlft.data.media.read import MediaError
from vlft.data.sample import Cost, EncodedSample, Sample
from vlft.data.workers import loader_options, workers_end_with_errors
from vlft.errors import BadRow, ConfigError, DataError

T = TypeVar("T")

SCAN_CHUNK = 16  # rows a worker hands back at once
# Seconds before each further try at media that cannot be read: network disks come back, files are put into place.
PAUSES = (0.2, 0.8, 2.0)
PATIENCE = 20  # rows given up by one process, after which it pauses but once: it is no passing fault then


class Encodes(Protocol):
    """What makes an item of a row: an `Encoder`, or an objective."""

    def encode(self, sample: Sample) -> EncodedSample:
        """The item of a row; raises DataError where there is none."""


class RowDataset(Dataset):
    """Parsed samples that are decoded and tokenised when asked for, in the loader's worker.

    Args:
        samples: parsed rows.
        encoder: turns one into tokens and pixels.
        costs: what each row was measured to cost, or None where nobody counts on it.

    Media that cannot be read are tried again after `PAUSES`. A row whose media cannot be read at all, or that costs
    something else than it was measured to, since a file was replaced, comes back as its `BadRow`, never as an
    exception: a worker's exception reaches the trainer as text. The collator carries it on, and the trainer stops or
    counts it.

    Raises:
        ValueError: as many costs as samples are needed.
    """

    def __init__(self, samples: Sequence[Sample], encoder: Encodes, costs: Sequence[Cost] | None = None) -> None:
        if costs is not None and len(costs) != len(samples):
            raise ValueError(f"{len(costs)} costs for {len(samples)} samples")
        fast_decoder()  # before workers are forked: each would look for it, and say that it is missing
        self.samples = samples
        self.encoder = encoder
        self.costs = costs
        self._given_up: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EncodedSample | BadRow:
        try:
            sample = self.samples[index]
        except DataError as error:  # its file has changed since it was measured
            return error.row
        row = self._encoded(index, sample)
        if isinstance(row, BadRow):
            return row
        if self.costs is not None and (now := cost_of(row)) != self.costs[index]:
            return _changed(sample, self.costs[index], now)
        return row

    def _encoded(self, index: int, sample: Sample) -> EncodedSample | BadRow:
        """The row, or why it cannot be had; the next epoch's look at one given up is a short one."""
        hopeless = index in self._given_up or len(self._given_up) >= PATIENCE
        pauses = PAUSES[:1] if hopeless else PAUSES
        for pause in (*pauses, None):
            try:
                return self.encoder.encode(sample)
            except DataError as error:
                bad = error.row
                if not isinstance(error.__cause__, MediaError):
                    return bad  # the row itself, which no waiting changes
            if pause is not None:
                time.sleep(pause)
        self._given_up.add(index)
        tried = f" (tried {len(pauses) + 1} times in {sum(pauses):.1f} s)"
        return replace(bad, reason=bad.reason + tried)


def cost_of(row: EncodedSample) -> Cost:
    """What an encoded row costs."""
    return Cost(
        tokens=len(row.input_ids_T),
        supervised=int((row.labels_T != UNTRAINED).sum()),
        patches=sum(medium.grid.patches for medium in row.media),
        changed=row.changed,
    )


def _changed(sample: Sample, then: Cost, now: Cost) -> BadRow:
    """Steps, packs and memory were planned on what the row cost then."""
    names = {"tokens": "tokens", "supervised": "trained tokens", "patches": "patches"}
    differing = [name for name in names if getattr(then, name) != getattr(now, name)]
    old = ", ".join(f"{getattr(then, name):,} {names[name]}" for name in differing)
    new = ", ".join(f"{getattr(now, name):,}" for name in differing)
    if not differing:
        old, new = then.changed or "as it is", now.changed or "as it is"
    fields = [medium.field for medium in sample.media]  # the data file has not: only a medium can have changed
    field = fields[0] if len(fields) == 1 else fields[0].split("[")[0] if fields else "conversations"
    reason = f"a file of it changed since it was measured: {old} then, {new} now. Run again"
    return BadRow(file=sample.file, index=sample.index, id=sample.id, field=field, reason=reason)


class _Scan(Dataset, Generic[T]):
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
            return error  # raised by the reader: torch would put the worker's traceback into the message


@dataclass(frozen=True, kw_only=True)
class MediaProbe:
    """Stands where an `Encoder` would when no base is named: opens the media of rows and counts no tokens.

    Attributes:
        recipe: pixel and frame settings.
    """

    recipe: Recipe

    def cost(self, sample: Sample, *, decode: bool) -> Cost:
        """A `Cost` of 0 tokens.

        Raises:
            DataError: a medium cannot be opened or, with `decode`, decoded.
        """
        try:
            if decode:
                grids = [media_io.decode(part, self.recipe).grid for part in sample.media]
            else:
                grids = [media_io.measure(part, self.recipe) for part in sample.media]
        except MediaError as error:
            row = BadRow(file=sample.file, index=sample.index, id=sample.id, field=error.field, reason=error.reason)
            raise DataError(row) from error
        return Cost(tokens=0, supervised=0, patches=sum(grid.patches for grid in grids))


def scan(
    samples: Sequence[Sample], look: Callable[[Sample], T], *, workers: int, chunk: int = SCAN_CHUNK
) -> Generator[T | BadRow, None, None]:
    """What a look at each row gives, or why the row is refused, in order.

    Args:
        samples: rows; indexing one may raise `DataError`.
        look: at a row, e.g. `Encoder.measure`; runs in the processes that share the work.
        workers: those processes, at most one a core; 0 does it here.
        chunk: rows a process hands back at once.

    Yields:
        one result or `BadRow` a sample.

    Raises:
        ConfigError: the settings fit no row, e.g. a chat template that leaves out pictures.
    """
    # More processes than cores only wait for each other, and starting any takes longer than a short scan.
    workers = min(workers, _cores()) if len(samples) >= 4 * chunk else 0
    chunks: Any = _Chunks(len(samples), chunk)  # ranges, where torch's hints want lists
    loader = DataLoader(_Scan(samples, look), batch_sampler=chunks, collate_fn=list, **loader_options(workers))
    with workers_end_with_errors():
        for results in loader:
            for result in results:
                if isinstance(result, ConfigError):
                    raise result
                yield result


class _Chunks:
    """Runs of neighbouring rows, as a batch sampler."""

    def __init__(self, rows: int, size: int) -> None:
        self.rows = rows
        self.size = size

    def __iter__(self) -> Iterator[range]:
        for start in range(0, self.rows, self.size):
            yield range(start, min(start + self.size, self.rows))

    def __len__(self) -> int:
        return -(-self.rows // self.size)


def _cores() -> int:
    """Cores this process may use; where the system does not tell (macOS), all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
