"""Training objectives: how a row becomes an item, items become a batch, and a batch becomes a loss.

`base` defines the interface; every other module is one objective. `vlft.setup.objective` chooses one, and the trainer
uses it through `base.Objective`. This room is above data and model, which do not import each other.
"""

from vlft.objectives.base import Loss, Mean, Objective, Sums

__all__ = ["Loss", "Mean", "Objective", "Sums"]
