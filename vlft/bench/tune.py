"""Finds the fastest settings of the stock side on the GPU: rows of a micro-batch, and gradient checkpointing."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlft.bench.stock import COUNTS, StockRows

SIZES = (4, 2, 1)  # rows of a micro-batch that are tried; larger batches have more padding
ON_CPU = 4  # rows of a micro-batch on a CPU
TIMED = 8  # rows that settings are timed on
SPARE = 0.94  # share of the memory that a step may take; the rest is for fragmentation and the allocator


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of the stock side.

    Attributes:
        batch: rows of a micro-batch.
        checkpointing: whether activations are recomputed in the backward pass.
    """

    batch: int
    checkpointing: bool


def fastest(
    model: torch.nn.Module,
    rows: StockRows,
    collator: Callable[[Any], dict[str, Any]],
    lengths: Sequence[int],
    *,
    batch: int | None,
    checkpointing: bool | None,
    dtype: torch.dtype,
) -> Settings:
    """Find the settings with the most tokens per second, without padding.

    With and without checkpointing, the largest batch that fits with the longest rows is a candidate. On a CPU nothing
    is tried.

    Args:
        lengths: tokens of each row.
        batch: rows of a micro-batch; None to try several, or for 4 on a CPU.
        checkpointing: gradient checkpointing; None to try both, or for False on a CPU.
        dtype: dtype of the computation.

    Raises:
        torch.OutOfMemoryError: not even one row fits.
    """
    if batch is not None and checkpointing is not None:
        return Settings(batch=batch, checkpointing=checkpointing)
    device = next(model.parameters()).device
    if device.type != "cuda":
        return Settings(batch=batch or ON_CPU, checkpointing=bool(checkpointing))
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes = [batch] if batch is not None else list(SIZES)
    longest = [rows[i] for i in by_length[: max(sizes)]]
    trial = _Trial(model, collator, dtype)
    candidates = []
    for recompute in (False, True) if checkpointing is None else (checkpointing,):
        trial.checkpoint(recompute)
        fitting = next((size for size in sizes if trial.fits(longest[:size])), None)
        if fitting is not None:
            candidates.append(Settings(batch=fitting, checkpointing=recompute))
    if not candidates:
        raise torch.OutOfMemoryError(f"not one row of {lengths[by_length[0]]:,} tokens fits, even with checkpointing")
    if len(candidates) == 1:
        return candidates[0]
    every = max(1, len(rows) // TIMED)
    picked = [rows[i] for i in range(0, len(rows), every)][:TIMED]
    rates = {}
    for settings in candidates:
        trial.checkpoint(settings.checkpointing)
        groups = [picked[i : i + settings.batch] for i in range(0, len(picked), settings.batch)]
        trial.rate(groups[:2])
        rates[settings] = trial.rate(groups)
        print(f"tried {settings}: {rates[settings]:,.0f} tok/s")
    return max(rates, key=lambda settings: rates[settings])


class _Trial:
    """Single forward and backward passes of the stock model."""

    def __init__(self, model: torch.nn.Module, collator: Callable[[Any], dict[str, Any]], dtype: torch.dtype) -> None:
        self.model: Any = model.train()
        self.collator = collator
        self.dtype = dtype
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self.optimizer_bytes = 8 * trained  # AdamW's two moments in float32

    def checkpoint(self, on: bool) -> None:
        if on:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self.model.gradient_checkpointing_disable()

    def fits(self, items: Sequence[Any]) -> bool:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            self.step(items)
            taken = torch.cuda.max_memory_allocated() + self.optimizer_bytes
        except torch.OutOfMemoryError:
            return False
        finally:
            self.model.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return taken < SPARE * torch.cuda.get_device_properties(0).total_memory

    def rate(self, groups: Sequence[Sequence[Any]]) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        tokens = sum(self.step(items) for items in groups)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        self.model.zero_grad(set_to_none=True)
        return tokens / seconds

    def step(self, items: Sequence[Any]) -> int:
        batch = self.collator(items)
        counts = batch.pop(COUNTS)
        inputs = {name: value.to("cuda", non_blocking=True) for name, value in batch.items()}
        with torch.autocast("cuda", self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(**inputs).loss
        loss.backward()
        return counts["tokens"]
