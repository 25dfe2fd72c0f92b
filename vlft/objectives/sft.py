"""Supervised fine-tuning: the mean cross-entropy of the trained tokens of a global step."""

from __future__ import annotations

import torch

from vlft.data.collate import Batch
from vlft.objectives.base import Loss, Objective


class Sft(Objective):
    """Cross-entropy per trained token. Each token has the same weight, whatever its row and micro-batch."""

    def weight(self, batch: Batch) -> int:
        """Trained tokens."""
        return batch["counts"]["supervised_tokens"]

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The sum of their cross-entropies, from the head's fused loss."""
        return Loss(self.cross_entropy(model, batch), self.weight(batch))
