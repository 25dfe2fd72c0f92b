"""Losses of preference rows as pure functions of what the answers of a row got: sums of log-probabilities, and lengths.

A row has n answers to one prompt, the chosen one first. With n > 2 the chosen answer is compared with each rejected
one, and the row's loss is the mean of these n - 1 comparisons. Every function returns the sum over rows, never the
mean: the trainer divides by the rows of the global step.

Letters: B rows, n answers of a row, M = n - 1 rejected answers. `sums_Bn` is log p(answer | prompt) of the model that
trains, `reference_Bn` the same of the reference, `counts_Bn` the trained tokens of each answer.

Sources: DPO https://arxiv.org/abs/2305.18290 and its label smoothing https://ericmitchell.ai/cdpo.pdf, IPO
https://arxiv.org/abs/2310.12036, hinge (SLiC) https://arxiv.org/abs/2305.10425, the SFT term (RPO)
https://arxiv.org/abs/2404.19733, ORPO https://arxiv.org/abs/2403.07691, SimPO https://arxiv.org/abs/2405.14734.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid, relu


class Compared(NamedTuple):
    """The loss of some rows, and what is logged of each row. Only `sum` has a gradient.

    Attributes:
        sum: [], over rows.
        chosen: [B], reward of the chosen answer.
        rejected: [B], mean reward of the rejected answers.
        margin: [B], `chosen - rejected`.
        accuracy: [B], share of the rejected answers with a lower reward than the chosen one.
    """

    sum: torch.Tensor
    chosen: torch.Tensor
    rejected: torch.Tensor
    margin: torch.Tensor
    accuracy: torch.Tensor


def sigmoid(
    sums_Bn: torch.Tensor,
    counts_Bn: torch.Tensor,
    reference_Bn: torch.Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Compared:
    """DPO: -log sigmoid(u) with u = beta (d_chosen - d_rejected), d = sums - reference.

    Args:
        sums_Bn: of the model, float32 or wider.
        counts_Bn: not used; all losses with a reference take the same arguments.
        reference_Bn: of the reference.
        beta: how strongly the model is kept near the reference.
        label_smoothing: probability that the two answers of a row are swapped: (1 - e) of the loss of u, and e of that
            of -u. It is the conservative form; "robust" of TRL is another one.
    """
    rewards_Bn = beta * (sums_Bn - reference_Bn)
    return _compared(_smoothed(_against(rewards_Bn), label_smoothing), rewards_Bn)


def ipo(sums_Bn: torch.Tensor, counts_Bn: torch.Tensor, reference_Bn: torch.Tensor, *, beta: float) -> Compared:
    """IPO: (d_chosen / |chosen| - d_rejected / |rejected| - 1 / (2 beta))^2, with d = sums - reference.

    The mean over the tokens of an answer is in TRL and LLaMA-Factory too; the paper has sums. The logged rewards are
    beta d, as those of `sigmoid`.
    """
    change_Bn = sums_Bn - reference_Bn
    losses_BM = (_against(_per_token(change_Bn, counts_Bn)) - 1 / (2 * beta)).square()
    return _compared(losses_BM, beta * change_Bn)


def hinge(sums_Bn: torch.Tensor, counts_Bn: torch.Tensor, reference_Bn: torch.Tensor, *, beta: float) -> Compared:
    """Hinge: max(0, 1 - u), with u as of `sigmoid`; `counts_Bn` is not used."""
    rewards_Bn = beta * (sums_Bn - reference_Bn)
    return _compared(relu(1 - _against(rewards_Bn)), rewards_Bn)


def orpo(sums_Bn: torch.Tensor, counts_Bn: torch.Tensor, *, weight: float) -> Compared:
    """ORPO: -m_chosen - weight log sigmoid(log-odds of chosen - log-odds of rejected); needs no reference.

    m is the mean log-probability of an answer's tokens, and log-odds are m - log(1 - exp m). The first term is that of
    the answer, as in the paper; TRL (1.16) also trains the prompt's tokens there. The logged rewards are weight m.

    Args:
        sums_Bn: of the model, float32 or wider.
        counts_Bn: trained tokens.
        weight: of the second term, lambda in the paper; TRL calls it beta.
    """
    mean_Bn = _per_token(sums_Bn, counts_Bn)
    losses_BM = -mean_Bn[:, :1] - weight * logsigmoid(_against(mean_Bn - _log1mexp(mean_Bn)))
    return _compared(losses_BM, weight * mean_Bn)


def simpo(
    sums_Bn: torch.Tensor, counts_Bn: torch.Tensor, *, beta: float, gamma: float, label_smoothing: float = 0.0
) -> Compared:
    """SimPO: -log sigmoid(beta (m_chosen - m_rejected) - gamma); needs no reference.

    m is the mean log-probability of an answer's tokens. The logged rewards are beta m.

    Args:
        sums_Bn: of the model, float32 or wider.
        counts_Bn: trained tokens.
        beta: scale of the rewards.
        gamma: by how much the chosen answer's reward should be higher.
        label_smoothing: as of `sigmoid`.
    """
    rewards_Bn = beta * _per_token(sums_Bn, counts_Bn)
    return _compared(_smoothed(_against(rewards_Bn) - gamma, label_smoothing), rewards_Bn)


def rpo(sums_Bn: torch.Tensor, counts_Bn: torch.Tensor) -> torch.Tensor:
    """The SFT term: the cross-entropy per token of each row's chosen answer. A loss adds it times `--rpo_alpha`.

    Each row has the same weight, as in the paper, so a step is the same whatever its micro-batches. The loss "sft" of
    TRL (1.16) is the mean over the tokens of a micro-batch, which is equal if that has one row.

    Args:
        sums_Bn: of the model.
        counts_Bn: trained tokens.

    Returns:
        [], the sum over rows.
    """
    return -_per_token(sums_Bn[:, 0], counts_Bn[:, 0]).sum()


def _compared(losses_BM: torch.Tensor, rewards_Bn: torch.Tensor) -> Compared:
    rewards_Bn = rewards_Bn.detach()
    chosen_B, rejected_BM = rewards_Bn[:, 0], rewards_Bn[:, 1:]
    rejected_B = rejected_BM.mean(1)
    return Compared(
        sum=losses_BM.mean(1).sum(),
        chosen=chosen_B,
        rejected=rejected_B,
        margin=chosen_B - rejected_B,
        accuracy=(chosen_B[:, None] > rejected_BM).to(rewards_Bn.dtype).mean(1),
    )


def _against(values_Bn: torch.Tensor) -> torch.Tensor:
    """[B, M]: the chosen answer's value minus that of each rejected answer."""
    return values_Bn[:, :1] - values_Bn[:, 1:]


def _smoothed(logits_BM: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    losses_BM = -(1 - label_smoothing) * logsigmoid(logits_BM)
    return losses_BM - label_smoothing * logsigmoid(-logits_BM) if label_smoothing else losses_BM


def _per_token(values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return values / counts.clamp(min=1).to(values.dtype)


def _log1mexp(values: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(values)) of negative values. 0, a probability that rounds to 1, counts as the next number below."""
    values = values.clamp(max=-torch.finfo(values.dtype).eps)
    near = values > -math.log(2)
    # Each form where it is exact (https://cran.r-project.org/package=Rmpfr, log1mexp). Both are computed, so the
    # argument of the other one is replaced where its gradient would be infinite.
    small = torch.log(-torch.expm1(torch.where(near, values, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near, -1.0, values)))
    return torch.where(near, small, large)
