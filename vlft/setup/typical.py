"""The typical micro-batch of a run, and the step on it whose time can be forecast without a GPU.

Neighbours: `vlft.model.forecast` forecasts the step; `vlft plan --gpu` and `vlft bench train` ask for it.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Sequence

import torch

from vlft.data.order import Order, PackOrder
from vlft.data.sample import Cost
from vlft.model.cards import CARDS, Card, reported
from vlft.model.forecast import Step
from vlft.model.traced import Delta
from vlft.model.tracing import Load, numbers_of
from vlft.setup.base import Base
from vlft.setup.pairs import segments_of

PICTURE_PATCHES = 2048  # of a picture of about 0.4 megapixels


def typical_rows(order: Order, costs: Sequence[Cost]) -> list[int]:
    """The rows of a micro-batch whose tokens a second stand for those of the run.

    With packing, the pack of the first epoch with the median number of tokens. Without, the rows around the one that
    has the median token: where most rows are short, most tokens may still be in long ones.
    """
    if isinstance(order, PackOrder):
        packs = sorted(order.first, key=lambda one: one.tokens)
        return list(packs[len(packs) // 2].rows)
    many = -(-order.rows_per_step // (order.world * order.accumulation))
    ranked = sorted(range(len(costs)), key=lambda i: costs[i].tokens)
    tokens = list(itertools.accumulate(costs[i].tokens for i in ranked))
    median = bisect.bisect_left(tokens, tokens[-1] / 2)
    start = min(max(0, median - many // 2), max(0, len(ranked) - many))
    return ranked[start : start + many]


def load_of(costs: Sequence[Cost]) -> Load:
    """The shapes of a micro-batch of these rows. Pictures are assumed to be of about the usual size."""
    segments = [segment for cost in costs for segment in segments_of(cost)]
    return Load(
        lengths=tuple(queries for queries, _ in segments),
        vision_lengths=tuple(patches for cost in costs for patches in _pictures(cost)),
        supervised=sum(cost.supervised for cost in costs),
        key_lengths=tuple(keys for _, keys in segments) if any(queries != keys for queries, keys in segments) else (),
    )


def _pictures(cost: Cost) -> list[int]:
    """Patches of the pictures of a row, which its cost has only in all: as if all had about the usual size."""
    many = max(1, round(cost.patches / PICTURE_PATCHES))
    return [cost.patches // many] * many if cost.patches else []


def card_of(name: str | None, *, device: str | None = None) -> Card | None:
    """The card whose speed is known.

    Args:
        name: a name in `CARDS`, or a size in GB; None: that of `device`.
        device: the name that CUDA reports; None without one.
    """
    card = CARDS.get(name.lower() if name is not None else reported(device) or "")
    return card if card is not None and card.known else None


def step_of(
    base: Base,
    load: Load,
    *,
    card: Card,
    half: torch.dtype | None,
    checkpointed: Collection[str],
    fused: bool,
    delta: Delta,
) -> Step | None:
    """The step of one process on a micro-batch, without communication; None without 16 bits, which cards' peaks mean.

    Args:
        base: the opened base, with what trains.
        load: the micro-batch.
        card: the GPU.
        half: what the run computes in.
        checkpointed: towers (vision, language) that recompute their blocks.
        fused: whether fused kernels run.
        delta: what computes the delta rule of gated delta nets.
    """
    if half is None:
        return None
    return Step(
        config=base.config,
        family=base.family,
        towers=base.towers,
        load=load,
        numbers=numbers_of(getattr(base.config, "dtype", None) or torch.float32, half, deepspeed=False),
        card=card,
        checkpointed=tuple(checkpointed),
        fused=fused,
        delta=delta,
    )
