"""Geometries of flat rows that repeat, for an attention kernel that builds a plan for each new one.

Segments of length 0 are added after the last one, the longest length is rounded up, and tokens that belong to no
segment are added at the end. None of this changes the result. `vlft.model.attention` uses it for cuDNN.

cuDNN accepts segments of length 0: JAX passes 0 for unused segments of packed rows (jax-ml/jax#30023). Its plans are
kept by number of segments, longest length, number of tokens and strides (`MHACacheKeyWrapper` of torch 2.15).

Keys with lengths of their own are refused. torch 2.15 does the same: cuDNN aligns the causal mask of packed rows to the
upper left.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from vlft.model.segments import Kernel


class Geometry(NamedTuple):
    """What a plan depends on.

    Attributes:
        segments: number of segments.
        longest: tokens of the longest one, or more.
        tokens: of the row.
    """

    segments: int
    longest: int
    tokens: int


#: The smallest numbers, except of tokens. cuDNN before 9.24 refuses a longest length of up to 128.
LEAST = Geometry(segments=8, longest=256, tokens=1)
#: Tokens are rounded up to a multiple of this share of the next power of two, because each layer copies the row.
STEPS = 8


def repeating(geometry: Geometry) -> Geometry:
    """The smallest geometry that repeats and in which a row fits.

    Segments and the longest length are rounded up to a power of two, so they have few values. Blocks of a kernel that
    hold no tokens end at once. Tokens are rounded up by at most a quarter.
    """
    step = max(1, _power_of_two(geometry.tokens) // STEPS)
    return Geometry(
        segments=max(LEAST.segments, _power_of_two(geometry.segments)),
        longest=max(LEAST.longest, _power_of_two(geometry.longest)),
        tokens=-(-geometry.tokens // step) * step,
    )


def _power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def with_repeating(kernel: Kernel) -> Kernel:
    """A kernel that runs another one on rows whose geometry repeats. It reads nothing from the device.

    The kernel raises `NotImplementedError` for keys with lengths of their own.
    """

    def attend(q, k, v, cu, longest, *, scale, causal, cu_k=None, longest_k=None):
        if cu_k is not None:
            raise NotImplementedError("cuDNN aligns fewer queries than keys to the upper left (torch 2.15)")
        tokens, segments = len(q), len(cu) - 1
        wanted = repeating(Geometry(segments=segments, longest=longest, tokens=tokens))
        cu = torch.cat([cu, cu[-1:].expand(wanted.segments - segments)])
        more = wanted.tokens - tokens
        if more:
            q, k, v = (F.pad(x, (0, 0, 0, 0, 0, more)) for x in (q, k, v))
        return kernel(q, k, v, cu, wanted.longest, scale=scale, causal=causal)[:tokens]

    return attend
