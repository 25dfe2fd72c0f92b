"""The result of a check, as text for a person and as JSON for a program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from vlft.check.kinds import by_kind
from vlft.check.pairs import Pairs
from vlft.errors import BadRow
from vlft.setup import split_line
from vlft.text import counted, printable, table, terminal_width

BAR = 40  # characters of the histogram's longest bar
BUCKETS = 12
KINDS = 12  # kinds of faults that are printed with some of their rows
FIRST = 5  # rows of a kind that are printed


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One line of a histogram: `rows` values from `start` to `end`, both included."""

    start: int
    end: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of the rows that can be trained, or of the samples that they are split into.

    Attributes:
        total: tokens of all of them.
        supervised: tokens of all of them that are trained; 0 for the prompts of `--method grpo`.
        min: tokens of the shortest.
        median: median of their tokens.
        max: tokens of the longest.
        limit: tokens that one may have: `--max_length` or the limit of the model, and no more than fit into a pack.
        histogram: buckets without gaps.
    """

    total: int
    supervised: int
    min: int
    median: int
    max: int
    limit: int
    histogram: tuple[Bucket, ...]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The result of `check`.

    Attributes:
        counts: file -> number of rows read.
        ok: number of rows that can be trained.
        samples: number of samples that they are trained as; more than `ok` if rows are split (--turns).
        bad: the refused rows, in file order.
        warnings: remarks on rows that are trained, in the same form as `bad`.
        unlisted: number of further warnings, which are not listed.
        left_out: number of rows that `--over_length skip` leaves out; each has a warning.
        images: number of pictures in the rows that can be trained.
        videos: number of videos in the rows that can be trained.
        pictures_per_row: histogram of the pictures and videos of a row.
        kilopixels: histogram of the thousands of pixels of a picture.
        decoded: True if every picture and frame was decoded, False if headers were read only.
        tokens: None without a base, or if no row can be trained.
        based: whether a base was named.
        notes: notes to the user about cached results.
        overlap: remarks on rows, pictures and videos that are in both the training and the evaluation data.
        pairs: counts of the answers of preference rows; None if there are none.
    """

    counts: dict[str, int]
    ok: int
    samples: int
    bad: tuple[BadRow, ...]
    warnings: tuple[BadRow, ...]
    unlisted: int
    left_out: int
    images: int
    videos: int
    pictures_per_row: tuple[Bucket, ...]
    kilopixels: tuple[Bucket, ...]
    decoded: bool
    tokens: Tokens | None
    based: bool
    notes: tuple[str, ...]
    overlap: tuple[str, ...] = ()
    pairs: Pairs | None = None

    @property
    def rows(self) -> int:
        return sum(self.counts.values())

    def as_json(self) -> dict[str, Any]:
        """Return the document of `vlft check-data --json`."""
        tokens = None
        if self.tokens is not None:
            tokens = asdict(self.tokens) | {"histogram": _as_json(self.tokens.histogram)}
        return {
            "rows": self.rows,
            "ok": self.ok,
            "samples": self.samples,
            "bad": [asdict(row) for row in self.bad],
            "warnings": [asdict(row) for row in self.warnings],
            "warnings_unlisted": self.unlisted,
            "left_out": self.left_out,
            "overlap": list(self.overlap),
            "files": dict(self.counts),
            "images": self.images,
            "videos": self.videos,
            "pictures_per_row": _as_json(self.pictures_per_row),
            "kilopixels": _as_json(self.kilopixels),
            "decoded": self.decoded,
            "tokens": tokens,
            "pairs": None if self.pairs is None else self.pairs.as_json(),
        }

    def as_text(self) -> str:
        """Return the text for a person: refused rows, warnings, counts, histogram, and what to do."""
        parts = [*(f"note: {note}" for note in self.notes)]
        if self.bad:
            parts.append(_listed("cannot be trained", self.bad))
        if self.warnings:
            parts.append(_listed("possible problems in rows that are trained", self.warnings))
        whole = (*self.overlap, *(() if self.pairs is None else self.pairs.remarks))
        parts += [printable(f"warning: {remark}") for remark in whole]
        parts.append(self._counted())
        if self.tokens is not None:
            parts.append(_drawn(self.tokens, one="row" if self.samples == self.ok else "sample"))
        elif not self.based:
            parts.append("tokens are not counted: pass --model_id to count them and to check --max_length")
        parts.append(self._verdict())
        return "\n\n".join(parts)

    def _counted(self) -> str:
        refused = Counter(row.file for row in self.bad)
        warned = Counter(file for file, _ in {(row.file, row.index) for row in self.warnings})
        lines = []
        for file, count in self.counts.items():
            line = f"{file}: {counted(count, 'row')}, {count - refused[file]:,} can be trained"
            line += f", {refused[file]:,} cannot" if refused[file] else ""
            lines.append(line + (f", {warned[file]:,} with a warning" if warned[file] else ""))
        how = "every frame decoded" if self.decoded else "headers read; without --headers_only every frame is decoded"
        lines.append(f"{counted(self.images, 'picture')} and {counted(self.videos, 'video')} in them ({how})")
        if self.pairs is not None:
            lines.append(str(self.pairs))
        if self.samples != self.ok:
            lines.append(split_line(self.ok, self.samples))
        if self.unlisted:
            lines.append(f"{self.unlisted:,} more warnings are not listed")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.bad:
            return "No row is refused." if self.decoded else "No row is refused. Only headers were read."
        return (
            f"{counted(len(self.bad), 'row')} of {self.rows:,} would stop a run. Fix them, or train on the rest with "
            "--on_bad_row skip; --fix OUT.jsonl writes the rest."
        )


