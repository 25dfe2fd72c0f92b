"""Rows as a torch dataset, and one pass over all of them before a run. Joins records, encode and workers."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vlft.data import media as media_io
from vlft.data.encode import UNTRAINED, Encoder
from vlft.data.media import MediaError, MediaSettings
from vlft.data.sample import Cost, EncodedSample, Sample
from vlft.errors import BadRow, ConfigError, DataError

WORKER_GRACE = 120  # seconds that a loader process goes on after SIGTERM
SCAN_CHUNK = 16  # rows a worker hands back at once
DECODE_CHUNK = 4  # the same where every frame is decoded, which takes a hundred times longer
# Seconds before each further try at media that cannot be read: network disks come back, files are put into place.
PAUSES = (0.2, 0.8, 2.0)
PATIENCE = 20  # rows given up by one process, after which it pauses but once: it is no passing fault then


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

    def __init__(self, samples: Sequence[Sample], encoder: Encoder, costs: Sequence[Cost] | None = None) -> None:
        if costs is not None and len(costs) != len(samples):
            raise ValueError(f"{len(costs)} costs for {len(samples)} samples")
        self.samples = samples
        self.encoder = encoder
        self.costs = costs
        self._given_up: set[int] = set()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EncodedSample | BadRow:
        sample = self.samples[index]
        row = self._encoded(index)
        if isinstance(row, BadRow):
            return row
        if self.costs is not None and (now := _cost(row)) != self.costs[index]:
            return _changed(sample, self.costs[index], now)
        return row

    def _encoded(self, index: int) -> EncodedSample | BadRow:
        """The row, or why it cannot be had; the next epoch's look at one given up is a short one."""
        sample = self.samples[index]
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


def _cost(row: EncodedSample) -> Cost:
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
    fields = [medium.field for medium in sample.media]  # the conversation is in memory: only a file can have changed
    field = fields[0] if len(fields) == 1 else fields[0].split("[")[0] if fields else "conversations"
    reason = f"a file of it changed since it was measured: {old} then, {new} now. Run again"
    return BadRow(file=sample.file, index=sample.index, id=sample.id, field=field, reason=reason)


class _Scan(Dataset):
    def __init__(self, samples: Sequence[Sample], probe: Callable[[Sample], Cost]) -> None:
        self.samples = samples
        self.probe = probe

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Cost | BadRow | ConfigError:
        try:
            return self.probe(self.samples[index])
        except DataError as error:
            return error.row
        except ConfigError as error:
            return error  # raised by the reader: torch would put the worker's traceback into the message


@dataclass(frozen=True, kw_only=True)
class MediaProbe:
    """Stands where an `Encoder` would when no base is named: opens the media of rows and counts no tokens.

    Attributes:
        media: pixel and frame budgets.
    """

    media: MediaSettings

    def cost(self, sample: Sample, *, decode: bool) -> Cost:
        """A `Cost` of 0 tokens.

        Raises:
            DataError: a medium cannot be opened or, with `decode`, decoded.
        """
        try:
            if decode:
                grids = [media_io.decode(part, self.media).grid for part in sample.media]
            else:
                grids = [media_io.measure(part, self.media) for part in sample.media]
        except MediaError as error:
            row = BadRow(file=sample.file, index=sample.index, id=sample.id, field=error.field, reason=error.reason)
            raise DataError(row) from error
        return Cost(tokens=0, supervised=0, patches=sum(grid.patches for grid in grids))


def _decoded_cost(sample: Sample, *, encoder: Encoder) -> Cost:
    return _cost(encoder.encode(sample))


def _probe(encoder: Encoder | MediaProbe, *, decode: bool) -> Callable[[Sample], Cost]:
    if isinstance(encoder, MediaProbe):
        return functools.partial(encoder.cost, decode=decode)
    return functools.partial(_decoded_cost, encoder=encoder) if decode else encoder.measure


def scan(
    samples: Sequence[Sample], encoder: Encoder | MediaProbe, *, workers: int, decode: bool = False
) -> Iterator[Cost | BadRow]:
    """The cost of every row, or why it is refused, in order.

    Args:
        samples: parsed rows.
        encoder: measures them; a `MediaProbe` looks at their media only.
        workers: processes to share the work, at most one a core; 0 does it here.
        decode: decode every picture and frame too (slow, finds truncated files); else headers only.

    Yields:
        one `Cost` or `BadRow` a sample.

    Raises:
        ConfigError: the settings fit no row, e.g. a chat template that leaves out pictures.
    """
    size = DECODE_CHUNK if decode else SCAN_CHUNK
    chunks = [list(range(i, min(i + size, len(samples)))) for i in range(0, len(samples), size)]
    # More processes than cores only wait for each other, and starting any takes longer than a short scan.
    workers = min(workers, _cores()) if len(chunks) >= 4 else 0
    probe = _probe(encoder, decode=decode)
    loader = DataLoader(_Scan(samples, probe), batch_sampler=chunks, collate_fn=list, **loader_options(workers))
    for chunk in loader:
        for result in chunk:
            if isinstance(result, ConfigError):
                raise result
            yield result


def loader_options(workers: int, *, pin_memory: bool = False) -> dict[str, Any]:
    """Options every DataLoader of ours takes: `workers` processes, kept alive between epochs."""
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": pin_memory and _has_device(),
        "worker_init_fn": _be_apart if workers else None,
    }


def _be_apart(worker: int) -> None:
    """A scheduler's notice (see `train.signals`) or Ctrl-C is for the trainer to act on, which still needs its workers.

    They end when it does, by torch's own watch over them.
    """
    os.setpgid(0, 0)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Put off, not ignored: Python ends workers that way when it exits itself.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(WORKER_GRACE))


def _has_device() -> bool:
    return torch.cuda.is_available()


def _cores() -> int:
    """Cores this process may use; where the system does not tell (macOS), all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
