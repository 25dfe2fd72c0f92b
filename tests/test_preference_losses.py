"""The losses of preference rows: against hand values in float64, and against figures of TRL."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vlft.objectives import preference_losses as preference

#: Three rows with a chosen and a rejected answer.
SUMS = torch.tensor([[-12.0, -9.5], [-3.25, -20.0], [-40.0, -41.0]])
REFERENCE = torch.tensor([[-12.5, -9.0], [-4.0, -18.0], [-40.5, -40.0]])
COUNTS = torch.tensor([[6, 5], [4, 16], [20, 10]])
BETA, SMOOTHING, GAMMA, WEIGHT = 0.5, 0.1, 0.3, 0.25


def sigma(x):
    return 1 / (1 + np.exp(-x))


def by_hand(name: str) -> list[float]:
    """The loss of each row, one row at a time, in float64."""
    found = []
    for z, r, n in zip(SUMS.double().numpy(), REFERENCE.double().numpy(), COUNTS.numpy(), strict=True):
        d, m = z - r, z / n
        u = BETA * (d[0] - d[1])
        odds = np.exp(m) / (1 - np.exp(m))
        found.append({
            "sigmoid": -np.log(sigma(u)),
            "smoothed": -(1 - SMOOTHING) * np.log(sigma(u)) - SMOOTHING * np.log(1 - sigma(u)),
            "hinge": max(0.0, 1 - u),
            "ipo": (d[0] / n[0] - d[1] / n[1] - 1 / (2 * BETA)) ** 2,
            "orpo": -m[0] - WEIGHT * np.log(sigma(np.log(odds[0] / odds[1]))),
            "simpo": -np.log(sigma(BETA * (m[0] - m[1]) - GAMMA)),
        }[name])  # fmt: skip
    return found


def ours(name: str, sums, counts, reference) -> preference.Compared:
    return {
        "sigmoid": lambda: preference.sigmoid(sums, counts, reference, beta=BETA),
        "smoothed": lambda: preference.sigmoid(sums, counts, reference, beta=BETA, label_smoothing=SMOOTHING),
        "hinge": lambda: preference.hinge(sums, counts, reference, beta=BETA),
        "ipo": lambda: preference.ipo(sums, counts, reference, beta=BETA),
        "orpo": lambda: preference.orpo(sums, counts, weight=WEIGHT),
        "simpo": lambda: preference.simpo(sums, counts, beta=BETA, gamma=GAMMA),
    }[name]()


NAMES = ("sigmoid", "smoothed", "hinge", "ipo", "orpo", "simpo")


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_of_rows_is_the_sum_of_their_formulas(name):
    wanted = by_hand(name)
    assert ours(name, SUMS.double(), COUNTS, REFERENCE.double()).sum.item() == pytest.approx(sum(wanted), rel=1e-12)
    single = ours(name, SUMS, COUNTS, REFERENCE).sum
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(sum(wanted), rel=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_formula(name):
    leaf = SUMS.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: ours(name, z, COUNTS, REFERENCE.double()).sum, (leaf,))


@pytest.mark.parametrize("name", NAMES)
def test_several_rejected_answers_are_compared_one_by_one(name):
    """The loss is the mean of the pairs; so are the rewards of the rejected answers and the accuracy."""
    sums, counts, reference = (torch.cat([one, one[:, :1] + more, one[:, 1:]], 1)[:, [0, 1, 2]] for one, more in
                               ((SUMS, -2.5), (COUNTS, 3), (REFERENCE, 1.5)))  # fmt: skip
    found = ours(name, sums, counts, reference)
    pairs = [ours(name, *(one[:, [0, other]] for one in (sums, counts, reference))) for other in (1, 2)]
    for field in preference.Compared._fields:
        wanted = (getattr(pairs[0], field) + getattr(pairs[1], field)) / 2
        torch.testing.assert_close(getattr(found, field), wanted, msg=field)


def test_what_is_logged_of_each_row():
    found = preference.sigmoid(SUMS, COUNTS, REFERENCE, beta=BETA)
    assert found.chosen.tolist() == [0.25, 0.375, 0.25]
    assert found.rejected.tolist() == [-0.25, -1.0, -0.5]
    assert found.margin.tolist() == [0.5, 1.375, 0.75]
    assert found.accuracy.tolist() == [1, 1, 1]
    swapped = preference.sigmoid(*(one.flip(1) for one in (SUMS, COUNTS, REFERENCE)), beta=BETA)
    assert swapped.margin.tolist() == [-0.5, -1.375, -0.75]
    assert swapped.accuracy.tolist() == [0, 0, 0]
    assert not found.margin.requires_grad


def test_at_the_reference_the_loss_is_ln_2_and_the_margin_0():
    same = preference.sigmoid(SUMS, COUNTS, SUMS, beta=BETA)
    assert same.sum.item() == pytest.approx(3 * math.log(2), rel=1e-6)
    assert same.margin.tolist() == [0, 0, 0]
    assert same.accuracy.tolist() == [0, 0, 0]  # equal is not better


def test_the_sft_term_is_the_cross_entropy_per_token_of_each_row():
    rows = preference.rpo(SUMS, COUNTS)
    assert rows.item() == pytest.approx(12 / 6 + 3.25 / 4 + 40 / 20)
    split = sum(preference.rpo(SUMS[[i]], COUNTS[[i]]) for i in range(3))
    torch.testing.assert_close(split, rows)


@pytest.mark.parametrize("name", NAMES)
def test_no_rows_have_a_sum_of_0_with_a_gradient(name):
    """A process without rows takes part in the step."""
    leaf = torch.zeros(0, 2, requires_grad=True)
    found = ours(name, leaf * 1.0, torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    (found.sum + preference.rpo(leaf * 1.0, torch.zeros(0, 2, dtype=torch.int64))).backward()
    assert found.sum.item() == 0
    assert leaf.grad.shape == (0, 2)


def test_odds_of_a_certain_answer_are_finite():
    leaf = torch.tensor([[0.0, -1e-9], [-1e-4, -300.0]], requires_grad=True)
    found = preference.orpo(leaf, torch.ones(2, 2, dtype=torch.int64), weight=WEIGHT)
    found.sum.backward()
    assert torch.isfinite(found.sum)
    assert torch.isfinite(leaf.grad).all()


# ---- TRL


#: What TRL 1.16.0 computes for the three rows: `DPOTrainer._compute_loss` of a model that has these log-probabilities
#: (its "sft" is the SFT term), and the functions of its trainers for ORPO and CPO. Means over rows.
TRL = {
    "sigmoid": 0.3621204197406769,
    "hinge": 0.25000062584877014,
    "ipo": 0.6350755095481873,
    "sigmoid + sft": 2.203787088394165,
    "orpo": (2.0 + 0.8125 + 2.0 + 0.1882861703634262 + 0.10192536562681198 + 0.025564251467585564) / 3,
    "simpo": (0.8833821415901184 + 0.7345971465110779 + 0.38687101006507874) / 3,
    "simpo, smoothed": (0.8483821153640747 + 0.7264721393585205 + 0.4618709981441498) / 3,
}


def test_losses_and_rewards_are_those_of_trl():
    found = {name: ours(name, SUMS, COUNTS, REFERENCE) for name in NAMES if name in TRL}
    sums = {name: one.sum for name, one in found.items()}
    # TRL's term is the mean over tokens, so its rows count by their tokens.
    terms = [preference.rpo(SUMS[[i]], COUNTS[[i]]) * COUNTS[i, 0] for i in range(3)]
    sums["sigmoid + sft"] = sums["sigmoid"] + 3 * sum(terms) / COUNTS[:, 0].sum()
    smoothed = preference.simpo(SUMS, COUNTS, beta=BETA, gamma=GAMMA, label_smoothing=SMOOTHING)
    sums["simpo, smoothed"] = smoothed.sum
    assert {name: total.item() / 3 for name, total in sums.items()} == pytest.approx(TRL, rel=5e-6)
    for name in ("sigmoid", "hinge", "ipo"):  # "rewards/chosen", "rewards/rejected", "rewards/margins"
        means = [getattr(found[name], field).mean().item() for field in ("chosen", "rejected", "margin", "accuracy")]
        assert means == pytest.approx([0.2916666567, -0.5833327174, 0.8749993443, 1.0], rel=2e-6)
    assert found["orpo"].chosen.tolist() == pytest.approx([-0.5, -0.203125, -0.5])
    assert found["orpo"].rejected.tolist() == pytest.approx([-0.4749999940, -0.3125, -1.0249999762])
    assert found["simpo"].rejected.tolist() == pytest.approx([-0.9499999881, -0.625, -2.0499999523])
