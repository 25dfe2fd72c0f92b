"""Find every row that the loader would refuse, measure the other rows, and collect warnings about them, in one pass.

With a base (`--model_id`) rows are measured exactly as for training. Without one their structure and media are checked
against the stock budgets of the default family, and tokens are not counted. Rows are read one at a time. Results are
cached, so that an interrupted check resumes where it stopped. `vlft.check.row` inspects one row, `vlft.check.result`
holds the result, `vlft.check.page` and `vlft.check.fix` write it to files.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from vlft.check.kinds import kind_key
from vlft.check.pairs import PairTally
from vlft.check.result import Checked, histogram, tokens_of
from vlft.check.row import NO_RATE, RowCheck, RowFacts
from vlft.check.twins import Compared, Digests
from vlft.config.flags import DataFlags, ModelFlags
from vlft.data.costs.cache import scan_kept
from vlft.data.files.index import RowIndex
from vlft.data.identity import Marks
from vlft.data.rows.keys import UNREAD
from vlft.errors import BadRow
from vlft.families import DEFAULT
from vlft.screen import count
from vlft.setup import open_base, open_rows, remarks_on_pixels, stock_probe
from vlft.setup.held_out import held_out_rows
from vlft.setup.overlap import overlap
from vlft.setup.schedule import pack_budget
from vlft.text import counted

DECODE_CHUNK = 4  # rows that a process returns at once if every frame is decoded
LISTED = 100_000  # warnings that are listed; a data set with more repeats the same warning in every row
REFUSED = "refused: "  # prefix of the name of a kind of refused rows
NOTABLE = 6  # rows of a kind that the page shows with pictures
WORST = ("longest", "most pictures and videos")  # kinds of rows that are shown although nothing is wrong with them


@dataclass(frozen=True, kw_only=True, order=True)
class _Ranked:
    worse: float
    place: int
    what: str


@dataclass(kw_only=True)
class Notable:
    """Rows for a person to inspect, a few of each kind: of a fault (`kind_key`), or one of `WORST`."""

    _firsts: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    _heaps: dict[str, list[_Ranked]] = field(default_factory=dict)

    @property
    def rows(self) -> dict[str, list[tuple[int, str]]]:
        """Kind -> (position in the index, why the row is listed), the worst rows first."""
        worst = {
            kind: [(-one.place, one.what) for one in sorted(heap, reverse=True)] for kind, heap in self._heaps.items()
        }
        return worst | self._firsts

    def first(self, kind: str, place: int, what: str) -> None:
        """Add a row if it is among the first `NOTABLE` rows of its kind."""
        some = self._firsts.setdefault(kind, [])
        if len(some) < NOTABLE:
            some.append((place, what))

    def worst(self, kind: str, worse: float, place: int, what: str) -> None:
        """Add a row if it is among the `NOTABLE` rows of its kind with the largest `worse`."""
        heap = self._heaps.setdefault(kind, [])
        entry = _Ranked(worse=worse, place=-place, what=what)
        (heapq.heappush if len(heap) < NOTABLE else heapq.heappushpop)(heap, entry)


@dataclass(kw_only=True)
class _Tally:
    """Totals of a check. They take a few bytes per row and hold no row."""

    tokens: array = field(default_factory=lambda: array("i"))
    supervised: array = field(default_factory=lambda: array("i"))
    media: array = field(default_factory=lambda: array("i"))
    kilopixels: array = field(default_factory=lambda: array("i"))
    good: array = field(default_factory=lambda: array("q"))
    digests: Digests = field(default_factory=Digests)
    pairs: PairTally = field(default_factory=PairTally)
    images: int = 0
    videos: int = 0
    unlisted: int = 0
    left_out: int = 0
    bad: list[BadRow] = field(default_factory=list)
    warnings: list[BadRow] = field(default_factory=list)
    notable: Notable = field(default_factory=Notable)
    keys: dict[tuple[str, str], tuple[int, BadRow, set[int]]] = field(default_factory=dict)

    def refuse(self, place: int, row: BadRow) -> None:
        self.bad.append(row)
        self.notable.first(REFUSED + kind_key(row.reason), place, str(row))

    def leave_out(self, place: int, row: BadRow) -> None:
        self.left_out += 1
        self.warn(place, replace(row, reason=f"left out (--over_length skip): {row.reason}"))

    def warn(self, place: int, row: BadRow) -> None:
        if len(self.warnings) < LISTED:
            self.warnings.append(row)
        else:
            self.unlisted += 1
        self.notable.first(kind_key(row.reason), place, str(row))

    def once(self, place: int, row: BadRow) -> None:
        """Count a remark that most likely applies to every row, such as on a key: one warning per key and file."""
        key = row.file, re.sub(r"\[\d+\]", "[]", row.field)
        first = self.keys.setdefault(key, (place, row, set()))
        first[2].add(row.index)

    def warn_once(self) -> None:
        """Add the warnings that `once` has counted."""
        for place, row, rows in self.keys.values():
            what = "this key" if row.reason.startswith(UNREAD) else "such a list"
            count = f". {len(rows):,} rows of the file have {what}" if len(rows) > 1 else ""
            self.warn(place, replace(row, reason=f"{row.reason}{count}"))

    def take(self, place: int, seen: RowFacts) -> None:
        cost = max(seen.cost.samples, key=lambda one: one.tokens)
        self.good.append(place)
        self.digests.take(seen)
        self.pairs.take(place, seen.answers)
        for one in seen.cost.samples:
            self.tokens.append(one.tokens)
            self.supervised.append(one.supervised)
        self.media.append(len(seen.pictures) + seen.videos)
        self.images += len(seen.pictures)
        self.videos += seen.videos
        for width, height, *_ in seen.pictures:
            self.kilopixels.append(max(1, width * height // 1000))
        if cost.tokens:
            self.notable.worst(WORST[0], cost.tokens, place, f"{cost.tokens:,} tokens")
        if self.media[-1]:
            self.notable.worst(WORST[1], self.media[-1], place, f"{self.media[-1]:,} of them")


@dataclass(frozen=True, kw_only=True)
class Check:
    """A completed check.

    Attributes:
        found: the result.
        index: all rows; the rows to train on come first.
        training: number of rows to train on.
        good: positions of the rows that can be trained, int64 [R].
        compared: the rows at these positions.
        repeats: positions of rows that repeat an earlier row -> the reason why they are not needed.
        notable: suspicious rows, for a person to inspect.
    """

    found: Checked
    index: RowIndex
    training: int
    good: np.ndarray
    compared: Compared
    repeats: dict[int, BadRow]
    notable: Notable


def check(
    files: Sequence[str],
    data: DataFlags,
    model: ModelFlags,
    *,
    given: frozenset[str],
    headers_only: bool,
    workers: int,
    cache: Path | None = None,
    before: Callable[[RowIndex], None] = lambda index: None,
    seed: int = 42,
) -> Check:
    """Find every row that the loader would refuse.

    Args:
        files: data files; the files of `--eval_path` are checked after them.
        data: flags of the data, as for training.
        model: flags of the model, as for training.
        given: names of the flags that the user set.
        headers_only: read headers and decode nothing; a file that ends early is then not noticed.
        workers: number of processes that share the work.
        cache: folder where results are saved for the next check; None saves nothing.
        before: called with all rows before the first row is checked.
        seed: chooses the rows that `--eval_split` would hold out.

    Raises:
        ConfigError: a file cannot be read at all, or a flag cannot be applied.
        CheckpointError: the base is missing, incomplete, or not a Qwen-VL.
    """
    base = open_base(data, model, given=given, plain=True) if model.model_id is not None else None
    family = DEFAULT if base is None else base.family
    probe = stock_probe(data, family) if base is None else base.encoder
    index = open_rows(_with_evaluation(files, data), data, family)
    budget = pack_budget(data) if base is not None else None  # tokens are counted with a base only
    before(index)
    notes: list[str] = []
    marks = Marks() if data.eval_split is not None else None
    look = RowCheck(probe, family=family, decode=not headers_only, rate_given=data.frames_fps is not None)
    results = scan_kept(
        index,
        look,
        probe,
        look,
        workers=workers,
        folder=cache,
        note=notes.append,
        what="results of the check",
        chunk=4 * DECODE_CHUNK if headers_only else DECODE_CHUNK,
        marks=marks,
    )
    tally = _Tally()
    word = "reading headers of rows" if headers_only else "decoding rows"
    with contextlib.closing(results):  # so that results are saved also if Ctrl-C or an error ends the loop
        for place, result in enumerate(count(results, total=len(index), what=word)):
            if not isinstance(result, BadRow) and budget is not None and (why := budget.over_any(result.cost)):
                result = replace(_row(index, place, "conversations", why), too_long=True)
            if isinstance(result, BadRow) and result.too_long and data.over_length == "skip":
                tally.leave_out(place, result)
            elif isinstance(result, BadRow):
                tally.refuse(place, result)
            else:
                tally.take(place, result)
                for where, remark in result.warnings:
                    row = _row(index, place, where, remark)
                    (tally.once if remark.startswith((UNREAD, NO_RATE)) else tally.warn)(place, row)
    tally.warn_once()
    if base is not None and tally.videos:
        notes += remarks_on_pixels(base, data)
    good = np.frombuffer(tally.good, dtype=np.int64)
    if marks is not None and data.eval_split is not None and len(good):
        out_R, remark = held_out_rows(marks.of(index, good), data.eval_split, seed=seed)
        held = f"{int(out_R.sum()):,} of {counted(len(good), 'row')} to evaluate on"
        notes.append(remark or f"--eval_split {data.eval_split:g}, --seed {seed} holds out {held}")
    compared = Compared.of(tally.digests, index.take(good), by_content=not headers_only)
    repeats = {
        int(good[row]): _row(
            index, int(good[row]), "row", f"the same turns and pictures as {compared.marked.name_of(first)}"
        )
        for row, first in compared.repeats()
    }
    for place, row in repeats.items():
        tally.warn(place, row)
    swapped = list(tally.pairs.swapped())
    for place, first in swapped:
        why = f"the same prompt as {index.name_of(first)}, with the other answer chosen. Drop one of the two rows"
        tally.warn(place, _row(index, place, "row", why))
    limit = base.recipe.max_length if base is not None else None
    if limit is not None and budget is not None:
        limit = min(limit, budget.tokens)
    tokens = np.frombuffer(tally.tokens, dtype=np.int32)
    found = Checked(
        counts=index.counts,
        ok=len(good),
        samples=len(tally.tokens),
        bad=tuple(tally.bad),
        warnings=tuple(sorted(tally.warnings, key=_place(index))),
        unlisted=tally.unlisted,
        left_out=tally.left_out,
        images=tally.images,
        videos=tally.videos,
        pictures_per_row=histogram(tally.media) if any(tally.media) else (),
        kilopixels=histogram(tally.kilopixels) if tally.kilopixels else (),
        decoded=not headers_only,
        tokens=tokens_of(tokens, np.frombuffer(tally.supervised, dtype=np.int32), limit)
        if len(tokens) and limit is not None
        else None,
        based=base is not None,
        notes=tuple(notes),
        overlap=_overlap(compared, files, data),
        pairs=tally.pairs.result(len(swapped)),
    )
    training = sum(found.counts[file] for file in files)
    return Check(
        found=found,
        index=index,
        training=training,
        good=good,
        compared=compared,
        repeats=repeats,
        notable=tally.notable,
    )


def _with_evaluation(files: Sequence[str], data: DataFlags) -> list[str]:
    """Return the data files, followed by the files of `--eval_path` that are not among them."""
    named = {os.path.realpath(file) for file in files}
    return [*files, *(file for file in data.eval_path if os.path.realpath(file) not in named)]


def _row(index: RowIndex, place: int, where: str, reason: str) -> BadRow:
    sample = index[place]
    return BadRow(file=sample.file, index=sample.index, id=sample.id, field=where, reason=reason)


def _overlap(compared: Compared, files: Sequence[str], data: DataFlags) -> tuple[str, ...]:
    """Compare the rows of the data files with those of `--eval_path`; a file may be both."""
    if not data.eval_path:
        return ()
    evaluated = {os.path.realpath(file) for file in data.eval_path}
    both = np.array([os.path.realpath(file.name) in evaluated for file in compared.index.files])
    file_of = compared.index.file_of
    return overlap(compared.marked.take(file_of < len(files)), compared.marked.take(both[file_of]))


def _place(index: RowIndex) -> Callable[[BadRow], tuple[int, int]]:
    position = {file.name: i for i, file in enumerate(index.files)}
    return lambda row: (position[row.file], row.index)
