"""Packs: what fits, how full they are, how often each row appears, and how balanced they are."""

from __future__ import annotations

import random
from itertools import chain

import numpy as np
import pytest

from vlft.data.costs.packing import Budget, pack, split
from vlft.data.order import PackOrder
from vlft.data.sample import Cost

BUDGET = Budget(tokens=16384, patches=65536)


def long_tailed(count: int, *, seed: int = 0) -> list[Cost]:
    """Rows of 1 to 12 pictures and 20 to 3,000 answer tokens."""
    rng = random.Random(seed)
    costs = []
    for _ in range(count):
        pictures = sum(rng.randint(64, 1280) for _ in range(rng.randint(1, 12)))
        answer = min(3000, max(20, int(rng.lognormvariate(5, 1.2))))
        costs.append(Cost(tokens=min(pictures + answer + 40, 16384), supervised=answer, patches=4 * pictures))
    return costs


@pytest.mark.parametrize("count", [1, 7, 500, 5000])
@pytest.mark.parametrize("block", [16, 2048])
def test_every_row_once_and_no_pack_over_its_budget(count, block):
    costs = long_tailed(count)
    packs = pack(costs, BUDGET, seed=1, block=block)
    assert sorted(chain.from_iterable(one.rows for one in packs)) == list(range(count))
    for one in packs:
        assert one.tokens == sum(costs[row].tokens for row in one.rows) <= BUDGET.tokens
        assert one.patches == sum(costs[row].patches for row in one.rows) <= BUDGET.patches


def test_packs_are_full():
    for count, least in ((300, 0.97), (5000, 0.99)):
        packs = pack(long_tailed(count), BUDGET, seed=3)
        assert sum(one.tokens for one in packs) / len(packs) / BUDGET.tokens >= least


def test_the_second_budget_binds():
    costs = [cost for cost in long_tailed(1000) if cost.patches <= 45000]
    tight = Budget(tokens=16384, patches=45000)
    packs = pack(costs, tight, seed=1)
    assert max(one.patches for one in packs) <= 45000
    assert sum(one.patches for one in packs) / len(packs) / 45000 >= 0.97


def test_a_row_over_the_budget():
    large = Cost(tokens=500, supervised=1, patches=30000)
    assert BUDGET.over(large) is None
    assert "500 tokens fit no pack, --pack_tokens is 400" in (Budget(tokens=400, patches=9).over(large) or "")
    assert "30,000 patches fit no pack, --pack_patches is 9" in (Budget(tokens=600, patches=9).over(large) or "")
    with pytest.raises(ValueError, match="row 0"):
        pack([large], Budget(tokens=400, patches=9), seed=1)


def test_packs_depend_on_the_seed_alone():
    costs = long_tailed(400)
    assert pack(costs, BUDGET, seed=1) == pack(costs, BUDGET, seed=1)
    assert pack(costs, BUDGET, seed=1) != pack(costs, BUDGET, seed=2)


def test_a_budget_for_few_rows():
    costs = long_tailed(2000)
    assert BUDGET.for_rows(0.5, costs).tokens == max(cost.tokens for cost in costs)
    costs = [cost for cost in costs if cost.tokens < 6000]
    small = BUDGET.for_rows(2, costs)
    packs = pack(costs, small, seed=1)
    assert max(cost.tokens for cost in costs) <= small.tokens < BUDGET.tokens
    assert len(costs) / len(packs) == pytest.approx(2, rel=0.1)
    assert BUDGET.for_rows(1000, costs) == BUDGET


def test_split_halves_the_largest():
    costs = [Cost(tokens=1, supervised=1, patches=0)] * 10
    packs = split(pack(costs, BUDGET, seed=1), costs, 4)
    assert sorted(len(one.rows) for one in packs) == [2, 2, 3, 3]
    assert sorted(chain.from_iterable(one.rows for one in packs)) == list(range(10))
    assert len(split(packs, costs, 99)) == 10


# ---- order


def of_steps(order: PackOrder, epoch: int) -> list[list[list[int]]]:
    """Per optimizer step the packs of all ranks and micro-batches."""
    ranks = [list(order.micro_batches(epoch, rank)) for rank in range(order.world)]
    a = order.accumulation
    return [[rows for rank in ranks for rows in rank[step * a : (step + 1) * a]] for step in range(order.steps)]


CUTS = [(1, 8), (2, 4), (4, 2), (8, 1), (3, 3)]  # world, accumulation


@pytest.mark.parametrize("world", [1, 2, 4, 8, 3])
@pytest.mark.parametrize("rows", [3, 60, 1500])
def test_every_epoch_trains_every_row_once_on_every_split(rows, world):
    order = PackOrder(costs=tuple(long_tailed(rows)), budget=BUDGET, packs_per_step=8, world=world)
    whole = PackOrder(costs=tuple(long_tailed(rows)), budget=BUDGET, packs_per_step=8)
    for epoch in range(4):
        steps = of_steps(order, epoch)
        assert sorted(chain.from_iterable(chain.from_iterable(steps))) == list(range(rows))
        assert all(any(step) for step in steps), "a step without a row"
        for rank in range(world):
            assert len(list(order.micro_batches(epoch, rank))) == order.steps * order.accumulation
        for one, other in zip(steps, of_steps(whole, epoch), strict=True):
            assert sorted(map(sorted, filter(None, one))) == sorted(map(sorted, filter(None, other)))


def test_epochs_have_equally_many_steps_and_other_packs():
    order = PackOrder(costs=tuple(long_tailed(900)), budget=BUDGET, packs_per_step=4)
    epochs = [of_steps(order, epoch) for epoch in range(6)]
    assert {len(steps) for steps in epochs} == {order.steps}
    sets = [{frozenset(rows) for step in steps for rows in step} for steps in epochs]
    assert len(sets[0] & sets[1]) < 0.1 * len(sets[0])


def test_length_does_not_go_with_time():
    costs = long_tailed(4000)
    order = PackOrder(costs=tuple(costs), budget=BUDGET, packs_per_step=4)
    means = [
        np.mean([costs[row].tokens for rows in step for row in rows])
        for epoch in (0, 1)
        for step in of_steps(order, epoch)
    ]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15


def test_ranks_are_balanced():
    costs = long_tailed(4000)
    order = PackOrder(costs=tuple(costs), budget=BUDGET, packs_per_step=32, world=8)
    per_rank = np.zeros((2, 8, order.steps))
    for rank in range(8):
        for place, rows in enumerate(order.micro_batches(0, rank)):
            per_rank[0, rank, place // 4] += sum(costs[row].tokens for row in rows)
            per_rank[1, rank, place // 4] += sum(costs[row].patches for row in rows)
    for of_ranks in per_rank[:, :, :-1]:  # the last step may not have enough for all
        slowest = of_ranks.max(axis=0).sum() / of_ranks.mean(axis=0).sum()
        assert slowest < 1.02
