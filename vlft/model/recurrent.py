"""Gated delta net layers over flat rows: several samples are concatenated, and none reads a state of another.

`vlft.model.adapt.install` binds this forward to the layers of a model with the feature `recurrent`. A call without
`segments` (generation, padded batches) runs transformers' own forward, which on flat rows would leak: 5.17 runs both
its convolution and its delta rule across samples, and 5.23 refuses samples without extra packages.

A layer runs each of its linear layers and its norm once on the whole row, so every process of a distributed run calls
the same modules, whatever the number of its samples. Only the convolution and the delta rule know the samples.
`vlft.model.linear_attention` chooses the implementation of the delta rule.

Letters: T tokens of the row, Z channels of the convolution (queries, keys, values), G key heads, J value heads, which
are R times as many, D channels of a query or key, E channels of a value, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

CHUNK = 64  # tokens of a chunk, as in transformers and in flash-linear-attention

# ---- samples of a row


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Where the samples of a flat row are. One object serves all layers, so each tensor is copied to the device once.

    Attributes:
        lengths: tokens of each sample. Python ints, so nothing is read back from the device.
        device: where the row is.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @cached_property
    def long_cu_seqlens(self) -> torch.Tensor:
        """int64 [samples + 1], the bounds of samples. Attention kernels take int32, flash-linear-attention int64."""
        return self._sent(np.cumsum([0, *self.lengths]))

    @cached_property
    def chunk_indices(self) -> torch.Tensor:
        """int64 [N, 2]: the sample of each chunk, and its place among that sample's chunks, in the order of tokens."""
        samples = np.repeat(np.arange(len(self.lengths)), self._chunks)
        within = np.arange(len(samples)) - (self._chunks.cumsum() - self._chunks)[samples]
        return self._sent(np.stack([samples, within], axis=1))

    @cached_property
    def active(self) -> tuple[int, ...]:
        """For each k, the number of samples that have a k-th chunk."""
        return tuple(int((self._chunks > k).sum()) for k in range(int(self._chunks.max())))

    @cached_property
    def chunked(self) -> torch.Tensor:
        """int64 [T]: the place of each token in N chunks of C, where all first chunks come first, then all second ones.

        Longer samples come first among them, so that the samples that have a k-th chunk are the first `active[k]`.
        """
        sample, within = self._places
        rank = np.empty(len(self.lengths), dtype=np.int64)
        rank[np.argsort(-self._chunks, kind="stable")] = np.arange(len(self.lengths))
        before = np.cumsum([0, *self.active])
        return self._sent((before[within // CHUNK] + rank[sample]) * CHUNK + within % CHUNK)

    def spread(self, gap: int) -> torch.Tensor:
        """int64 [T]: the place of each token if `gap` empty places precede each sample."""
        known = self.__dict__.setdefault("_spread", {})
        if gap not in known:
            sample, _ = self._places
            known[gap] = self._sent(np.arange(self.tokens) + gap * (sample + 1))
        return known[gap]

    @cached_property
    def within(self) -> torch.Tensor:
        """int32 [T]: the place of each token in its sample."""
        return self._sent(self._places[1], torch.int32)

    @cached_property
    def _chunks(self) -> np.ndarray:
        return -(-np.array(self.lengths) // CHUNK)

    @cached_property
    def _places(self) -> tuple[np.ndarray, np.ndarray]:
        """The sample of each token, and its place in it."""
        lengths = np.array(self.lengths)
        sample = np.repeat(np.arange(len(lengths)), lengths)
        return sample, np.arange(len(sample)) - (lengths.cumsum() - lengths)[sample]

    def _sent(self, values: np.ndarray, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        on_host = torch.from_numpy(values).to(dtype)
        if self.device.type == "cuda":  # from other memory, the copy would wait for the device
            on_host = torch.empty(on_host.shape, dtype=dtype, device="cpu", pin_memory=True).copy_(on_host)
        return on_host.to(self.device, non_blocking=True)


# ---- the layer

#: `rule(q_TGD, k_TGD, v_TJE, decay_TJ, beta_TJ, segments)` -> out_TJE in the dtype of the queries.
#: Queries and keys are not normalised yet. The decay is float32, the logarithm of the factor by which a token shrinks
#: the state, so it is never positive.
Rule = Callable[..., torch.Tensor]


def bind(layer: torch.nn.Module, rule: Rule) -> None:
    """Make a gated delta net keep the samples of a flat row apart. Calls without `segments` run its stock forward.

    Args:
        layer: `linear_attn` of a language layer.
        rule: computes the delta rule.
    """

    def forward(
        self: Any, hidden_states: torch.Tensor, *args: Any, segments: Segments | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if segments is None:
            return type(self).forward(self, hidden_states, *args, **kwargs)
        # Not x[0]: its gradient is copied into a tensor of zeros.
        projected_TZ, gate_TV = self.in_proj_qkv(hidden_states).squeeze(0), self.in_proj_z(hidden_states).squeeze(0)
        b_TJ, a_TJ = self.in_proj_b(hidden_states).squeeze(0), self.in_proj_a(hidden_states).squeeze(0)
        out_TJE = mix(self, projected_TZ, b_TJ, a_TJ, rule, segments)
        normed = self.norm(out_TJE.reshape(-1, self.head_v_dim), gate_TV.reshape(-1, self.head_v_dim))
        return self.out_proj(normed.reshape(1, segments.tokens, -1))

    layer.forward = types.MethodType(forward, layer)


def mix(
    layer: Any, projected_TZ: torch.Tensor, b_TJ: torch.Tensor, a_TJ: torch.Tensor, rule: Rule, segments: Segments
) -> torch.Tensor:
    """What a layer computes between its linear layers, where tokens of a sample read earlier ones.

    Args:
        layer: has the sizes and small weights of a gated delta net.
        projected_TZ: result of `in_proj_qkv`.
        b_TJ: result of `in_proj_b`, how much of a value is written.
        a_TJ: result of `in_proj_a`, how fast the state shrinks.
        rule: computes the delta rule.
        segments: the samples of the row.

    Returns:
        out_TJE: not yet normalised, in the dtype of `projected_TZ`.
    """
    mixed_TZ = convolved(layer, projected_TZ, segments)
    q_TZ, k_TZ, v_TZ = mixed_TZ.split([layer.key_dim, layer.key_dim, layer.value_dim], dim=1)
    q_TGD, k_TGD = (x.unflatten(1, (-1, layer.head_k_dim)) for x in (q_TZ, k_TZ))
    decay_TJ = -layer.A_log.float().exp() * F.softplus(a_TJ.float() + layer.dt_bias)
    return rule(q_TGD, k_TGD, v_TZ.unflatten(1, (-1, layer.head_v_dim)), decay_TJ, b_TJ.sigmoid(), segments)


def fuse_convolution(layer: torch.nn.Module, function: Callable[..., torch.Tensor]) -> None:
    """Make a layer compute its convolution by a function, also after `bind` is called again.

    Args:
        layer: `linear_attn` of a language layer.
        function: `function(x_TZ, weight_Z1W, within_T)`, as in `vlft.model.fused.Functions.convolution`.
    """
    vars(layer)["fused_convolution"] = function


def convolved(layer: Any, x_TZ: torch.Tensor, segments: Segments) -> torch.Tensor:
    """The convolution of a layer on a flat row, then SiLU, by the function of `fuse_convolution` if it has one."""
    function = vars(layer).get("fused_convolution")
    if function is None:
        return convolve(x_TZ, layer.conv1d.weight, segments)
    return function(x_TZ, layer.conv1d.weight, segments.within)


def convolve(x_TZ: torch.Tensor, weight_Z1W: torch.Tensor, segments: Segments) -> torch.Tensor:
    """The layer's causal convolution, then SiLU. The W - 1 places before each sample are zeros, not its neighbour."""
    taps = weight_Z1W.shape[-1]
    places = segments.spread(taps - 1)
    spread = x_TZ.new_zeros(segments.tokens + (taps - 1) * len(segments.lengths), x_TZ.shape[1])
    spread = spread.index_copy(0, places, x_TZ)
    out = F.conv1d(spread.T[None], weight_Z1W.to(x_TZ.dtype), groups=x_TZ.shape[1])[0].T
    return F.silu(out.index_select(0, places - (taps - 1)).to(x_TZ.dtype))


# ---- the delta rule in torch


def torch_rule(
    q_TGD: torch.Tensor,
    k_TGD: torch.Tensor,
    v_TJE: torch.Tensor,
    decay_TJ: torch.Tensor,
    beta_TJ: torch.Tensor,
    segments: Segments,
) -> torch.Tensor:
    """The gated delta rule in float32, also under autocast, for all samples of a row at once.

    With a state S of [D, E] for each head, zero at the start of a sample, a token computes
    `S = exp(decay) S; S = S + beta k (v - k S); out = q S`, with q and k normalised. As in "Gated Delta Networks"
    (Yang, Kautz, Hatamizadeh 2024) this is done by chunks: within a chunk all tokens at once, by solving a triangular
    system, and from chunk to chunk by the state. The chunks of all samples are one batch, and the k-th chunks of all
    samples are one step of the loop, so it has as many steps as the longest sample has chunks.
    """
    with torch.autocast(q_TGD.device.type, enabled=False):
        share = v_TJE.shape[1] // k_TGD.shape[1]  # R: value heads for each key head
        q = _chunks(normalised(q_TGD.float()) * q_TGD.shape[-1] ** -0.5, segments).unsqueeze(2)  # [N, G, 1, C, D]
        k = _chunks(normalised(k_TGD.float()), segments).unsqueeze(2)
        v = _chunks(v_TJE.float(), segments).unflatten(1, (-1, share))  # [N, G, R, C, E]
        beta = _chunks(beta_TJ.float()[..., None], segments).unflatten(1, (-1, share))  # [N, G, R, C, 1]
        decay = _chunks(decay_TJ[..., None], segments).unflatten(1, (-1, share)).cumsum(3)
        out = _by_chunks(q, k, v, decay, beta, segments.active)  # [N, G, R, C, E]
        out = out.flatten(1, 2).transpose(1, 2).flatten(0, 1)  # [N * C, J, E]
        return out.index_select(0, segments.chunked).to(q_TGD.dtype)


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1. The small number is that of transformers and flash-linear-attention."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _chunks(x: torch.Tensor, segments: Segments) -> torch.Tensor:
    """[T, H, X] -> [N, H, C, X]. Places after the end of a sample are zeros: they change neither state nor result."""
    count = sum(segments.active)
    placed = x.new_zeros(count * CHUNK, *x.shape[1:]).index_copy(0, segments.chunked, x)
    return placed.unflatten(0, (count, CHUNK)).transpose(1, 2)


def _by_chunks(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    active: Sequence[int],
) -> torch.Tensor:
    """The delta rule on chunks.

    Args:
        q: normalised and scaled, [N, G, 1, C, D].
        k: normalised, [N, G, 1, C, D].
        v: [N, G, R, C, E].
        decay: summed within its chunk, [N, G, R, C, 1].
        beta: [N, G, R, C, 1].
        active: samples in each step. The N chunks are in the order of steps.

    Returns:
        [N, G, R, C, E].
    """
    later = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=q.device).triu(1)
    # The exponent is masked, not the result: between a token and a later one it may overflow.
    between = (decay - decay.mT).masked_fill(later, float("-inf")).exp()  # [N, G, R, C, C]
    system = (k @ k.mT) * beta * between  # its diagonal is taken as 1
    since_start = decay.exp()
    right = torch.cat([v, k * since_start], dim=-1) * beta
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    within = (q @ k.mT) * between
    q, until_end, whole = q * since_start, (decay[..., -1:, :] - decay).exp(), since_start[..., -1:, :]
    # torch.split: its backward pass is one concatenation. That of an index would fill a tensor of N chunks each time.
    steps = zip(*(x.split(list(active)) for x in (q, k * until_end, solved, within, whole)), strict=True)
    state = v.new_zeros(active[0], *v.shape[1:3], k.shape[-1], v.shape[-1])  # [samples, G, R, D, E]
    results = []
    for count, (q_, k_, solved_, within_, whole_) in zip(active, steps, strict=True):
        state = state[:count]
        new, reads = solved_.split([v.shape[-1], k.shape[-1]], dim=-1)
        new = new - reads @ state
        results.append(q_ @ state + within_ @ new)
        state = state * whole_ + k_.mT @ new
    return torch.cat(results)


# ---- the delta rule of flash-linear-attention


def kernel_rule(kernel: Callable[..., tuple[torch.Tensor, Any]]) -> Rule:
    """The delta rule by flash-linear-attention's `chunk_gated_delta_rule`.

    Args:
        kernel: takes q and k [1, T, G, D], v [1, T, J, E], g (our decay) and beta [1, T, J], and samples by
            `cu_seqlens`, int64. Without `chunk_indices` it would read their number from the device (fla-core 0.6.0).
    """

    def rule(q_TGD, k_TGD, v_TJE, decay_TJ, beta_TJ, segments):
        out, _ = kernel(
            q_TGD[None],
            k_TGD[None],
            v_TJE[None],
            g=decay_TJ[None],
            beta=beta_TJ[None],
            use_qk_l2norm_in_kernel=True,
            cu_seqlens=segments.long_cu_seqlens,
            chunk_indices=segments.chunk_indices,
        )
        return out[0]

    return rule
