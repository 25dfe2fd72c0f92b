"""Rows as a torch dataset, and one pass over all of them before a run. Joins records, encode and workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader, Dataset

from vlft.data.encode import UNTRAINED, Encoder
from vlft.data.sample import Cost, EncodedSample, Sample
from vlft.errors import BadRow, DataError

SCAN_CHUNK = 16  # rows a worker hands back at once


class RowDataset(Dataset):
    """Parsed samples that are decoded and tokenised when asked for, in the loader's worker.

    Args:
        samples: parsed rows.
        encoder: turns one into tokens and pixels.
        on_bad_row: what to do with a row whose media cannot be decoded after all: "error" raises `DataError`,
            "skip" returns its `BadRow`, which the collator carries to the trainer's accounts.
    """

    def __init__(self, samples: Sequence[Sample], encoder: Encoder, *, on_bad_row: Literal["error", "skip"]) -> None:
        self.samples = samples
        self.encoder = encoder
        self.on_bad_row = on_bad_row

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> EncodedSample | BadRow:
        try:
            return self.encoder.encode(self.samples[index])
        except DataError as error:
            if self.on_bad_row == "error":
                raise
            return error.row


class _Scan(Dataset):
    def __init__(self, samples: Sequence[Sample], probe: Callable[[Sample], Cost]) -> None:
        self.samples = samples
        self.probe = probe

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Cost | BadRow:
        try:
            return self.probe(self.samples[index])
        except DataError as error:
            return error.row


class _DecodedCost:
    """Cost of a row after really decoding it; a class so that it pickles to workers."""

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder

    def __call__(self, sample: Sample) -> Cost:
        row = self.encoder.encode(sample)
        return Cost(
            tokens=len(row.input_ids_T),
            supervised=int((row.labels_T != UNTRAINED).sum()),
            patches=sum(medium.grid.patches for medium in row.media),
        )


def scan(samples: Sequence[Sample], encoder: Encoder, *, workers: int, decode: bool = False) -> Iterator[Cost | BadRow]:
    """The cost of every row, or why it is refused, in order.

    Args:
        samples: parsed rows.
        encoder: measures them.
        workers: processes to share the work; 0 does it here.
        decode: decode every picture and frame too (slow, finds truncated files); else headers only.

    Yields:
        one `Cost` or `BadRow` a sample.
    """
    probe = _DecodedCost(encoder) if decode else encoder.measure
    chunks = [range(i, min(i + SCAN_CHUNK, len(samples))) for i in range(0, len(samples), SCAN_CHUNK)]
    if len(chunks) < 4:
        workers = 0  # starting processes would take longer than the scan
    loader = DataLoader(_Scan(samples, probe), batch_sampler=chunks, collate_fn=list, **loader_options(workers))
    for chunk in loader:
        yield from chunk


def loader_options(workers: int, *, pin_memory: bool = False) -> dict[str, Any]:
    """Options every DataLoader of ours takes: `workers` processes, kept alive between epochs."""
    return {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": pin_memory and _has_device()}


def _has_device() -> bool:
    return torch.cuda.is_available()
