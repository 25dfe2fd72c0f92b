"""Answers that share one prompt: a branch row is the plain rows of its answers, in loss and in every gradient."""

from __future__ import annotations

import pytest
import torch
from branch_rows import asked, branch_batch, copied_batch, plain_batch
from models import build, gradients

from vlft.families import FAMILIES
from vlft.model import forward

#: Tokens of the other answers: shorter, longer, and one token.
SIZES = (3, 17, 1, 29, 8, 5)


def weighted(model, batch):
    """A loss in which every token of every answer has its own weight, and its gradients."""
    model.zero_grad()
    taken = {key: batch[key] for key in (*forward.FORWARD_KEYS, *forward.OPTIONAL_KEYS) if key in batch}
    log_probs_K = model(**taken, return_log_probs=True).log_probs
    weights_K = torch.randn(len(log_probs_K), generator=torch.Generator().manual_seed(3))
    loss = (log_probs_K * weights_K).sum()
    loss.backward()
    return log_probs_K.detach(), gradients(model)


def difference(found, wanted):
    """The largest difference, as a share of the largest value."""
    return float((found - wanted).abs().max() / wanted.abs().max())


def assert_same(found, wanted):
    assert difference(found[0], wanted[0]) < 1e-5
    assert set(found[1]) == set(wanted[1])
    shares = {name: difference(found[1][name], gradient) for name, gradient in wanted[1].items()}
    worst = max(shares, key=shares.get)
    assert shares[worst] < 1e-5, (worst, shares[worst])


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_branch_row_is_the_plain_rows_of_its_answers(stock_of, model_type):
    stock, family = stock_of(model_type), FAMILIES[model_type]
    rows = asked([stock.rows[kind].flat for kind in ("picture", "mixed", "text", "pictures")], SIZES)
    plain, shared = plain_batch(rows, family), branch_batch(rows, family)
    assert shared["input_ids"].shape[1] < plain["input_ids"].shape[1]
    model = build(stock.base, "vision-lora", flat=True, family=family, loaded=stock.model)
    wanted = weighted(model, plain)
    assert any(".visual." in name for name in wanted[1])
    assert_same(weighted(model, shared), wanted)
