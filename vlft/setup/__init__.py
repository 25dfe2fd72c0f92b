"""What every verb opens from the flags: the base's folder, config and processor, and the user's rows.

Above data/, model/ and checkpoint, which do not know each other; below the features, which do not either.
"""

from vlft.setup.base import Base, open_base, stock_probe
from vlft.setup.objective import objective_of
from vlft.setup.rows import (
    SHOWN_BAD_ROWS,
    Drawn,
    MeasuredRows,
    measure_rows,
    open_rows,
    open_some,
    trainable_rows,
    training_rows,
)

__all__ = [
    "SHOWN_BAD_ROWS",
    "Base",
    "Drawn",
    "MeasuredRows",
    "measure_rows",
    "objective_of",
    "open_base",
    "open_rows",
    "open_some",
    "stock_probe",
    "trainable_rows",
    "training_rows",
]
