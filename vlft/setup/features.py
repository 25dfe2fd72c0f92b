"""What `--cache_vision_features` takes on disk, and what it saves from the second epoch on.

The size follows from the measured rows. The saving is a share of the required operations (`vlft.model.flops`) of some
rows, whose headers are read again. `vlft.train.features` is the cache of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from vlft.config.flags import PlanFlags
from vlft.data.features.writer import GB
from vlft.data.media.read import MediaError, measure
from vlft.errors import DataError
from vlft.model.flops import required_flops, total
from vlft.setup.base import Base
from vlft.setup.rows import MeasuredRows

SAMPLED = 100  # rows whose headers are read again


@dataclass(frozen=True, kw_only=True)
class FeatureForecast:
    """The cache of features of a run.

    Attributes:
        bytes: what it takes at most, if no picture is in two rows.
        limit: `--vision_cache_gb` in bytes.
        half: whether features are stored in 16 bits.
        saved: the share of a step's required operations that is not computed once all features are stored; None if no
            row could be read again.
    """

    bytes: int
    limit: int
    half: bool
    saved: float | None

    def as_json(self) -> dict[str, Any]:
        """All fields, and whether everything fits."""
        return {**asdict(self), "fits": self.bytes <= self.limit}

    def as_line(self) -> str:
        """The forecast as a line for the user."""
        size = f"at most {self.bytes / GB:.3g} GB in {'16' if self.half else '32'} bits"
        if self.bytes > self.limit:
            size += (
                f", more than --vision_cache_gb {self.limit / GB:g}: about {self.limit / self.bytes:.0%} of them are "
                "stored. Raise it, or lower --image_max_pixels"
            )
        if self.saved is None:
            return f"vision cache: {size}"
        share = self.saved * min(1.0, self.limit / max(1, self.bytes))
        return f"vision cache: {size}; from epoch 2 on a step needs {share:.0%} fewer operations"


def feature_forecast(
    base: Base, args: PlanFlags | Any, rows: Sequence[MeasuredRows], *, half: bool
) -> FeatureForecast | None:
    """Forecast the cache of a run; None if the run has none.

    Args:
        base: the opened base.
        args: the training flags.
        rows: to train on, and to evaluate on.
        half: whether the run computes in 16 bits.
    """
    if not args.cache_vision_features:
        return None
    return FeatureForecast(
        bytes=feature_bytes(base, rows, half=half),
        limit=int(args.vision_cache_gb * GB),
        half=half,
        saved=_saved(base, rows[0]),
    )


def feature_bytes(base: Base, rows: Sequence[MeasuredRows], *, half: bool) -> int:
    """Return the bytes of the features of all rows, if no picture is in two rows. The arguments are those above."""
    vision = base.sizes.vision
    merged = sum(_patches(some) for some in rows) // vision.cell
    return merged * vision.out * vision.mergers * (2 if half else 4)


def _patches(measured: MeasuredRows) -> int:
    """Patches of all rows, each row once. Of the samples that a row is split into, the largest has all its media."""
    samples: Any = measured.rows.samples  # a RowIndex
    most: dict[tuple[int, int], int] = {}
    for place, patches in enumerate(np.asarray(measured.costs.patches).tolist()):
        row = int(samples.file_of[place]), int(samples.row_of[place])
        most[row] = max(patches, most.get(row, 0))
    return sum(most.values())


def _saved(base: Base, measured: MeasuredRows) -> float | None:
    """The share of tower and merger in the required operations of some rows, evenly spread over the data."""
    vision, everything = 0.0, 0.0
    for place in np.linspace(0, len(measured.costs) - 1, min(SAMPLED, len(measured.costs))).astype(int).tolist():
        cost = measured.costs[place]
        try:
            grids = [measure(part, base.recipe) for part in measured.rows.samples[place].media] if cost.patches else []
        except (DataError, MediaError):  # a file has changed in the meantime
            continue
        parts = required_flops(
            base.sizes,
            base.towers,
            lengths=[cost.tokens],
            vision_lengths=[grid.h * grid.w for grid in grids for _ in range(grid.t)],
            supervised=cost.supervised,
        )
        vision += parts["vision"].total + parts["merger"].total
        everything += total(parts)
    return vision / everything if everything else None
