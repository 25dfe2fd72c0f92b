"""Losses of the head, computed a few hundred rows at a time: no tensor of tokens x vocabulary exists at any time.

With a vocabulary of 152k the logits of 16k tokens take 10 GB in float32, and plain cross-entropy holds them several
times. Here the head processes a chunk of rows, and the logits of a chunk are freed before the next ones are computed.

- `linear_cross_entropy`: the sum over all rows. The gradient of a sum needs nothing from later layers, so the gradients
  of a chunk are computed at once. (The idea is Liger's fused linear cross-entropy, arXiv 2410.10989. Unlike there, a
  frozen head costs no weight gradient, and evaluation uses the same code.)
- `linear_log_probs`: one log-probability per row, for losses other than their sum (preferences, weights, ratios). The
  gradient of a row is known only in the backward pass, which recomputes the logits of a chunk: one more matmul.
- `sum_segments`: sums of such rows per sample or answer.

Letters: K supervised rows (k of a chunk), C channels, V the vocabulary, S segments.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

#: Most elements of one chunk's float32 logits (256 MiB): enough rows to keep a GPU's matmul busy (441 rows at a
#: vocabulary of 152k).
CHUNK_ELEMENTS = 2**26
FEWEST_ROWS = 16


def chunk_rows(vocabulary: int) -> int:
    """Number of rows in one chunk."""
    return max(FEWEST_ROWS, CHUNK_ELEMENTS // vocabulary)


class Rows(NamedTuple):
    """Rows that replace those of the head's weight: ids int64 [n], each once, and their values [n, C]."""

    ids: torch.Tensor
    values: torch.Tensor


def bind(head: torch.nn.Module) -> None:
    """Make a linear head accept targets, and return a loss for them. Without targets it works as before.

    `head(hidden, targets)` is `linear_cross_entropy`, `head(hidden, targets, summed=False)` is `linear_log_probs`. Both
    also take `rows`.

    The loss is computed inside the head's own forward, because ZeRO-3 gathers the weight there.

    Args:
        head: an `nn.Linear` without bias; only this instance changes.

    Raises:
        TypeError: the head is of another kind, for which this loss is wrong.
    """
    if type(head) is not torch.nn.Linear or head.bias is not None:
        raise TypeError(f"the head is {head}, expected a Linear without bias")

    def forward(
        self: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        summed: bool = True,
        rows: Rows | None = None,
    ) -> torch.Tensor:
        if targets is None:
            return type(self).forward(self, hidden)
        return (linear_cross_entropy if summed else linear_log_probs)(hidden, self.weight, targets, rows)

    head.forward = types.MethodType(forward, head)


def linear_cross_entropy(
    hidden_KC: torch.Tensor, weight_VC: torch.Tensor, targets_K: torch.Tensor, rows: Rows | None = None
) -> torch.Tensor:
    """Sum of `cross_entropy(hidden @ weight.T, targets)`, whose gradients are computed in the forward pass.

    Matmuls run in autocast's dtype, or without autocast in the weight's; softmax, loss and the sum of weight gradients
    are float32. Only gradients that are needed are computed, and none under `no_grad`.

    Args:
        hidden_KC: [K, C]; K may be 0.
        weight_VC: [V, C].
        targets_K: int64 [K], each in [0, V).
        rows: replace those of the weight, which must then be frozen.

    Returns:
        loss: float32 [], differentiable once.
    """
    if torch.is_grad_enabled():
        return _LinearCrossEntropy.apply(hidden_KC, weight_VC, targets_K, *(rows or (None, None)))
    return _run(hidden_KC, weight_VC, targets_K, rows, for_hidden=False, for_weight=False)[0]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KC: torch.Tensor,
        weight_VC: torch.Tensor,
        targets_K: torch.Tensor,
        ids_n: torch.Tensor | None,
        values_nC: torch.Tensor | None,
    ) -> torch.Tensor:
        for_hidden, for_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[4]
        rows = None if ids_n is None or values_nC is None else Rows(ids_n, values_nC)
        loss, *gradients = _run(hidden_KC, weight_VC, targets_K, rows, for_hidden=for_hidden, for_weight=for_weight)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_KC.dtype, weight_VC.dtype if values_nC is None else values_nC.dtype
        ctx.of_rows = rows is not None
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_KC, weight_VC = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        if hidden_KC is not None:
            # In float32: rounding `upstream` itself to bf16 would scale every gradient by up to 0.4%.
            hidden_KC = (hidden_KC.float() * upstream).to(hidden_dtype)
        if weight_VC is not None:
            # In place, because a second copy may not fit into memory; autograd then refuses a second backward.
            weight_VC = weight_VC.mul_(upstream).to(weight_dtype)
        return (hidden_KC, None, None, None, weight_VC) if ctx.of_rows else (hidden_KC, weight_VC, None, None, None)


