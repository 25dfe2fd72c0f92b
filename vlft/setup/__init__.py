"""What every verb opens from the flags: the base's folder, config and processor, and the user's rows.

Above data/, model/ and checkpoint, which do not know each other; below the features, which do not either.
"""

from vlft.setup.base import Base, open_base, serve_as_trained, stock_probe
from vlft.setup.objective import collator_of, objective_of
from vlft.setup.rows import (
    SHOWN_BAD_ROWS,
    Drawn,
    MeasuredRows,
    columns_of,
    measure_rows,
    mix_of,
    open_rows,
    open_some,
    trainable_rows,
    training_files,
    training_rows,
)

__all__ = [
    "SHOWN_BAD_ROWS",
    "Base",
    "Drawn",
    "MeasuredRows",
    "collator_of",
    "columns_of",
    "measure_rows",
    "mix_of",
    "objective_of",
    "open_base",
    "open_rows",
    "open_some",
    "serve_as_trained",
    "stock_probe",
    "trainable_rows",
    "training_files",
    "training_rows",
]
