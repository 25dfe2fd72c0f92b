"""Early stopping: training ends when evaluations no longer improve. A resumed run counts on where it left off."""

from __future__ import annotations

from typing import Any

from transformers import EarlyStoppingCallback

from vlft.train.callbacks import AtTheEnd


class EarlyStopping(EarlyStoppingCallback):
    """The early stopping of transformers, whose count survives a resume.

    transformers restores it only with `restore_callback_states_from_checkpoint`, which would also restore settings that
    the flags of the resumed run may change.

    Args:
        patience: evaluations without a better value after which training stops.
        threshold: least difference that counts as better.
    """

    def __init__(self, patience: int, threshold: float) -> None:
        super().__init__(early_stopping_patience=patience, early_stopping_threshold=threshold)

    @property
    def stopped(self) -> bool:
        """Whether as many evaluations in a row were not better."""
        return self.early_stopping_patience_counter >= self.early_stopping_patience

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the count.

        Raises:
            AtTheEnd: the run was killed after the evaluation that stopped it.
        """
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self.early_stopping_patience_counter = int(saved["attributes"]["early_stopping_patience_counter"])
        if self.stopped:
            raise AtTheEnd
