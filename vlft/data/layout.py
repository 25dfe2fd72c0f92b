"""Where the tokens of samples are in the flat row of a batch, and what each of them sees. Numbers in, tensors out.

A preference row is [prompt | answer | answer ...]. With a shared prompt the flat row holds it like this: the prompt and
the first answer are one segment, as a plain row is, and each other answer is a segment of queries whose keys are the
prompt and itself. Without, the flat row holds [prompt answer | prompt answer ...], and all segments are plain.

A plain sample is one segment too. So there are as many segments as answers, if a plain sample counts as one answer.

Letters: T tokens of the flat row, S segments, N vision tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch


class BranchKeys(TypedDict):
    """The keys that the queries of each segment attend to, lower-right causal."""

    kv_rows: torch.Tensor  # int64 [sum of key lengths], their rows
    cu_seqlens_k: torch.Tensor  # int32 [S + 1]
    key_lengths: tuple[int, ...]  # [S]


class Copies(TypedDict):
    """Vision tokens of repeated prompts."""

    of: torch.Tensor  # int64 [N], index of the feature, among those of the ViT and then the cached ones
    rows: torch.Tensor  # int64 [N], the row that it is copied to


@dataclass(frozen=True, kw_only=True)
class _Segment:
    """A segment of the flat row.

    Attributes:
        rows: its own rows.
        taken: its tokens, among those of all samples one after the other.
        prompt: rows of the prompt before them, if it is shared.
        copied: rows of the prompt that its first rows repeat.
    """

    rows: range
    taken: tuple[range, ...]
    prompt: range = range(0)
    copied: range = range(0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """The flat row of some samples.

    Attributes:
        lengths: tokens of each segment, [S].
        cu_seqlens: int32 [S + 1], where segments begin and end.
        places_T: int64, the place of a token in its conversation. Each answer continues its prompt.
        before_T: int64, the row of the token before it, which predicts it; -1 for the first token of a conversation.
        taken_T: int64, the token among those of the samples, one after the other; None: these, in their order.
        copied_T: int64, of a token in a copy of a prompt the row of its original; -1 for others; None without copies.
        branches: the keys of each segment; None if each attends only to itself.
    """

    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    places_T: torch.Tensor
    before_T: torch.Tensor
    taken_T: torch.Tensor | None
    copied_T: torch.Tensor | None
    branches: BranchKeys | None

    @classmethod
    def of(cls, samples: Sequence[tuple[int, tuple[int, ...]]], *, shared: bool) -> Layout:
        """Lay out samples.

        Args:
            samples: of each its tokens, and `EncodedSample.branches`; at least one sample.
            shared: whether answers share the tokens of their prompt.
        """
        segments = list(_segments(samples, shared=shared))
        lengths = tuple(len(one.rows) for one in segments)
        before_T = np.arange(-1, sum(lengths) - 1)
        before_T[[one.rows.start for one in segments]] = [one.prompt[-1] if one.prompt else -1 for one in segments]
        repeats = any(one.copied for one in segments)
        copied_T = torch.full((len(before_T),), -1) if repeats else None
        if copied_T is not None:
            for one in segments:
                copied_T[one.rows.start : one.rows.start + len(one.copied)] = _joined([one.copied])
        return cls(
            lengths=lengths,
            cu_seqlens=cumulative(lengths),
            places_T=_joined(range(len(one.prompt), len(one.prompt) + len(one.rows)) for one in segments),
            before_T=torch.from_numpy(before_T),
            taken_T=_joined(part for one in segments for part in one.taken) if repeats else None,
            copied_T=copied_T,
            branches=_keys(segments) if any(one.prompt for one in segments) else None,
        )


def _segments(samples: Iterable[tuple[int, tuple[int, ...]]], *, shared: bool) -> Iterator[_Segment]:
    row = token = 0
    for tokens, branches in samples:
        prompt, *answers = branches or (0, tokens)
        asked, first = range(token, token + prompt), range(row, row + prompt)
        token += prompt
        for place, count in enumerate(answers):
            answer = range(token, token + count)
            token = answer.stop
            if place and shared:
                rows = range(row, row + count)
                yield _Segment(rows=rows, taken=(answer,), prompt=first)
            else:
                rows = range(row, row + prompt + count)
                yield _Segment(rows=rows, taken=(asked, answer), copied=first if place else range(0))
            row = rows.stop


def _keys(segments: Sequence[_Segment]) -> BranchKeys:
    lengths = tuple(len(one.prompt) + len(one.rows) for one in segments)
    rows = _joined(part for one in segments for part in (one.prompt, one.rows))
    return BranchKeys(kv_rows=rows, cu_seqlens_k=cumulative(lengths), key_lengths=lengths)


def copies_of(copied_T: torch.Tensor, vision_T: torch.Tensor, rows_N: torch.Tensor) -> Copies | None:
    """Return the vision tokens of repeated prompts; None if there are none.

    Args:
        copied_T: of the layout.
        vision_T: bool, whether a token is of a picture or video.
        rows_N: rows of the features, in their order.
    """
    rows = (vision_T & (copied_T >= 0)).nonzero().squeeze(1)
    if not len(rows):
        return None
    feature_T = torch.full_like(copied_T, -1)
    feature_T[rows_N] = torch.arange(len(rows_N))
    return Copies(of=feature_T[copied_T[rows]], rows=rows)


def cumulative(lengths: Sequence[int]) -> torch.Tensor:
    """[0, l0, l0+l1, ...] as int32, the form that variable-length attention kernels take."""
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32))


def _joined(parts: Iterable[range]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.arange(part.start, part.stop) for part in parts]))
