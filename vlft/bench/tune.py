"""Finds the fastest settings of the baseline on a GPU: rows of a micro-batch, gradient checkpointing, cuDNN attention.

Every setting that fits is timed on the same blocks of rows, which are batched as the order of the run batches them. A
setting that is clearly slower is not timed further.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from vlft.bench.stock import COUNTS, StockRows
from vlft.model.trial import wait_for

SIZES = (8, 4, 2, 1)  # rows of a micro-batch that are tried; larger batches have more padding
ON_CPU = 4  # rows of a micro-batch on a CPU
BLOCK = 8  # rows of a block; a multiple of all sizes
BLOCKS = 4
#: After each block, settings slower than this share of the best so far are out. The first block is the least certain.
KEPT = (0.75, 0.9, 0.95, 1.0)
SPARE = 0.94  # share of the memory that a step may take; the rest is for fragmentation and the allocator
ENVIRONMENT = "TORCH_CUDNN_SDPA_DEPRIORITIZED"  # torch tries cuDNN's attention last


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the stock side.

    Attributes:
        batch: rows of a micro-batch.
        checkpointing: whether activations are recomputed in the backward pass.
        cudnn: whether torch's sdpa may use cuDNN, which builds a plan for each new shape.
    """

    batch: int
    checkpointing: bool
    cudnn: bool = True

    def apply(self) -> None:
        """Set what is a setting of the process."""
        torch.backends.cuda.enable_cudnn_sdp(self.cudnn)

    def as_json(self) -> dict[str, Any]:
        last = os.environ.get(ENVIRONMENT) == "1"
        return asdict(self) | {"cudnn_attention": "off" if not self.cudnn else "last" if last else "as torch chooses"}


class Trial(Protocol):
    """What settings are tried with."""

    def fits(self, settings: Settings, rows: Sequence[int]) -> bool:
        """Whether a step on these rows fits in memory."""
        ...

    def seconds(self, settings: Settings, rows: Sequence[int]) -> float:
        """Seconds of the steps on these rows."""
        ...


