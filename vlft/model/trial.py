"""Try an attention kernel on a device: whether it computes what sdpa does, and how long it takes.

`vlft.model.attention` chooses by the results.

Letters: H heads, G key/value heads, T tokens of the row, D head size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vlft.model.segments import Heads, Kernel, attend_segments, gathered, run_kernel

#: Tokens of the self-test's segments. Some have more than 128, as in training: cuDNN before 9.24 uses another kernel
#: for shorter ones. Not all of them are multiples of a kernel's block.
LENGTHS = (200, 7, 161)
#: Tokens of prompt and answers in the self-test of branches: short answers after long prompts, and the reverse.
BRANCHES = ((190, (10, 7, 140)), (5, (150, 1)), (161, (20,)))
#: Largest difference allowed in the self-test, as a share of its segment's largest value. bfloat16 rounds to 8 bits
#: (up to 0.02 on a CPU). A kernel that mixes samples differs by about 1.
TOLERANCE = 0.05
#: Tokens of the segments of a timed row, 4,096 together.
TIMED_LENGTHS = (1696, 1104, 800, 496)
TIMED_CALLS = 5
#: Of the calls in one layer, the share with a geometry that is new to cuDNN: at most 16 in 200 packs (`geometry`).
NEW_GEOMETRIES = 16 / 200


class _Row(NamedTuple):
    """The row of a self-test.

    Attributes:
        lengths: of its segments of queries.
        key_lengths: of the keys of each; None: the same.
        kv_rows: rows of all keys; None: those of the queries.
    """

    lengths: list[int]
    key_lengths: list[int] | None = None
    kv_rows: list[int] | None = None


def _branch_row() -> _Row:
    """A row of prompts whose answers share them: each answer is a segment, the first one together with its prompt."""
    lengths: list[int] = []
    key_lengths: list[int] = []
    kv_rows: list[int] = []
    end = 0
    for prompt, answers in BRANCHES:
        shared = range(end, end + prompt)
        end += prompt
        for place, answer in enumerate(answers):
            lengths.append(answer + (0 if place else prompt))
            key_lengths.append(prompt + answer)
            kv_rows += [*shared, *range(end, end + answer)]
            end += answer
    return _Row(lengths, key_lengths, kv_rows)


def self_test(
    kernel: Kernel,
    tower: Heads,
    *,
    dtype: torch.dtype,
    device: torch.device,
    fused: bool = False,
    branches: bool = False,
) -> float:
    """Largest difference, forward and gradient, between a varlen kernel in 16 bits and sdpa in float32.

    The kernel gets the same inputs as in a layer of the tower, through `run_kernel`. Segments differ in length, so a
    kernel that mixes samples cannot pass.

    Args:
        kernel: the kernel to test.
        tower: the attention of one tower.
        dtype: the dtype that the run computes in, bfloat16 or float16.
        device: where the kernel runs.
        fused: whether rotary embedding is fused (`vlft.model.rotary`).
        branches: whether answers share a prompt, so that most segments have fewer queries than keys. A kernel that
            aligns a causal mask to the upper left then hides the prompt's end from an answer, and cannot pass.

    Returns:
        the difference as a share of its segment's largest value; NaN if any value is NaN.
    """
    generator = torch.Generator().manual_seed(0)
    row = _branch_row() if branches else _Row(list(LENGTHS))
    tokens = sum(row.lengths)
    cu_seqlens = _bounds(row.lengths, device)
    keys: dict[str, Any] = {}
    if row.key_lengths is not None:
        keys = {"cu_k": _bounds(row.key_lengths, device), "longest_k": max(row.key_lengths)}
    widths = [tower.heads * tower.head_dim, *[tower.kv_heads * tower.head_dim] * 2]
    drawn = [
        torch.randn(tokens, width, generator=generator).to(device, dtype)
        for width in ([sum(widths)] if tower.joined else widths)
    ]
    results = []
    for exact in (False, True):
        leaves = [(x.float() if exact else x.clone()).requires_grad_() for x in drawn]
        q, k, v = _as_in_a_layer(leaves, tower, fused=fused)
        if row.kv_rows is not None:
            k, v = (gathered(x, torch.tensor(row.kv_rows, device=device)) for x in (k, v))
        how: dict[str, Any] = {"scale": tower.scale, "causal": tower.causal}
        if exact:
            out = attend_segments(q, k, v, row.lengths, key_lengths=row.key_lengths, **how)
        else:
            out = run_kernel(kernel, q, k, v, cu_seqlens, max(row.lengths), **how, **keys)
        out.float().square().sum().backward()
        gradients = [x.grad.float() for x in leaves if x.grad is not None]
        if tower.joined:
            gradients = list(gradients[0].split(widths, dim=1))
        results.append([out[0].detach().float().flatten(1), *gradients])
    shares = [
        (a - b).abs().max() / b.abs().max()
        for found, wanted in zip(*results, strict=True)
        for a, b in zip(found.split(row.lengths), wanted.split(row.lengths), strict=True)
    ]
    return float(torch.stack(shares).max())  # not Python's max, which ignores a NaN that is not its first argument


def _bounds(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """[0, l0, l0+l1, ...] as int32."""
    return torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)


def _as_in_a_layer(
    projected: Sequence[torch.Tensor], tower: Heads, *, fused: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and value [1, H or G, T, D] in the layout and dtype that a layer passes on after rotary embedding.

    The language model computes rotary embedding in the dtype of hidden states; float32 is tested here, the wider case.
    The ViT computes it in float32 and casts back. Fused, it writes the projection's dtype and layout in both towers.

    Args:
        projected: [T, (H + 2G) * D], or three of [T, H * D], [T, G * D] twice.
        tower: the attention of the tower.
        fused: whether rotary embedding is fused.
    """
    if tower.joined:
        parts = list(projected[0].unflatten(1, (3, tower.heads, tower.head_dim)).unbind(1))
    else:
        parts = [x.unflatten(1, (-1, tower.head_dim)) for x in projected]
    one = torch.ones(len(parts[0]), 1, tower.head_dim, device=parts[0].device)  # a rotation by zero
    for i, part in enumerate([] if fused else parts[:2]):
        turned = part.float() * one
        if tower.partial_rotary:
            heads_first = turned.transpose(0, 1)
            turned = torch.cat(heads_first.chunk(2, dim=-1), dim=-1).transpose(0, 1)
        parts[i] = turned.to(part.dtype) if tower.joined else turned
    q, k, v = (part.transpose(0, 1)[None] for part in parts)
    return q, k, v


