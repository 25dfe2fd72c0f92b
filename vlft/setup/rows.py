"""Find, fetch, measure, refuse and mix the rows of a run, as the flags say. `vlft.setup.schedule` orders them."""

from __future__ import annotations

import contextlib
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vlft.config.flags import DataFlags
from vlft.config.mix import MixedSet
from vlft.data.costs.cache import cost_folder, scan_costs
from vlft.data.costs.columns import Costs
from vlft.data.costs.mix import Share, draws, places
from vlft.data.costs.packing import Budget
from vlft.data.encode import Encoder
from vlft.data.files.index import RowIndex, Rows, each, index_rows
from vlft.data.identity import Marked, Marks
from vlft.data.rows.access import Access
from vlft.data.rows.embedded import Embedded
from vlft.data.rows.fetch import RemoteMedia, fetch
from vlft.data.sample import Cost, Sample
from vlft.errors import BadRow, ConfigError
from vlft.families import Family
from vlft.files import cache_folder
from vlft.screen import count
from vlft.setup.base import Base
from vlft.setup.schedule import pack_budget
from vlft.text import counted

SHOWN_BAD_ROWS = 10


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a mix takes from a data file.

    Attributes:
        rows: number of its rows that are drawn at least once.
        draws: number of draws in an epoch.
    """

    rows: int
    draws: int


@dataclass(frozen=True, kw_only=True)
class MeasuredRows:
    """Rows after the pass over their headers.

    Attributes:
        rows: `samples` are the rows that can be trained, read on access, or the samples that they are split into; with
            `--data_mix` each is repeated as often as an epoch trains it. `bad` are the refused rows, in file order.
            `counts` are the rows read.
        costs: one cost per sample.
        notes: notes to the user about the cache of costs.
        drawn: file -> what a mix takes from it; empty without a mix.
        marked: the rows that can be trained, each once, with their digests; None if there is no evaluation data.
        held_out: file -> number of its rows that `--eval_split` holds out of these.
    """

    rows: Rows
    costs: Costs
    notes: tuple[str, ...] = ()
    drawn: Mapping[str, Drawn] = field(default_factory=dict)
    marked: Marked | None = None
    held_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def starts(self) -> np.ndarray:
        """Index of the first sample of each row, int64 [R]; a row that a mix repeats counts each time."""
        rows: Any = self.rows.samples  # a RowIndex
        return rows.starts

    @property
    def places(self) -> Iterator[tuple[str, int]]:
        """Data file and index in it of each row."""
        rows: Any = self.rows.samples  # a RowIndex
        for start in self.starts.tolist():
            yield rows.files[rows.file_of[start]].name, int(rows.row_of[start])

    @property
    def split(self) -> dict[str, int]:
        """File -> number of samples, if a row is split into samples (`--turns`); else empty."""
        rows: Any = self.rows.samples  # a RowIndex
        if rows.answer_of is None:
            return {}
        return {file.name: int((rows.file_of == place).sum()) for place, file in enumerate(rows.files)}

    @property
    def thought(self) -> dict[str, int]:
        """How many samples have thoughts ("on") and have none ("off"); empty if the chat template has no switch."""
        found = self.costs.columns.get("thinking")
        return {} if found is None else {"on": int((found == 1).sum()), "off": int((found == 0).sum())}

    @property
    def changed(self) -> Iterator[tuple[Sample, str]]:
        """Rows that `--over_length` changed, and how."""
        seen = set()
        for place, how in self.costs.changed.items():
            sample = self.rows.samples[place]
            if (sample.file, sample.index) not in seen:  # a mix may hold it several times
                seen.add((sample.file, sample.index))
                yield sample, how


def samples_line(measured: MeasuredRows) -> str:
    """Say how many samples rows become that are split into samples."""
    rows, samples = len(measured.starts), len(measured.costs)
    if rows == samples:
        return f"samples: of {counted(rows, 'row')} only the last answer is trained (--turns last)"
    return f"samples: {split_line(rows, samples)}"


def split_line(rows: int, samples: int) -> str:
    """Say how many samples some rows become, one for each trained answer."""
    return (
        f"{counted(rows, 'row')} with {samples / rows:.2g} trained answers on average -> "
        f"{counted(samples, 'sample')}, one for each answer with the turns before it (--turns)"
    )


def training_rows(data: DataFlags, base: Base, *, workers: int) -> MeasuredRows:
    """Return the rows that an epoch trains: the rows of `--data_path`, or of `--data_mix`, repeated as it says.

    Raises:
        ConfigError: a row is refused and bad rows are not skipped, or no row is left, also in one data set of a mix.
    """
    measured = trainable_rows(data.training_files, data, base, workers=workers)
    return mixed(measured, data.training_sets) if data.data_mix is not None else measured


def mixed(measured: MeasuredRows, sets: Sequence[MixedSet]) -> MeasuredRows:
    """Return the rows as often as an epoch of a mix trains them.

    Raises:
        ConfigError: no row of a data set is left.
    """
    rows: Any = measured.rows.samples  # a RowIndex
    starts = measured.starts
    of_set = [np.flatnonzero(rows.file_of[starts] == place) for place in range(len(sets))]
    for one, found in zip(sets, of_set, strict=True):
        if not len(found):
            rest = ", since --eval_split holds out the last ones" if measured.held_out.get(one.path) else ""
            raise ConfigError(
                f"{one.path}: none of its rows can be trained{rest}. Drop it from --data_mix, or fix its rows."
            )
    shares = [
        Share(rows=len(found), weight=one.weight, repeat=one.repeat, cap=one.cap)
        for one, found in zip(sets, of_set, strict=True)
    ]
    counts = draws(shares)
    drawn = [
        found[places(share, count, seed=f"{place}/{share.rows}")]
        for place, (found, share, count) in enumerate(zip(of_set, shares, counts, strict=True))
    ]
    chosen = samples_of(np.concatenate(drawn), starts, len(rows))
    return replace(
        measured,
        rows=replace(measured.rows, samples=rows.take(chosen)),
        costs=measured.costs.take(chosen),
        drawn={
            one.path: Drawn(rows=len(np.unique(some)), draws=len(some)) for one, some in zip(sets, drawn, strict=True)
        },
    )


def samples_of(rows_R: np.ndarray, starts: np.ndarray, total: int) -> np.ndarray:
    """Return the indices of the samples of some rows, in the order of the rows.

    Args:
        rows_R: the rows, as indices in `starts`.
        starts: index of the first sample of each row.
        total: number of all samples.
    """
    counts_R = np.diff(starts, append=total)[rows_R]
    ends_R = np.cumsum(counts_R)
    within = np.arange(ends_R[-1]) - np.repeat(ends_R - counts_R, counts_R)
    return np.repeat(starts[rows_R], counts_R) + within


def open_rows(paths: Sequence[str], data: DataFlags, family: Family) -> RowIndex:
    """Find the rows of data files. No media are opened; with `--allow_remote_media` they are fetched.

    Raises:
        ConfigError: no file is named, a file cannot be read, or fetched files cannot be saved.
    """
    if not paths:
        raise ConfigError(
            "--data_path is missing: one or more data files (.json, .jsonl, .csv, .parquet, ...) or folders"
        )
    access = _access(data)
    index = _index(paths, data, family, access)
    if access.remote is not None:
        _fetch(each(index), access.remote)
    return index


def _index(paths: Sequence[str], data: DataFlags, family: Family, access: Access) -> RowIndex:
    sets = {path: data.set_of(path) for path in paths}
    return index_rows(
        paths,
        image_folder={path: one.image_folder for path, one in sets.items()},
        columns={path: one.columns for path, one in sets.items()},
        family=family,
        access=access,
        flags=data,
    )


def _access(data: DataFlags) -> Access:
    folder = cache_folder(os.environ, variable="VLFT_MEDIA_CACHE", name="media")
    embedded = None if folder is None else Embedded(folder / "embedded")
    if not data.allow_remote_media:
        return Access(outside=data.allow_outside_folder, embedded=embedded)
    if folder is None:
        raise ConfigError("--allow_remote_media: no folder for fetched files. Set VLFT_MEDIA_CACHE to a folder")
    return Access(outside=data.allow_outside_folder, remote=RemoteMedia(folder), embedded=embedded)


def _fetch(rows: Iterable[Sample | BadRow], remote: RemoteMedia) -> None:
    """Fetch all media that rows name by an address. A row is refused from now on if one of its media is unavailable."""
    wanted: dict[str, str] = {}
    for row in rows:
        files = () if isinstance(row, BadRow) else [path for part in row.media for _, path in part.files]
        wanted |= {path: remote.urls[path] for path in files if path in remote.urls and not os.path.isfile(path)}
    for path, why in count(fetch(wanted), total=len(wanted), what="fetching media"):
        if why is not None:
            remote.failed[path] = why


def open_some(path: str, places: Sequence[int], data: DataFlags, family: Family) -> RowIndex:
    """Find some rows of a data file. No media are opened; with `--allow_remote_media` they are fetched.

    Args:
        path: the data file.
        places: indices of the rows in the file, from 0.
        data: flags of the data.
        family: family whose boxes the rows hold.

    Raises:
        ConfigError: the file cannot be read, or has no such row.
    """
    access = _access(data)
    rows = _index([path], data, family, access)
    for place in places:
        if not 0 <= place < len(rows):
            raise ConfigError(
                f"--index {place}: {path} has {len(rows):,} rows, counted from 0. Use 0 to {len(rows) - 1}."
            )
    some = rows.take(places)
    if access.remote is not None:
        _fetch(each(some), access.remote)
    return some


def trainable_rows(paths: Sequence[str], data: DataFlags, base: Base, *, workers: int) -> MeasuredRows:
    """Return the rows of data files that can be trained, and every refusal that file headers show.

    A row that an earlier run measured is not measured again if its files have not changed (`vlft.data.costs.cache`).

    Raises:
        ConfigError: a row is refused and bad rows are not skipped, or no row is left.
    """
    rows = open_rows(paths, data, base.family)
    cache = cost_folder(os.environ)
    marks = Marks() if data.eval_path or data.eval_split is not None else None
    measured = measure_rows(rows, base.encoder, workers=workers, budget=pack_budget(data), cache=cache, marks=marks)
    bad = measured.rows.bad
    stops = [row for row in bad if not (row.too_long and data.over_length == "skip")]
    if stops and data.on_bad_row == "error":
        lines = "\n".join(f"  {row}" for row in stops[:SHOWN_BAD_ROWS])
        more = f"\n  and {len(stops) - SHOWN_BAD_ROWS} more" if len(stops) > SHOWN_BAD_ROWS else ""
        raise ConfigError(
            f"{len(stops)} of {sum(measured.rows.counts.values())} rows cannot be trained:\n{lines}{more}\n"
            "  All of them: vlft check-data with the same flags. Fix them, or train on the rest: --on_bad_row skip"
        )
    if not measured.rows.samples:
        raise ConfigError(f"{', '.join(paths)}: no row is left to train ({len(bad)} were refused, e.g. {bad[0]})")
    return measured


def measure_rows(
    index: RowIndex,
    encoder: Encoder,
    *,
    workers: int,
    budget: Budget | None = None,
    cache: Path | None = None,
    marks: Marks | None = None,
) -> MeasuredRows:
    """Measure the cost of each row and find the rows that cannot be trained, before training starts.

    Args:
        index: the rows.
        encoder: measures the rows.
        workers: number of processes that share the work.
        budget: budget of a pack, which a row must fit; None without packing.
        cache: folder of costs saved between runs (`cost_folder`); None measures every row.
        marks: collects the digests of the rows; None: they are not computed.
    """
    notes: list[str] = []
    good = array("q")
    bad: list[BadRow] = []

    def costs() -> Iterator[Cost]:
        for place, result in enumerate(count(results, total=len(index), what="measuring rows")):
            if isinstance(result, BadRow):
                bad.append(result)
            elif budget is not None and (why := budget.over_any(result)):
                row = index[place]
                name = {"file": row.file, "index": row.index, "id": row.id}
                bad.append(BadRow(**name, field="conversations", reason=why, too_long=True))  # type: ignore[arg-type]
            else:
                for sample in result.samples:
                    good.append(place)
                    yield sample

    # Closed, so that measured costs are saved also if Ctrl-C or an error ends the loop.
    with contextlib.closing(
        scan_costs(index, encoder, workers=workers, folder=cache, note=notes.append, marks=marks)
    ) as results:
        found = Costs.of(costs())
    places = np.frombuffer(good, dtype=np.int64)
    samples = index.take(places)
    if (answers := found.columns.get("answer")) is not None:
        samples = samples.split(answers)
    return MeasuredRows(
        rows=Rows(samples=samples, bad=tuple(bad), counts=index.counts),
        costs=found,
        notes=tuple(notes),
        marked=None if marks is None else marks.of(index, places),
    )