def fastest(
    trial: Trial,
    lengths: Sequence[int],
    *,
    order: str,
    batch: int | None = None,
    checkpointing: bool | None = None,
    without_cudnn: bool = False,
    say: Callable[[str], None] = print,
) -> tuple[Settings, list[dict[str, Any]]]:
    """Find the fastest settings that fit with the longest rows.

    Args:
        trial: runs steps.
        lengths: tokens of each row.
        order: `random` or `grouped`.
        batch: rows of a micro-batch; None to try all of `SIZES`.
        checkpointing: gradient checkpointing; None to try both.
        without_cudnn: time the fastest settings also without cuDNN's attention.
        say: receives a line for each setting.

    Returns:
        the settings, and all that were timed, with their tokens per second.

    Raises:
        torch.OutOfMemoryError: not even one row fits.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found: list[Settings] = []
    for recompute in (False, True) if checkpointing is None else (checkpointing,):
        sizes = iter(SIZES if batch is None else (batch,))
        for size in sizes:
            if trial.fits(Settings(batch=size, checkpointing=recompute), by_length[:size]):
                found += [Settings(batch=one, checkpointing=recompute) for one in (size, *sizes)]  # smaller ones too
    if not found:
        raise torch.OutOfMemoryError(f"not one row of {lengths[by_length[0]]:,} tokens fits, even with checkpointing")
    if len(found) == 1 and not without_cudnn:
        return found[0], []
    blocks = blocks_of(lengths, order)
    rates = race(found, blocks, lengths, trial.seconds)
    best = next(iter(rates))
    if without_cudnn:
        two = race([best, replace(best, cudnn=False)], blocks[-2:], lengths, trial.seconds)
        rates |= {one: rate for one, rate in two.items() if one not in rates}
        best = next(iter(two))
    for one, rate in rates.items():
        say(f"tried {one}: {rate:,.0f} tok/s")
    return best, [one.as_json() | {"tokens_per_s": rate} for one, rate in rates.items()]


def blocks_of(lengths: Sequence[int], order: str) -> list[list[int]]:
    """Rows that settings are timed on, in blocks. Every block of the grouped order has rows of similar length."""
    many = max(1, min(BLOCKS, len(lengths) // BLOCK))
    if order == "random":
        picked = random.Random(0).sample(range(len(lengths)), min(len(lengths), many * BLOCK))
        return [picked[i * BLOCK : (i + 1) * BLOCK] for i in range(many)]
    ranked = sorted(range(len(lengths)), key=lambda i: lengths[i])
    blocks = []
    for number in sorted(range(many), key=lambda i: abs(i - (many - 1) / 2)):  # rows of medium length first
        window = ranked[number * len(ranked) // many : (number + 1) * len(ranked) // many]
        blocks.append(window[max(0, len(window) - BLOCK) // 2 :][:BLOCK])
    return blocks


def race(
    settings: Sequence[Settings],
    blocks: Sequence[Sequence[int]],
    lengths: Sequence[int],
    seconds: Callable[[Settings, Sequence[int]], float],
) -> dict[Settings, float]:
    """Time settings block by block, in turns. After each block the slow ones are out.

    Returns:
        settings -> tokens per second, over the blocks that it was timed on. The first is the fastest; one that is out
        may have a higher rate, on other rows.
    """
    spent = dict.fromkeys(settings, 0.0)
    seen = dict.fromkeys(settings, 0)
    left = list(settings)
    for block, kept in zip(blocks, KEPT, strict=False):  # there may be fewer blocks
        for one in left:
            spent[one] += seconds(one, block)
            seen[one] += sum(lengths[i] for i in block)
        least = min(spent[one] for one in left)
        left = [one for one in left if least >= kept * spent[one]]
        if len(left) == 1:
            break
    left.sort(key=lambda one: spent[one])
    return {one: seen[one] / spent[one] for one in (*left, *(one for one in settings if one not in left))}


class ModelTrial:
    """Forward and backward passes of the stock model on the GPU.

    Args:
        model: prepared for training.
        rows: rows by number.
        collator: of the rows.
        dtype: of the computation.
        recompute: switches gradient checkpointing.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        rows: StockRows,
        collator: Callable[[Any], dict[str, Any]],
        *,
        dtype: torch.dtype,
        recompute: Callable[[bool], None],
    ) -> None:
        self.model: Any = model.train()
        self.rows, self.collator, self.dtype, self.recompute = rows, collator, dtype, recompute
        self.device = next(model.parameters()).device
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.optimizer_bytes = 8 * trained  # AdamW's two moments in float32
        self._warm: set[Settings] = set()
        self._prepared: dict[int, Any] = {}

    def fits(self, settings: Settings, rows: Sequence[int]) -> bool:
        self._switch(settings)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            self._step(self._batch(rows))
            taken = torch.cuda.max_memory_allocated() + self.optimizer_bytes
        except torch.OutOfMemoryError:
            return False
        finally:
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return taken < SPARE * torch.cuda.get_device_properties(0).total_memory

    def seconds(self, settings: Settings, rows: Sequence[int]) -> float:
        self._switch(settings)
        batches = [self._batch(rows[i : i + settings.batch]) for i in range(0, len(rows), settings.batch)]
        if settings not in self._warm:
            self._warm.add(settings)
            self._step(batches[0])
        wait_for(self.device)
        start = time.perf_counter()
        for batch in batches:
            self._step(batch)
        wait_for(self.device)
        seconds = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        return seconds

    def _switch(self, settings: Settings) -> None:
        settings.apply()
        self.recompute(settings.checkpointing)

    def _batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """Collate rows. Decoded rows stay, because every setting takes the same."""
        for row in rows:
            if row not in self._prepared:
                self._prepared[row] = self.rows[row]
        return self.collator([self._prepared[row] for row in rows])

    def _step(self, batch: dict[str, Any]) -> None:
        inputs = {name: value.to(self.device, non_blocking=True) for name, value in batch.items() if name != COUNTS}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(**inputs).loss
        loss.backward()