def time_kernel(
    kernel: Kernel, tower: Heads, lengths: Sequence[int], *, layers: int, dtype: torch.dtype, device: torch.device
) -> float:
    """Seconds of one call, forward and backward, on a row of a few thousand tokens.

    The first call of a new geometry may take much longer, because a plan is built. Its share in a run is added.

    Args:
        kernel: the kernel to time.
        tower: the attention of the tower.
        lengths: tokens of the row's segments, at least 4.
        layers: calls for each row.
        dtype: what the tower computes in.
        device: where the kernel runs.
    """

    def call_of(lengths: Sequence[int]) -> Callable[[], float]:
        tokens, longest = sum(lengths), max(lengths)
        cu_seqlens = _bounds(lengths, device)
        widths = [tower.heads * tower.head_dim, *[tower.kv_heads * tower.head_dim] * 2]
        drawn = [
            torch.randn(tokens, width, device=device, dtype=dtype)
            for width in ([sum(widths)] if tower.joined else widths)
        ]
        q, k, v = (x.detach().requires_grad_() for x in _as_in_a_layer(drawn, tower, fused=False))
        upstream = torch.randn(1, tokens, tower.heads, tower.head_dim, device=device, dtype=dtype)

        def call() -> float:
            wait_for(device)
            start = time.perf_counter()
            out = run_kernel(kernel, q, k, v, cu_seqlens, longest, scale=tower.scale, causal=tower.causal)
            torch.autograd.grad(out, (q, k, v), upstream)
            wait_for(device)
            return time.perf_counter() - start

        return call

    call = call_of(lengths)
    call(), call()  # compiles
    seconds = statistics.median(call() for _ in range(TIMED_CALLS))
    new = [call_of(lengths[place:]) for place in (1, 2, 3)]
    plan = statistics.median(first() - first() for first in new)
    return seconds + NEW_GEOMETRIES / layers * max(0.0, plan)


def wait_for(device: torch.device) -> None:
    """Wait until a device has done all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