def _run(
    hidden_KC: torch.Tensor,
    weight_VC: torch.Tensor,
    targets_K: torch.Tensor,
    rows: Rows | None,
    *,
    for_hidden: bool,
    for_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Loss and its requested gradients: of hidden in the computing dtype, of the weight or its rows in float32."""
    device, dtype = hidden_KC.device.type, _computing_dtype(hidden_KC, weight_VC)
    loss = torch.zeros((), dtype=torch.float32, device=hidden_KC.device)
    grad_KC = torch.empty_like(hidden_KC, dtype=dtype) if for_hidden else None
    trained = (weight_VC if rows is None else rows.values) if for_weight else None
    grad_VC = None if trained is None else torch.zeros_like(trained, dtype=torch.float32)
    many = chunk_rows(len(weight_VC))
    with torch.autocast(device, enabled=False):
        hidden_KC, weight_VC = hidden_KC.to(dtype), weight_VC.to(dtype)
        rows = None if rows is None else Rows(rows.ids, rows.values.to(dtype))
        for start in range(0, len(hidden_KC), many):
            chunk = slice(start, start + many)
            grad_kC = None if grad_KC is None else grad_KC[chunk]
            _add_chunk(hidden_KC[chunk], weight_VC, targets_K[chunk, None], loss, grad_kC, grad_VC, rows)
    return loss, grad_KC, grad_VC


def _add_chunk(
    hidden_kC: torch.Tensor,
    weight_VC: torch.Tensor,
    targets_k1: torch.Tensor,
    loss: torch.Tensor,
    grad_kC: torch.Tensor | None,
    grad_VC: torch.Tensor | None,
    rows: Rows | None = None,
) -> None:
    """Add a chunk to the loss and the weight's gradient, and write the gradient of its rows.

    This is a separate function so that its logits are freed before those of the next chunk are computed.
    """
    log_kV = torch.log_softmax(_logits(hidden_kC, weight_VC, rows), dim=1, dtype=torch.float32)
    picked_k1 = log_kV.gather(1, targets_k1)
    loss -= picked_k1.sum()
    if grad_kC is None and grad_VC is None:
        return
    # The gradient of the logits: softmax, minus 1 at the target.
    slope_kV = log_kV.exp_().scatter_(1, targets_k1, picked_k1.expm1()).to(hidden_kC.dtype)
    _add_gradients(slope_kV, hidden_kC, weight_VC, grad_kC, grad_VC, rows)


def _logits(hidden_kC: torch.Tensor, weight_VC: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    logits_kV = hidden_kC @ weight_VC.T
    return logits_kV if rows is None else logits_kV.index_copy_(1, rows.ids, hidden_kC @ rows.values.T)


def _add_gradients(
    slope_kV: torch.Tensor,
    hidden_kC: torch.Tensor,
    weight_VC: torch.Tensor,
    grad_kC: torch.Tensor | None,
    grad_VC: torch.Tensor | None,
    rows: Rows | None,
) -> None:
    """Write the gradient of a chunk's rows, and add its part of the gradient of the weight, or of `rows`."""
    if rows is None:
        if grad_kC is not None:
            torch.mm(slope_kV, weight_VC, out=grad_kC)
        if grad_VC is not None:
            _add_weight_gradient(slope_kV, hidden_kC, grad_VC)
        return
    of_rows_kn = slope_kV.index_select(1, rows.ids)
    if grad_VC is not None:
        grad_VC += of_rows_kn.T @ hidden_kC
    if grad_kC is not None:
        torch.mm(slope_kV.index_fill_(1, rows.ids, 0), weight_VC, out=grad_kC)
        grad_kC += of_rows_kn @ rows.values


def _add_weight_gradient(slope_kV: torch.Tensor, hidden_kC: torch.Tensor, grad_VC: torch.Tensor) -> None:
    """Add a chunk's part of the gradient in slices of the vocabulary, without a second tensor of the weight's size."""
    words = max(1, CHUNK_ELEMENTS // hidden_kC.shape[1])
    for slope_kv, grad_vC in zip(slope_kV.split(words, dim=1), grad_VC.split(words), strict=True):
        grad_vC += slope_kv.T @ hidden_kC


def _computing_dtype(hidden_KC: torch.Tensor, weight_VC: torch.Tensor) -> torch.dtype:
    """The dtype of matmuls: autocast's, or without autocast the weight's."""
    device = hidden_KC.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VC.dtype


def linear_log_probs(
    hidden_KC: torch.Tensor, weight_VC: torch.Tensor, labels_K: torch.Tensor, rows: Rows | None = None
) -> torch.Tensor:
    """`log_softmax(hidden @ weight.T)` at the labels, computed a chunk of rows at a time.

    No tensor of the size of the logits is saved for the backward pass, which recomputes them chunk by chunk. Matmuls
    run in autocast's dtype, or without autocast in the weight's; softmax, result and the sum of weight gradients are
    float32 (float64 for a float64 weight). No gradient is computed for a frozen weight.

    Args:
        hidden_KC: [K, C]; K may be 0.
        weight_VC: [V, C].
        labels_K: int64 [K], each in [0, V).
        rows: replace those of the weight, which must then be frozen.

    Returns:
        log_probs_K: float32 [K], differentiable once.
    """
    if torch.is_grad_enabled():
        return _LinearLogProbs.apply(hidden_KC, weight_VC, labels_K, *(rows or (None, None)))
    return _log_probs(hidden_KC, weight_VC, labels_K, rows, _computing_dtype(hidden_KC, weight_VC))


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_KC: torch.Tensor,
        weight_VC: torch.Tensor,
        labels_K: torch.Tensor,
        ids_n: torch.Tensor | None,
        values_nC: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.dtype = _computing_dtype(hidden_KC, weight_VC)  # the backward pass runs outside autocast
        ctx.save_for_backward(hidden_KC, weight_VC, labels_K, ids_n, values_nC)
        rows = None if ids_n is None or values_nC is None else Rows(ids_n, values_nC)
        return _log_probs(hidden_KC, weight_VC, labels_K, rows, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_K: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_KC, weight_VC, labels_K, ids_n, values_nC = ctx.saved_tensors
        trained = weight_VC if values_nC is None else values_nC
        for_hidden, for_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1 if values_nC is None else 4]
        grad_KC = torch.empty_like(hidden_KC, dtype=ctx.dtype) if for_hidden else None
        wide = torch.promote_types(trained.dtype, torch.float32)
        grad_VC = torch.zeros_like(trained, dtype=wide) if for_weight else None
        computed_VC = weight_VC.to(ctx.dtype)
        rows = None if values_nC is None else Rows(ids_n, values_nC.to(ctx.dtype))
        with torch.autocast(hidden_KC.device.type, enabled=False):
            for chunk in _chunks(hidden_KC, weight_VC):
                hidden_kC = hidden_KC[chunk].to(ctx.dtype)
                slope_kV = _slope(hidden_kC, computed_VC, rows, labels_K[chunk, None], upstream_K[chunk, None])
                grad_kC = None if grad_KC is None else grad_KC[chunk]
                _add_gradients(slope_kV, hidden_kC, computed_VC, grad_kC, grad_VC, rows)
                del slope_kV  # before the next chunk's logits are computed
        of_hidden = None if grad_KC is None else grad_KC.to(hidden_KC.dtype)
        of_weight = None if grad_VC is None else grad_VC.to(trained.dtype)
        return (of_hidden, of_weight, None, None, None) if rows is None else (of_hidden, None, None, None, of_weight)


def _log_probs(
    hidden_KC: torch.Tensor, weight_VC: torch.Tensor, labels_K: torch.Tensor, rows: Rows | None, dtype: torch.dtype
) -> torch.Tensor:
    computed_VC = weight_VC.to(dtype)
    rows = None if rows is None else Rows(rows.ids, rows.values.to(dtype))
    log_probs_K = torch.empty(len(hidden_KC), dtype=torch.promote_types(dtype, torch.float32), device=hidden_KC.device)
    with torch.autocast(hidden_KC.device.type, enabled=False):
        for chunk in _chunks(hidden_KC, weight_VC):
            log_kV = _log_softmax(hidden_KC[chunk].to(dtype), computed_VC, rows)
            log_probs_K[chunk] = log_kV.gather(1, labels_K[chunk, None]).squeeze(1)
            del log_kV
    return log_probs_K


def _chunks(hidden_KC: torch.Tensor, weight_VC: torch.Tensor) -> Iterator[slice]:
    rows = chunk_rows(len(weight_VC))
    return (slice(start, start + rows) for start in range(0, len(hidden_KC), rows))


def _log_softmax(hidden_kC: torch.Tensor, weight_VC: torch.Tensor, rows: Rows | None) -> torch.Tensor:
    logits_kV = _logits(hidden_kC, weight_VC, rows)
    return torch.log_softmax(logits_kV, dim=1, dtype=torch.promote_types(logits_kV.dtype, torch.float32))


def _slope(
    hidden_kC: torch.Tensor,
    weight_VC: torch.Tensor,
    rows: Rows | None,
    labels_k1: torch.Tensor,
    upstream_k1: torch.Tensor,
) -> torch.Tensor:
    """The gradient of a chunk's logits, in the computing dtype: (1 at the label, minus softmax) times upstream."""
    log_kV = _log_softmax(hidden_kC, weight_VC, rows)
    at_label_k1 = -log_kV.gather(1, labels_k1).expm1()  # 1 - p, exact also for p close to 1
    return log_kV.exp_().neg_().scatter_(1, labels_k1, at_label_k1).mul_(upstream_k1).to(hidden_kC.dtype)


def sum_segments(
    values_K: torch.Tensor, rows_K: torch.Tensor, bounds_S1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum values of supervised rows, per sample of a flat batch or per any other segment of it.

    The result is deterministic (no atomic additions), and nothing is read from the device.

    Args:
        values_K: float [K], for example from `linear_log_probs`.
        rows_K: int [K], positions of the values in the flat row, in ascending order: `supervised_rows` of a batch.
        bounds_S1: int [S + 1], the start of each segment and the end of the last one: `cu_seqlens` for samples.

    Returns:
        sums_S: [S] in the dtype of values_K, 0 for a segment without supervised rows; differentiable.
        counts_S: int64 [S], supervised rows of each segment.
    """
    counts_S = torch.searchsorted(rows_K, bounds_S1.to(rows_K.dtype)).diff()
    # unsafe=True, because checking the lengths would read them from the device.
    return torch.segment_reduce(values_K, "sum", lengths=counts_S, initial=0, unsafe=True), counts_S
