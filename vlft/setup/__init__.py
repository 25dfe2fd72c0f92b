"""Open what every verb needs from the flags: the base's folder, config and processor, and the user's rows.

This package uses data, model and checkpoint, which do not import each other. The verbs use it, and do not import each
other either.
"""

from vlft.setup.base import Base, open_base, remarks_on_pixels, start_of, stock_probe
from vlft.setup.held_out import rows_of_run
from vlft.setup.rows import (
    SHOWN_BAD_ROWS,
    Drawn,
    MeasuredRows,
    measure_rows,
    open_rows,
    open_some,
    samples_line,
    split_line,
    trainable_rows,
    training_rows,
)

__all__ = [
    "SHOWN_BAD_ROWS",
    "Base",
    "Drawn",
    "MeasuredRows",
    "measure_rows",
    "open_base",
    "open_rows",
    "open_some",
    "remarks_on_pixels",
    "rows_of_run",
    "samples_line",
    "split_line",
    "start_of",
    "stock_probe",
    "trainable_rows",
    "training_rows",
]
