"""Training objectives: how a row becomes an item, how items become a batch, and how a batch becomes a loss.

`base` defines the interface, and `sft` is the one objective so far. `vlft.setup.objective_of` chooses the objective of
a run; the trainer depends only on `base.Objective`. This package uses data and model, which do not import each other.
"""

from vlft.objectives.base import Loss, Mean, Objective, Sums
from vlft.objectives.sft import Sft

__all__ = ["Loss", "Mean", "Objective", "Sft", "Sums"]
