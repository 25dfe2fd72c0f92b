"""How many cores torch computes with, where training is on the CPU."""

from __future__ import annotations

import os


def share_cores() -> None:
    """Leave half of the cores to the processes that load rows, unless OMP_NUM_THREADS says otherwise.

    Training takes turns with them, and threads that wait for each other on a busy machine cost more than they bring.
    """
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // 2))
