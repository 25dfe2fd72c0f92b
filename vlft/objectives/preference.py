"""Preference tuning: DPO, ORPO and SimPO on rows with several answers to one prompt.

A micro-batch has each prompt and its pictures once, and all answers beside each other (`vlft.data.layout`). One forward
returns the log-probability of every trained token; `vlft.objectives.preference_losses` compares their sums.

The reference of DPO is the model at the start of the run: `vlft.train.reference` computes its values once, or
the objective itself in every step, with the adapter switched off.

Letters: those of `vlft.data.collate`; B preference rows with n answers each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from vlft.config.preference import PreferenceFlags, beta_of
from vlft.data.collate import Batch, Collator
from vlft.data.encode import DecodedRow, Encoder
from vlft.data.sample import EncodedSample, Sample
from vlft.errors import BadRow, DataError
from vlft.objectives import preference_losses as losses
from vlft.objectives.base import Loss, Mean, Objective
from vlft.objectives.preference_losses import Compared

#: Row, as (file, index) -> log-probability of each of its answers under the reference, the chosen one first.
References = dict[tuple[str, int], tuple[float, ...]]
#: Sums, counts and values of the reference, each [B, n] -> loss and what is logged of each row.
Comparison = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Compared]


class Preference(Objective):
    """Prefer the chosen answer of each row. Each row has the same weight, whatever its length and micro-batch.

    Args:
        encoder: turns rows into tokens and pixels, with the run's settings.
        collator: puts encoded samples into a flat batch.
        method: "dpo", "orpo" or "simpo".
        flags: their settings.

    Attributes:
        references: of all rows, if the reference is cached. Filled in place before the first batch is loaded, so that
            copies of the objective have them too.
    """

    unit: ClassVar[str] = "rows"
    statistics: ClassVar[tuple[str, ...]] = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    )
    tensors: ClassVar[tuple[str, ...]] = (*Objective.tensors, "answers")

    def __init__(self, *, encoder: Encoder, collator: Collator, method: str, flags: PreferenceFlags) -> None:
        super().__init__(encoder=encoder, collator=collator)
        self.compare = comparison_of(method, flags)
        self.reference = flags.reference if method == "dpo" else "none"
        self.references: References = {}

    def encode(self, sample: Sample, decoded: DecodedRow | None = None) -> EncodedSample:
        """Encode a row, with the values of its reference if they are known.

        Raises:
            DataError: the row cannot be trained on, or could not be when the reference was computed.
        """
        encoded = super().encode(sample, decoded)
        if not self.references:
            return encoded
        if (values := self.references.get((sample.file, sample.index))) is None:
            why = "the reference was computed without this row, which could not be decoded then. Start another run"
            raise DataError(BadRow(file=sample.file, index=sample.index, id=sample.id, field="row", reason=why))
        return replace(encoded, reference=values)

    def weight(self, batch: Batch) -> int:
        """Preference rows."""
        return len(batch["rows"])

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        """The sum of the losses of all rows.

        Raises:
            ValueError: the reference is cached, and `references` is empty.
        """
        sums_A, counts_A = self.sums(model, batch)
        if sums_A is None:
            return Loss(counts_A.sum(), 0.0)
        reference_A = self._reference(model, batch, sums_A)
        groups = _by_number(batch["answers"]["per_sample"], sums_A, counts_A, reference_A)
        compared = [(self.compare(*group), group[0].detach()) for group in groups]
        rows = float(self.weight(batch))
        # In the order of `statistics`.
        values = [
            torch.stack([value.sum() for value in (*one[1:], sums_Bn[:, 0], sums_Bn[:, 1:].mean(1))])
            for one, sums_Bn in compared
        ]
        named = zip(self.statistics, sum(values[1:], values[0]).unbind(), strict=True)
        total = sum((one.sum for one, _ in compared[1:]), compared[0][0].sum)
        return Loss(total, rows, {name: Mean(value, rows) for name, value in named})

    def sums(self, model: torch.nn.Module, batch: Batch) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Log-probabilities of all answers of a micro-batch.

        Returns:
            sums_A: float32 [A]; None for a micro-batch without rows.
            counts_A: int64 [A], trained tokens; without rows the log-probabilities, float32 [0], from the model.
        """
        log_probs_K = self.log_probs(model, batch)
        if "answers" not in batch:
            return None, log_probs_K
        counts_A = batch["answers"]["bounds"].diff()
        # unsafe=True, because checking the lengths would read them from the device.
        return torch.segment_reduce(log_probs_K, "sum", lengths=counts_A, initial=0, unsafe=True), counts_A

    def _reference(self, model: torch.nn.Module, batch: Batch, sums_A: torch.Tensor) -> torch.Tensor:
        if self.reference == "live":
            return _without_adapter(model, lambda: self.sums(model, batch)[0])
        if self.reference == "none":
            return torch.zeros_like(sums_A)
        if "reference" not in batch["answers"]:
            raise ValueError("the values of the reference are not set: Preference.references")
        return batch["answers"]["reference"]


def comparison_of(method: str, flags: PreferenceFlags) -> Comparison:
    """The loss of a method with the settings of its flags."""
    beta, smoothing = beta_of(method, flags), flags.label_smoothing
    if method == "orpo":
        return lambda sums, counts, _: losses.orpo(sums, counts, weight=flags.orpo_lambda)
    if method == "simpo":
        gamma = flags.simpo_gamma
        return lambda sums, counts, _: losses.simpo(sums, counts, beta=beta, gamma=gamma, label_smoothing=smoothing)

    def dpo(sums_Bn: torch.Tensor, counts_Bn: torch.Tensor, reference_Bn: torch.Tensor) -> Compared:
        if flags.dpo_loss == "sigmoid":
            found = losses.sigmoid(sums_Bn, counts_Bn, reference_Bn, beta=beta, label_smoothing=smoothing)
        else:
            found = {"ipo": losses.ipo, "hinge": losses.hinge}[flags.dpo_loss](
                sums_Bn, counts_Bn, reference_Bn, beta=beta
            )
        if not flags.rpo_alpha:
            return found
        return found._replace(sum=found.sum + flags.rpo_alpha * losses.rpo(sums_Bn, counts_Bn))

    return dpo


def _by_number(per_sample: Sequence[int], *values_A: torch.Tensor) -> Iterable[tuple[torch.Tensor, ...]]:
    """Values of answers as [B, n], one group for each number of answers."""
    if len(set(per_sample)) == 1:
        return [tuple(value_A.unflatten(0, (len(per_sample), -1)) for value_A in values_A)]
    parts = [value_A.split(list(per_sample)) for value_A in values_A]
    return [
        tuple(torch.stack([one for one, n in zip(part, per_sample, strict=True) if n == number]) for part in parts)
        for number in sorted(set(per_sample))
    ]


def _without_adapter(model: torch.nn.Module, compute: Callable[[], Any]) -> torch.Tensor:
    """Compute something with the adapter switched off, without gradients."""
    adapted: Any = model
    while not hasattr(adapted, "disable_adapter"):
        adapted = adapted.module  # of DDP and DeepSpeed
    with torch.no_grad(), adapted.disable_adapter():
        return compute()
