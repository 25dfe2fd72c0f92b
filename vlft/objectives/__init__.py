"""What a run optimises: how a row becomes an item, items become a batch, and a batch becomes a loss.

`base` defines an objective, `sft` is the only one so far. `vlft.setup.objective_of` chooses one, and the trainer uses
it through `base.Objective`. This room stands above data and model, which do not import each other.
"""

from vlft.objectives.base import Loss, Mean, Objective, Sums
from vlft.objectives.sft import Sft

__all__ = ["Loss", "Mean", "Objective", "Sft", "Sums"]
