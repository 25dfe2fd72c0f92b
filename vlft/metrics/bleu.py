"""Corpus BLEU as sacrebleu computes it by default (its tokenizer 13a, its smoothing `exp`), but 0 to 1, not 0 to 100.

sacrebleu counts the words of a row. The figure of the summed counts is computed here for whole arrays, since a
bootstrap needs thousands of them. Tokenizer 13a does not divide Chinese and Japanese into words: use rouge_l for these.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from vlft.metrics.case import Case, Metric
from vlft.metrics.names import NAMES

ORDERS = 4  # the longest sequences of words that BLEU counts


@functools.cache
def _counter() -> Any:
    from sacrebleu.metrics.bleu import BLEU

    return BLEU(force=True)  # without a warning about text that is already tokenized


def _score(case: Case) -> tuple[float, ...]:
    """Return matches of 1 to 4 words, sequences of 1 to 4 words in the answer, words of it, words of the reference."""
    found = _counter().corpus_score([case.answer], [[reference] for reference in case.references])
    return tuple(map(float, (*found.counts, *found.totals, found.sys_len, found.ref_len)))


def _value(sums: np.ndarray) -> np.ndarray:
    """Sums [..., 10] -> BLEU [...]. The numbers are those of `_score`."""
    matches, totals = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    answer, reference = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        # Smoothing `exp`: the n-th order without a match counts as 1 / 2^n matches.
        missing = np.cumsum(matches == 0, axis=-1)
        precisions = np.where(matches == 0, 0.5**missing, matches) / totals
        figure = np.exp(np.log(precisions).mean(axis=-1)) * np.exp(np.minimum(0.0, 1.0 - reference / answer))
    # An order without any sequence makes BLEU 0, and so does an answer without any match.
    figure = np.where((totals > 0).all(axis=-1) & (matches > 0).any(axis=-1), figure, 0.0)
    return np.where(answer + reference > 0, figure, np.nan)


METRICS = (Metric(name="bleu", text=NAMES["bleu"], score=_score, value=_value, size=2 * ORDERS + 2),)
