"""What preference rows cost: their segments of attention, and the pass that computes their reference.

Neighbours: `vlft.data.layout` places the rows of a batch; `vlft.setup.typical` and `vlft.plan` ask. Numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlft.data.costs.columns import Costs
from vlft.data.sample import Cost
from vlft.families import Sizes
from vlft.model.flops import required_flops
from vlft.model.towers import Towers
from vlft.text import counted

_SAMPLED = 256  # rows, for the share of the reference


@dataclass(frozen=True, kw_only=True)
class PairCounts:
    """Counts of preference rows.

    Attributes:
        rows: their number.
        answers: chosen and rejected answers.
        prompt: tokens of all prompts, each once.
        chosen: tokens of all chosen answers.
        rejected: tokens of all rejected answers.
        shared: whether the answers of a row share the tokens of its prompt; else each has a copy of them.
        reference: operations of a pass without gradients, as a share of those of training on the same rows.
    """

    rows: int
    answers: int
    prompt: int
    chosen: int
    rejected: int
    shared: bool
    reference: float

    def as_json(self) -> dict[str, Any]:
        """The "pairs" of `vlft plan --json`."""
        return {
            "rows": self.rows,
            "answers": self.answers,
            "prompt_tokens": self.prompt,
            "chosen_tokens": self.chosen,
            "rejected_tokens": self.rejected,
            "shared_prompts": self.shared,
            "reference_share": self.reference,
        }

    def as_line(self) -> str:
        """The counts as a line of text."""
        prompts = "in the row once" if self.shared else "in the row once for each answer"
        return (
            f"pairs: {counted(self.rows, 'row')} with {self.answers:,} answers; tokens of prompts {self.prompt:,} "
            f"({prompts}), of chosen answers {self.chosen:,}, of rejected {self.rejected:,}"
        )


def segments_of(cost: Cost) -> list[tuple[int, int]]:
    """Return the number of queries and of keys of each segment of attention of a row in a batch."""
    if not cost.branches:
        return [(cost.tokens, cost.tokens)]
    prompt, chosen, *rejected = cost.branches
    whole = [prompt + answer for answer in (chosen, *rejected)]
    if cost.tokens == sum(whole):  # each answer has a copy of the prompt
        return [(tokens, tokens) for tokens in whole]
    return [(whole[0], whole[0]), *zip(rejected, whole[1:], strict=True)]


def count_pairs(costs: Costs, sizes: Sizes, towers: Towers, *, shared: bool) -> PairCounts | None:
    """Count the parts of preference rows; None if there are none.

    Args:
        costs: of all rows.
        sizes: of the model.
        towers: what trains.
        shared: whether the answers of a row share the tokens of its prompt.
    """
    if not (parts := costs.branches):
        return None
    prompt, chosen, *rejected = (int(part_R[part_R >= 0].sum()) for part_R in parts)
    return PairCounts(
        rows=int((parts[0] >= 0).sum()),
        answers=int(sum((part_R >= 0).sum() for part_R in parts[1:])),
        prompt=prompt,
        chosen=chosen,
        rejected=sum(rejected),
        shared=shared,
        reference=_forward_share([costs[int(i)] for i in _some(len(costs))], sizes, towers),
    )


def _some(rows: int) -> np.ndarray:
    """Indices of some rows, spread evenly."""
    return np.unique(np.linspace(0, rows - 1, min(rows, _SAMPLED)).astype(int))


def _forward_share(costs: Sequence[Cost], sizes: Sizes, towers: Towers) -> float:
    """The forward's share of the operations of training on some rows."""
    segments = [segment for cost in costs for segment in segments_of(cost)]
    parts = required_flops(
        sizes,
        towers,
        lengths=[queries for queries, _ in segments],
        vision_lengths=[cost.patches for cost in costs if cost.patches],
        supervised=sum(cost.supervised for cost in costs),
        key_lengths=[keys for _, keys in segments],
    )
    return sum(part.forward for part in parts.values()) / sum(part.total for part in parts.values())
