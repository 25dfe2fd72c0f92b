"""Set how many cores torch uses when it trains on the CPU."""

from __future__ import annotations

import os


def share_cores() -> None:
    """Leave half of the cores to the loader processes, unless OMP_NUM_THREADS is set.

    On a busy machine torch's threads wait for each other, and more threads make training slower.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
