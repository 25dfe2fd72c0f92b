"""Supervised fine-tuning: the mean cross-entropy of the trained tokens of a global step."""

from __future__ import annotations

import torch

from vlft.data.collate import Batch
from vlft.objectives.base import Loss, Objective


class Sft(Objective):
    """Cross-entropy per trained token. All trained tokens of a step have the same weight, in any row or micro-batch."""

    def weight(self, batch: Batch) -> int:
        """The number of trained tokens."""
        return batch["counts"]["supervised_tokens"]

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The sum of the cross-entropies of trained tokens, from the head's fused loss."""
        return Loss(self.cross_entropy(model, batch), self.weight(batch))