def tokens_of(tokens: np.ndarray, supervised: np.ndarray, limit: int) -> Tokens:
    """Return the figures of rows.

    Args:
        tokens: tokens of each row, int [R], R > 0.
        supervised: tokens of each row that are trained, int [R].
        limit: tokens that a row may have.
    """
    ordered = np.sort(tokens)
    return Tokens(
        total=int(tokens.sum(dtype=np.int64)),
        supervised=int(supervised.sum(dtype=np.int64)),
        min=int(ordered[0]),
        median=int(ordered[(len(ordered) - 1) // 2]),
        max=int(ordered[-1]),
        limit=limit,
        histogram=histogram(ordered),
    )


def histogram(values: Sequence[int] | np.ndarray) -> tuple[Bucket, ...]:
    """Count integers from 0 in at most `BUCKETS` buckets with round ends.

    Buckets have equal widths. If the largest value is at least 16 times the smallest, each is twice as wide as the one
    before.

    Returns:
        buckets from the smallest to the largest value; a bucket between them may be empty.
    """
    ordered = np.sort(np.asarray(values))
    low, high = int(ordered[0]), int(ordered[-1])
    if high >= 16 * max(1, low):
        first, last = max(1, low.bit_length(), high.bit_length() - BUCKETS + 1), high.bit_length()
        edges = [1 << (bits - 1) for bits in range(first, last + 2)]
        edges[0] = min(edges[0], low)  # with more doublings than buckets, the first bucket takes all smaller values
    else:
        width = next(w for w in _round_numbers() if high // w - low // w < BUCKETS)
        edges = list(range(low // width * width, high + width + 1, width))
    places = np.searchsorted(ordered, edges).tolist()
    buckets = [
        Bucket(start=start, end=end - 1, rows=after - before)
        for (start, end), (before, after) in zip(pairwise(edges), pairwise(places), strict=True)
    ]
    while buckets and not buckets[-1].rows:
        buckets.pop()
    return tuple(buckets)


def _round_numbers() -> Iterator[int]:
    """Yield 1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _as_json(buckets: Sequence[Bucket]) -> list[dict[str, int]]:
    return [{"from": b.start, "to": b.end, "rows": b.rows} for b in buckets]


def _drawn(tokens: Tokens, *, one: str) -> str:
    """Return the histogram as lines of block characters, followed by its figures.

    Args:
        one: what is counted: rows, or the samples that they are split into.
    """
    most = max(bucket.rows for bucket in tokens.histogram)
    digits = len(f"{tokens.histogram[-1].end:,}")
    heads = ("tokens".rjust(2 * digits + 1), f"{one}s")
    wide = max(1, min(BAR, terminal_width() - len(heads[0]) - len(f"{most:,}") - 4))
    rows = [
        (
            f"{bucket.start:>{digits},}-{bucket.end:>{digits},}",
            f"{_bar(bucket.rows / most, wide)} {bucket.rows:,}".strip(),
        )
        for bucket in tokens.histogram
    ]
    lines = [table(heads, rows, last="left")]
    trained = f"{tokens.supervised:,} of them trained ({tokens.supervised / tokens.total:.1%})"
    what = f"tokens in all, {trained}" if tokens.supervised else "tokens of prompts in all"
    lines.append(
        f"{tokens.total:,} {what}; a {one} has "
        f"{tokens.min:,} to {tokens.max:,}, half have up to {tokens.median:,}; at most {tokens.limit:,} are allowed"
    )
    return "\n".join(lines)


def _bar(share: float, wide: int) -> str:
    """Return a bar of `wide` x `share` characters, in eighths. It is empty only if `share` is 0."""
    eighths = round(share * wide * 8) or (1 if share else 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _listed(title: str, rows: Sequence[BadRow]) -> str:
    """Return the kinds of faults with their counts, the first rows of each, and the number of the other kinds."""
    kinds = by_kind(rows)
    lines = [f"{title} ({len(rows):,}):"]
    for kind, some in kinds[:KINDS]:
        if len(some) == 1:
            lines.append(f"  {printable(str(some[0]))}")
            continue
        lines.append(f"  {counted(len(some), 'row')}: {printable(kind)}")
        differ = len({row.reason for row in some}) > 1  # else the kind says it for all of them
        lines += [f"    {printable(str(row) if differ else row.where)}" for row in some[:FIRST]]
        if len(some) > FIRST:
            lines.append(f"    and {len(some) - FIRST:,} more")
    if others := kinds[KINDS:]:
        rest = sum(len(some) for _, some in others)
        lines.append(f"  {counted(rest, 'row')} of {counted(len(others), 'other kind')}: --json or --report lists them")
    return "\n".join(lines)
