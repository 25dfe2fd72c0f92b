"""Every row the loader would refuse, in one pass, with its reason; what the others cost. Trains and changes nothing.

With a base (`--model_id`) rows are measured exactly as for training. Without one their structure and media are checked
against the stock budgets of Qwen2-VL, and tokens are not counted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from vlft.batches import pack_budget
from vlft.config.flags import DataFlags, ModelFlags
from vlft.data.records import Rows
from vlft.data.sample import Cost, Image, Video
from vlft.data.shown import printable
from vlft.errors import BadRow
from vlft.families import Family
from vlft.inputs import measure_rows, open_base, open_rows, stock_probe

BAR = 40  # characters of the histogram's longest bar
BUCKETS = 12


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """One line of the histogram: `rows` rows have `start` to `end` tokens, both included."""

    start: int
    end: int
    rows: int


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Tokens of the rows that can be trained.

    Attributes:
        total, supervised: over all rows; supervised ones are trained.
        min, median, max: of a row.
        limit: what a row may have: `--max_length` or what the model allows, and no more than a pack.
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
    """What `check` found.

    Attributes:
        counts: file -> rows read.
        ok: rows that can be trained. bad: those that cannot, in file order.
        warnings: remarks on rows that are taken, in the form of bad ones.
        images, videos: in the rows that can be trained.
        decoded: whether every picture and frame was decoded, or headers read only.
        tokens: None without a base, or without a row.
        based: whether a base was named.
    """

    counts: dict[str, int]
    ok: int
    bad: tuple[BadRow, ...]
    warnings: tuple[BadRow, ...]
    images: int
    videos: int
    decoded: bool
    tokens: Tokens | None
    based: bool

    @property
    def rows(self) -> int:
        return sum(self.counts.values())

    def as_json(self) -> dict[str, Any]:
        """The document of `vlft check-data --json`."""
        tokens = None
        if self.tokens is not None:
            tokens = asdict(self.tokens)
            tokens["histogram"] = [{"from": b.start, "to": b.end, "rows": b.rows} for b in self.tokens.histogram]
        return {
            "rows": self.rows,
            "ok": self.ok,
            "bad": [asdict(row) for row in self.bad],
            "warnings": [asdict(row) for row in self.warnings],
            "files": dict(self.counts),
            "images": self.images,
            "videos": self.videos,
            "decoded": self.decoded,
            "tokens": tokens,
        }

    def as_text(self) -> str:
        """What a person reads: bad rows, warnings, counts, histogram, and what to do."""
        parts = []
        if self.bad:
            parts.append(_listed("cannot be trained", self.bad))
        if self.warnings:
            parts.append(_listed("trained, but worth a look", self.warnings))
        parts.append(self._counted())
        if self.tokens is not None:
            parts.append(_drawn(self.tokens))
        elif not self.based:
            parts.append("tokens are not counted: name --model_id to count them and to check --max_length")
        parts.append(self._verdict())
        return "\n\n".join(parts)

    def _counted(self) -> str:
        lines = []
        for file, count in self.counts.items():
            refused = sum(row.file == file for row in self.bad)
            warned = len({row.index for row in self.warnings if row.file == file})
            line = f"{file}: {_many(count, 'row')}, {count - refused:,} can be trained"
            line += f", {refused:,} cannot" if refused else ""
            lines.append(line + (f", {warned:,} with a warning" if warned else ""))
        how = "every frame decoded" if self.decoded else "headers read; without --headers_only every frame is decoded"
        lines.append(f"{_many(self.images, 'picture')} and {_many(self.videos, 'video')} in them ({how})")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.bad:
            return "No row is refused." if self.decoded else "No row is refused, as far as headers tell."
        return (
            f"{_many(len(self.bad), 'row')} of {self.rows:,} would stop a run. Mend them, or train on the rest with "
            "--on_bad_row skip."
        )


def check(
    files: Sequence[str],
    data: DataFlags,
    model: ModelFlags,
    *,
    given: frozenset[str],
    headers_only: bool,
    workers: int,
) -> Checked:
    """Find every row that the loader would refuse.

    Args:
        files: data files; those of `--eval_path` are checked after them.
        data, model: flags, as for training.
        given: names of the flags the user set.
        headers_only: decode nothing, so a file that ends early goes unnoticed.
        workers: processes to share the work.

    Raises:
        ConfigError: a file cannot be read at all, or a flag cannot be carried out.
        CheckpointError: the base is missing, not a Qwen-VL, or not whole.
    """
    base = open_base(data, model, given=given) if model.model_id is not None else None
    family = Family.of("qwen2_vl") if base is None else base.family
    probe = stock_probe(data) if base is None else base.encoder
    rows = _all_rows(files, data, family)
    budget = pack_budget(data) if base is not None else None  # tokens are counted with a base only
    measured = measure_rows(rows, probe, workers=workers, budget=budget, decode=not headers_only)
    limit = base.encoder.max_length if base is not None else None
    if limit is not None and budget is not None:
        limit = min(limit, budget.tokens)
    media = [part for sample in measured.rows.samples for part in sample.media]
    return Checked(
        counts=rows.counts,
        ok=len(measured.costs),
        bad=measured.rows.bad,
        warnings=tuple(
            BadRow(file=sample.file, index=sample.index, id=sample.id, field=field, reason=remark)
            for sample in rows.samples
            for field, remark in sample.warnings
        )
        + tuple(
            BadRow(file=sample.file, index=sample.index, id=sample.id, field="row", reason=f"trained {change}")
            for sample, change in measured.changed
        ),
        images=sum(isinstance(part, Image) for part in media),
        videos=sum(isinstance(part, Video) for part in media),
        decoded=not headers_only,
        tokens=_tokens(measured.costs, limit) if measured.costs and limit is not None else None,
        based=base is not None,
    )


def _all_rows(files: Sequence[str], data: DataFlags, family: Family) -> Rows:
    """Rows of the data files, then of evaluation files that are not among them."""
    rows = open_rows(files, data, family)
    named = {os.path.realpath(file) for file in files}
    others = [file for file in data.eval_path if os.path.realpath(file) not in named]
    if not others:
        return rows
    more = open_rows(others, data, family)
    return Rows(samples=rows.samples + more.samples, bad=rows.bad + more.bad, counts={**rows.counts, **more.counts})


def _tokens(costs: Sequence[Cost], limit: int) -> Tokens:
    tokens = sorted(cost.tokens for cost in costs)
    return Tokens(
        total=sum(tokens),
        supervised=sum(cost.supervised for cost in costs),
        min=tokens[0],
        median=tokens[(len(tokens) - 1) // 2],
        max=tokens[-1],
        limit=limit,
        histogram=histogram(tokens),
    )


def histogram(values: Sequence[int]) -> tuple[Bucket, ...]:
    """Positive whole numbers in at most `BUCKETS` buckets with round ends: equally wide, or doubling where the largest
    is 16 times the smallest or more.

    Returns:
        buckets from the smallest to the largest value; those between may be empty.
    """
    low, high = min(values), max(values)
    if high >= 16 * low:
        first, last = max(low.bit_length(), high.bit_length() - BUCKETS + 1), high.bit_length()
        edges = [1 << (bits - 1) for bits in range(first, last + 2)]
        edges[0] = min(edges[0], low)  # with more doublings than buckets, the first takes all below it
    else:
        width = next(w for w in _round_numbers() if high // w - low // w < BUCKETS)
        edges = list(range(low // width * width, high + width + 1, width))
    buckets = [
        Bucket(start=start, end=end - 1, rows=sum(start <= value < end for value in values))
        for start, end in pairwise(edges)
    ]
    while buckets and not buckets[-1].rows:
        buckets.pop()
    return tuple(buckets)


def _round_numbers() -> Iterator[int]:
    """1, 2, 5, 10, 20, 50, ..."""
    power = 1
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _drawn(tokens: Tokens) -> str:
    """The histogram as lines of blocks, with its figures."""
    most = max(bucket.rows for bucket in tokens.histogram)
    digits = len(f"{tokens.histogram[-1].end:,}")
    lines = [f"{'tokens':>{2 * digits + 1}}  rows"]
    for bucket in tokens.histogram:
        span = f"{bucket.start:>{digits},}-{bucket.end:>{digits},}"
        lines.append(f"{span}  {_bar(bucket.rows / most)} {bucket.rows:,}".rstrip())
    share = tokens.supervised / tokens.total
    lines.append(
        f"{tokens.total:,} tokens in all, {tokens.supervised:,} of them trained ({share:.1%}); a row has "
        f"{tokens.min:,} to {tokens.max:,}, half have up to {tokens.median:,}; at most {tokens.limit:,} are allowed"
    )
    return "\n".join(lines)


def _bar(share: float) -> str:
    """A bar of `BAR` characters times `share`, in eighths; never nothing for something."""
    eighths = round(share * BAR * 8) or (1 if share else 0)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _listed(title: str, rows: Sequence[BadRow]) -> str:
    return "\n".join([f"{title} ({len(rows):,}):", *(f"  {printable(str(row))}" for row in rows)])


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
