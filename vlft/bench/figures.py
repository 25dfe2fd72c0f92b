"""Figures of a run: rates, shares and TFLOP/s from the counts of each step. Numbers in, numbers out."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlft.data.media import read as media_io
from vlft.data.sample import Grid, Sample
from vlft.data.vision_meta import vision_meta
from vlft.errors import ConfigError
from vlft.model.cards import peak_tflops
from vlft.model.flops import required_flops, total
from vlft.setup import Base, MeasuredRows

FLOPS_ROWS = 2000  # rows whose pictures are opened again to count operations; they represent the others


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step of either side.

    Attributes:
        seconds: wall time.
        wait: seconds of it spent waiting for data.
        tokens: tokens without padding.
        places: tokens with padding.
        supervised: trained tokens.
        images: stills.
        samples: rows.
    """

    seconds: float
    wait: float
    tokens: int
    places: int
    supervised: int
    images: int
    samples: int


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """Totals of one pass over all rows, for the seconds of an epoch and for TFLOP/s.

    Attributes:
        tokens: tokens of all rows.
        tflops: operations that training on all rows needs, in units of 1e12.
    """

    tokens: int
    tflops: float


def epoch_of(base: Base, measured: MeasuredRows) -> Epoch:
    """Count tokens and operations of all rows. Pictures are measured from the headers of a sample of the rows."""
    costs = measured.costs
    tokens = sum(cost.tokens for cost in costs)
    every = max(1, -(-len(costs) // FLOPS_ROWS))
    picked = range(0, len(costs), every)
    sizes = base.sizes
    grids = [grid for i in picked for grid in grids_of(measured.rows.samples[i], base)]
    part = required_flops(
        sizes,
        base.towers,
        lengths=[costs[i].tokens for i in picked],
        vision_lengths=[grid.h * grid.w for grid in grids for _ in range(grid.t)],
        window_lengths=vision_meta(grids, sizes.vision).get("window_lengths") if grids else (),
        supervised=sum(costs[i].supervised for i in picked),
    )
    seen = sum(costs[i].tokens for i in picked)
    return Epoch(tokens=tokens, tflops=total(part) / 1e12 * tokens / seen)


def grids_of(sample: Sample, base: Base) -> list[Grid]:
    """Return the grid of each medium of a row."""
    return [media_io.measure(part, base.recipe) for part in sample.media]


def summary(steps: Sequence[Step], *, skip: int, epoch: Epoch, device: str | None, peak_gb: float) -> dict[str, Any]:
    """Compute the figures of one run.

    Args:
        steps: all steps of the run.
        skip: number of first steps that do not count, because they build caches and compile.
        epoch: tokens and operations of all rows.
        device: name of the GPU, or None without one: then TFLOP/s and MFU are None.
        peak_gb: peak memory of the run.

    Raises:
        ConfigError: no step is left.
    """
    kept = steps[skip:]
    if not kept:
        raise ConfigError(f"the run had {len(steps)} steps and the first {skip} do not count. Use more --steps.")
    seconds = sum(step.seconds for step in kept)
    tokens = sum(step.tokens for step in kept)
    rate = tokens / seconds
    tflops = epoch.tflops / epoch.tokens * rate if device is not None else None
    peak = peak_tflops(device)
    return {
        "tokens_per_s": rate,
        "supervised_tokens_per_s": sum(step.supervised for step in kept) / seconds,
        "padding_fraction": 1 - tokens / sum(step.places for step in kept),
        "data_wait_s": sum(step.wait for step in kept) / len(kept),
        "tflops": tflops,
        "mfu": tflops / peak if tflops is not None and peak is not None else None,
        "peak_gb": peak_gb,
        "pictures_per_s": sum(step.images for step in kept) / seconds,
        "step_s": statistics.median(step.seconds for step in kept),
        "tokens_per_s_median": statistics.median(step.tokens / step.seconds for step in kept),
        "epoch_s": epoch.tokens / rate,
        "steps": len(kept),
        "seconds": seconds,
        "tokens": tokens,
        "run_tokens": sum(step.tokens for step in steps),
        "run_samples": sum(step.samples for step in steps),
    }
