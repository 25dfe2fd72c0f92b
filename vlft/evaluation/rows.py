"""Rows to ask a model about: read, measured and refused. Loads no model. `vlft.setup.asked` has the questions.

Neighbours: `vlft.evaluation.answers_file` keeps the answers, `vlft.evaluation.ask` gets them from a model.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlft.config.flags import DataFlags
from vlft.data.costs.cache import Costing, cost_folder, scan_kept
from vlft.data.encode import Encoder
from vlft.data.files.index import RowIndex, each
from vlft.data.rows.forms import pair_form_of
from vlft.data.rows.parts import question_of
from vlft.data.sample import Cost, Sample
from vlft.errors import BadRow, ConfigError
from vlft.families import Family
from vlft.screen import count
from vlft.setup.rows import SHOWN_BAD_ROWS, open_rows
from vlft.text import counted

WORKERS = 4  # processes that measure rows, at most one per core

Place = tuple[str, int]  # data file, and index of the row in it


@dataclass(frozen=True, kw_only=True)
class ReadRows:
    """The rows of some data files.

    Attributes:
        samples: rows that can be read, in the order of the files.
        bad: rows that are refused.
        prints: data file -> sha256 of its rows, in hex.
    """

    samples: tuple[Sample, ...]
    bad: tuple[BadRow, ...]
    prints: Mapping[str, str]


def read_rows(
    files: Sequence[str],
    data: DataFlags,
    family: Family,
    *,
    limit: int | None,
    chosen: Mapping[str, frozenset[int]] | None = None,
) -> ReadRows:
    """Parse rows. No media are opened. The right answer of a preference row is the chosen one.

    Args:
        files: data files.
        data: how they are read.
        family: its control tokens are refused.
        limit: most rows, from the first on; None: all.
        chosen: the only rows to read, as absolute path of a data file -> indices; None: all.

    Raises:
        ConfigError: a file cannot be read, or has none of the chosen rows.
    """
    index = open_rows(files, data, family)
    if chosen is not None:
        index = _chosen(index, chosen)
    total = len(index) if limit is None else min(limit, len(index))
    samples: list[Sample] = []
    bad: list[BadRow] = []
    for place, row in enumerate(count(itertools.islice(each(index), total), total=total, what="reading rows")):
        if isinstance(row, BadRow):
            row = _preferred(index, place, row, data)
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            samples.append(row)
    prints = {file.name: file.print().hex() for file in index.files}
    return ReadRows(samples=tuple(samples), bad=tuple(bad), prints=prints)


def _chosen(index: RowIndex, chosen: Mapping[str, frozenset[int]]) -> RowIndex:
    own = [chosen.get(os.path.abspath(file.name), frozenset()) for file in index.files]
    some = index.take([place for place in range(len(index)) if int(index.row_of[place]) in own[index.file_of[place]]])
    if len(some) != (wanted := sum(map(len, chosen.values()))):
        names = ", ".join(chosen)
        raise ConfigError(
            f"--held_out: {wanted:,} rows of {names} were held out, and {len(some):,} of them are there now. The data "
            "have changed since: name the files to evaluate on."
        )
    return some


def _preferred(index: RowIndex, place: int, bad: BadRow, data: DataFlags) -> Sample | BadRow:
    """Read a refused row again, as a preference row if it is one."""
    raw = index.raw(place)
    if not isinstance(raw, dict) or pair_form_of(raw) is None:
        return bad
    own = index.take([place])
    pairs = RowIndex(
        own.files,
        own.file_of,
        own.row_of,
        family=own.family,
        access=own.access,
        flags=replace(data, method="dpo"),
    )
    (row,) = each(pairs)
    return row


def place_of(row: Sample | BadRow) -> Place:
    """The name of a row by which answers are found."""
    return row.file, row.index


def refuse_bad(bad: Sequence[BadRow], total: int, data: DataFlags) -> None:
    """Refuse to evaluate while a row is refused, unless bad rows are skipped.

    Raises:
        ConfigError: names the first rows and the reasons.
    """
    if not bad or (data.on_bad_row == "skip" and len(bad) < total):
        return
    if data.on_bad_row == "skip":
        raise ConfigError(f"no row is left to evaluate: all {total:,} were refused, e.g. {bad[0]}")
    lines = "\n".join(f"  {row}" for row in bad[:SHOWN_BAD_ROWS])
    more = f"\n  and {len(bad) - SHOWN_BAD_ROWS} more" if len(bad) > SHOWN_BAD_ROWS else ""
    raise ConfigError(
        f"{len(bad):,} of {counted(total, 'row')} cannot be evaluated:\n{lines}{more}\n"
        "  Fix them, or evaluate the rest: --on_bad_row skip"
    )


def measured(
    samples: Sequence[Sample], encoder: Encoder, *, limit: int, longest: int, say: Callable[[str], None]
) -> list[int | BadRow]:
    """Return the tokens of each row's prompt, or why the model cannot be asked about it.

    Headers of its media are read, and no media are decoded. What an earlier call measured is not measured again if its
    files have not changed (`vlft.data.costs.cache`).

    Args:
        samples: the rows.
        encoder: of the model.
        limit: most tokens of prompt and answer together that the model supports.
        longest: most tokens of an answer.
        say: prints a line for the user.
    """

    def checked(sample: Sample, found: Cost | BadRow) -> int | BadRow:
        if isinstance(found, BadRow):
            return found
        if found.tokens + longest <= limit:
            return found.tokens
        reason = (
            f"the prompt is about {found.tokens:,} tokens long and --max_new_tokens is {longest:,}; the model supports "
            f"{limit:,} together. Lower --max_new_tokens, or drop the row"
        )
        return BadRow(file=sample.file, index=sample.index, id=sample.id, field="conversations", reason=reason)

    found = scan_kept(
        _Held(samples),  # type: ignore[arg-type]
        _Prompt(encoder),
        encoder,
        _Prompting,
        workers=WORKERS,
        folder=cost_folder(os.environ),
        note=say,
        what="lengths of prompts",
    )
    with contextlib.closing(found) as results:
        each_one = count(results, total=len(samples), what="measuring rows")
        return [checked(sample, one) for sample, one in zip(samples, each_one, strict=True)]


@dataclass(frozen=True)
class _Prompt:
    """Measures the prompt of a row, in worker processes."""

    encoder: Encoder

    def __call__(self, sample: Sample) -> Cost:
        return self.encoder.measure_prompt(question_of(sample))


class _Prompting(Costing):
    """The costs of prompts in the cache, which has those of rows as well."""

    name = "prompt"


@dataclass(frozen=True)
class _File:
    name: str


class _Held(Sequence[Sample]):
    """Rows that are in memory, with what the cache reads of a `RowIndex`."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        names = list(dict.fromkeys(sample.file for sample in samples))
        self.files = [_File(name) for name in names]
        place_of = {name: place for place, name in enumerate(names)}
        self.file_of = [place_of[sample.file] for sample in samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, place: Any) -> Any:
        return self.samples[place]
