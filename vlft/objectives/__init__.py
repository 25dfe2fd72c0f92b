"""What a run optimises: how a row becomes an item, items a batch, and a batch a loss.

`base` says what an objective is, `sft` is the one there is. `vlft.setup.objective_of` chooses; the trainer knows only
`base.Objective`. Above data and model, which are strangers to each other.
"""

from vlft.objectives.base import Loss, Mean, Objective, Sums
from vlft.objectives.sft import Sft

__all__ = ["Loss", "Mean", "Objective", "Sft", "Sums"]
