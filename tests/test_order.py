"""The order of training: which rank trains which rows in which step."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest

from vlft.data.order import RankBatches, RowOrder, spread


def steps(order: RowOrder, epoch: int = 0) -> list[list[list[int]]]:
    """Per optimizer step, the lists of all ranks and micro-batches."""
    ranks = [list(order.micro_batches(epoch, rank)) for rank in range(order.world)]
    a = order.accumulation
    return [[batch for rank in ranks for batch in rank[step * a : (step + 1) * a]] for step in range(order.steps)]


CUTS = [(1, 1), (1, 4), (2, 2), (4, 1), (3, 5)]  # world, accumulation


@pytest.mark.parametrize(("world", "accumulation"), CUTS)
@pytest.mark.parametrize("rows", [1, 7, 8, 30, 101])
def test_every_row_once_an_epoch_and_every_rank_equally_often(rows, world, accumulation):
    order = RowOrder(rows=rows, rows_per_step=8, world=world, accumulation=accumulation)
    seen = list(chain.from_iterable(chain.from_iterable(steps(order))))
    assert sorted(seen) == list(range(rows))
    for rank in range(world):
        assert len(list(order.micro_batches(0, rank))) == order.steps * accumulation


@pytest.mark.parametrize("cut", CUTS)
def test_a_step_takes_the_same_rows_however_it_is_cut(cut):
    world, accumulation = cut
    whole = RowOrder(rows=53, rows_per_step=8)
    parts = RowOrder(rows=53, rows_per_step=8, world=world, accumulation=accumulation)
    for epoch in (0, 3):
        for one, other in zip(steps(whole, epoch), steps(parts, epoch), strict=True):
            assert list(chain.from_iterable(one)) == list(chain.from_iterable(other))


def test_order_depends_on_seed_and_epoch():
    def of(seed: int, epoch: int) -> list[int]:
        return RowOrder(rows=50, rows_per_step=5, seed=seed).epoch(epoch)

    assert of(1, 0) == of(1, 0)
    assert of(1, 0) != of(2, 0)
    assert of(1, 0) != of(1, 1)


def test_order_is_the_one_earlier_versions_had():
    """A run that is resumed after an update must find its rows in the same order."""
    assert RowOrder(rows=10, rows_per_step=2, seed=42).epoch(1) == [4, 0, 9, 1, 2, 3, 7, 6, 5, 8]


def test_without_shuffling_rows_keep_their_order():
    assert RowOrder(rows=4, rows_per_step=2, shuffle=False).epoch(5) == [0, 1, 2, 3]


def test_spread_differs_by_one_at_most():
    parts = spread(list(range(10)), 4)
    assert [len(p) for p in parts] == [3, 3, 2, 2]
    assert all(a[-1] + 1 == b[0] for a, b in pairwise(parts))
    assert spread([1], 3) == [[1], [], []]


def test_the_sampler_follows_the_epoch_it_is_told():
    sampler = RankBatches(RowOrder(rows=9, rows_per_step=3), rank=0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert len(sampler) == len(first) == 3
    assert list(sampler) != first
