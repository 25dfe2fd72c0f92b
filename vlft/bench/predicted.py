"""The forecast of a measured run: the same base, towers, rows and settings, on the card that ran it.

Neighbours: `vlft.bench.ours` notes what ran, `vlft.model.forecast` predicts the time of a micro-batch.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from vlft.bench.figures import grids_of
from vlft.bench.ours import RAN
from vlft.config.parse import FlagParser
from vlft.model.cards import reported
from vlft.model.forecast import Forecast, Step
from vlft.model.tracing import Load
from vlft.model.traffic import HOST_SECONDS, Cost
from vlft.model_files import read_json
from vlft.setup import Base, open_base, trainable_rows
from vlft.setup.schedule import training_order
from vlft.setup.typical import card_of, load_of, step_of, typical_rows


def predicted(folder: Path, device: str | None) -> dict[str, Any] | None:
    """Predict the typical optimizer step of a run.

    Args:
        folder: with the flags of the run (flags.yaml), and with what ran (`RAN`).
        device: the name of the GPU; None without one.

    Returns:
        "ms" of an optimizer step, "mfu", "tokens_per_s", "peak_gb" (of tensors, as torch measures it), "gpu", and the
        shapes of the micro-batch; None if the speed of the card is not known, or without 16 bits.
    """
    if card_of(None, device=device) is None:
        return None
    data, model, args = (parsed := FlagParser("train").parse(["--config", str(folder / "flags.yaml")])).flags
    base = open_base(data, model, given=parsed.given)
    measured = trainable_rows(data.data_path, data, base, workers=args.dataloader_num_workers)
    order = training_order(measured.costs, data, args, world=1)
    picked = typical_rows(order, measured.costs)
    grids = [grid for i in picked for grid in grids_of(measured.rows.samples[i], base)]
    load = replace(
        load_of([measured.costs[i] for i in picked]),
        vision_lengths=tuple(grid.h * grid.w for grid in grids for _ in range(grid.t)),
    )
    step = step_that_ran(folder, base, args, load, device)
    if step is None:
        return None
    found = step.whole()
    return {
        **of_step(found, micro_batches=order.accumulation),
        "peak_gb": (found.peak or 0) / 1e9,
        "gpu": reported(device),
        "micro_batches": order.accumulation,
        "micro_batch": {"tokens": load.tokens, "patches": load.patches, "supervised": load.supervised},
    }


def step_that_ran(folder: Path, base: Base, args: Any, load: Load, device: str | None) -> Step | None:
    """The step of a run on a micro-batch; None if it cannot be forecast.

    Args:
        folder: with `RAN`.
        base: the opened base.
        args: flags of the run.
        load: the micro-batch.
        device: the name of the GPU; None without one.
    """
    card, ran = card_of(None, device=device), read_json(folder / RAN)
    if card is None:
        return None
    return step_of(
        base,
        load,
        card=card,
        half=args.half,
        checkpointed=ran["checkpointed"],
        fused=ran["fused"],
        delta="fla" if ran["delta"] == "fla" else "torch",
    )


def of_step(found: Forecast, *, micro_batches: int) -> dict[str, float]:
    """ "ms", "mfu" and "tokens_per_s" of an optimizer step of several equal micro-batches."""
    once, each = Cost(), Cost()
    for (phase, _), cost in found.parts.items():
        (once if phase == "optimizer" else each).add(cost)
    once.add(each, times=micro_batches)
    seconds = max(once.seconds, HOST_SECONDS * once.kernels)
    assert found.card.tflops is not None
    return {
        "ms": 1e3 * seconds,
        "mfu": micro_batches * found.required / seconds / (found.card.tflops * 1e12),
        "tokens_per_s": micro_batches * found.load.tokens / seconds,
    }
