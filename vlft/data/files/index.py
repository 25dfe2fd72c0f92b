"""The rows of data files as a sequence that is read and parsed one at a time, so that millions of them need no room.

Held in memory is where each row stands, 28 bytes of it; a row is read and parsed when it is asked for, in whichever
process asks. Joins rows and records; opens data files, and no media.
"""

from __future__ import annotations

import array
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from vlft.config.columns import Columns
from vlft.config.recipe import RowFlags
from vlft.data.files.mapping import mapped, missing, refuse_missing
from vlft.data.files.read import LINE_BYTES, BrokenLine, files_of, opened, row_of, row_spans
from vlft.data.files.unpack import restored
from vlft.data.rows.access import Access
from vlft.data.rows.records import parse_record
from vlft.data.sample import Sample
from vlft.errors import BadRow, ConfigError, DataError
from vlft.families import Family

SHOWN_KEYS = 1000  # of rows, for a message


class DataFile:
    """An open data file, and where its rows stand. Replaced by another since, it is read as it was; written to, not.

    Attributes:
        name: as the user gave it, for messages.
        image_folder: where relative media paths start; None: the folder of the file.
        columns: by which rows are read (`--columns`); None: as they stand.

    Raises:
        ConfigError: as `rows.opened` and `rows.row_spans`; or no row has a column that is to be read.
    """

    def __init__(self, name: str, *, image_folder: str | None, columns: Columns | None = None) -> None:
        self.name = name
        self.image_folder = image_folder
        starts, lengths, lines = array.array("q"), array.array("q"), array.array("i")
        found = opened(name, columns)
        self.columns = columns
        self._path, self._digest = found.file, found.digest
        self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115 - as long as there is an index of it
        self._stamp = self._now()  # before the rows are looked for: what is written meanwhile is seen
        for span in row_spans(self._path):
            starts.append(span.start)
            lengths.append(span.length)
            lines.append(span.line)
        self._starts, self._lengths, self._lines = starts, lengths, lines
        if found.keys is None and columns is not None:
            self._check(columns)

    def _check(self, columns: Columns) -> None:
        """Refuse columns that no row has; reads rows until each has been seen."""
        keys: dict[str, None] = {}
        absent = list(columns.names)
        for row in range(len(self)):
            raw = self._read(row)
            if isinstance(raw, dict):
                absent = [name for name in absent if name in missing(columns, raw)]
                if not absent:
                    return
                if len(keys) < SHOWN_KEYS:
                    keys |= dict.fromkeys(raw)
        refuse_missing(self.name, columns, absent, keys)

    def __len__(self) -> int:
        return len(self._starts)

    def raw(self, row: int) -> object:
        """A row, in the plain form where columns name its parts, or the `rows.BrokenLine` that stands in its place."""
        value = restored(self._read(row))
        return value if self.columns is None or isinstance(value, BrokenLine) else mapped(value, self.columns)

    def print(self) -> bytes:
        """A print of all that its rows say, wherever they are unpacked to; 32 bytes. A file of JSON is read for it."""
        if self._digest is not None:
            return bytes.fromhex(self._digest)
        with open(self._path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def _read(self, row: int) -> object:
        if self._now() != self._stamp:
            return BrokenLine(reason=f"{self.name} has been written to since its rows were counted. Run again")
        line, length = self._lines[row], self._lengths[row]
        most = LINE_BYTES + 1 if line else length
        return row_of(os.pread(self._file.fileno(), min(length, most), self._starts[row]), line)

    def _now(self) -> tuple[int, int]:
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        try:
            self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            unpacked = "" if self._path == self.name else " (what it was unpacked to)"
            raise ConfigError(
                f"{self._path}{unpacked}: cannot be read by every process of the run: {error.strerror}. Several nodes "
                "need one folder for data, and for VLFT_MEDIA_CACHE"
            ) from error
        if self._now() != self._stamp:
            raise ConfigError(f"{self._path}: has changed while the run started. Run again")


class RowIndex(Sequence[Sample]):
    """Rows of data files, in the order of the files or in another one, maybe several times.

    Args:
        files: they stand in.
        file_of: of each row, its place in `files`; int32 [N].
        row_of: of each row, its number in the file; int32 [N].
        family: whose control tokens are refused.
        access: what rows may name.
        flags: how rows are read; None: all at their defaults.

    Indexing raises `DataError` where a row cannot be trained, as `records.parse_record` says it.
    """

    def __init__(
        self,
        files: Sequence[DataFile],
        file_of: np.ndarray,
        row_of: np.ndarray,
        *,
        family: Family,
        access: Access,
        flags: RowFlags | None = None,
    ) -> None:
        self.files = tuple(files)
        self.file_of = file_of
        self.row_of = row_of
        self.family = family
        self.access = access
        self.flags = flags or RowFlags()

    def __len__(self) -> int:
        return len(self.row_of)

    @overload
    def __getitem__(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, place: slice) -> RowIndex: ...

    def __getitem__(self, place: int | slice) -> Sample | RowIndex:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        file, row = self.files[self.file_of[place]], int(self.row_of[place])
        return parse_record(
            file.raw(row),
            file=file.name,
            index=row,
            image_folder=file.image_folder,
            family=self.family,
            access=self.access,
            flags=self.flags,
        )

    def raw(self, place: int) -> object:
        """A row as its file has it."""
        return self.files[self.file_of[place]].raw(int(self.row_of[place]))

    def take(self, places: Sequence[int] | np.ndarray) -> RowIndex:
        """The rows at these places, in their order."""
        chosen = np.asarray(places, dtype=np.int64)
        return RowIndex(
            self.files,
            self.file_of[chosen],
            self.row_of[chosen],
            family=self.family,
            access=self.access,
            flags=self.flags,
        )

    @property
    def counts(self) -> dict[str, int]:
        """File -> rows it holds."""
        return {file.name: len(file) for file in self.files}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of data files, told apart.

    Attributes:
        samples: rows that can be trained, in the order of the files.
        bad: rows that cannot.
        counts: file -> rows read; their sum is `len(samples) + len(bad)`.
    """

    samples: Sequence[Sample]
    bad: tuple[BadRow, ...]
    counts: dict[str, int]


def index_rows(
    paths: Sequence[str],
    *,
    image_folder: str | Mapping[str, str | None] | None,
    family: Family,
    access: Access | None = None,
    columns: Mapping[str, Columns | None] | Columns | None = None,
    flags: RowFlags | None = None,
) -> RowIndex:
    """Find the rows of data files; none is parsed yet.

    Args:
        paths: data files: of JSON, or tables.
        image_folder: where relative media paths start, for all files or by path; None: the folder of the data file that
            names them.
        family: whose control tokens are refused.
        access: what rows may name; None: files in the folder, and absolute paths.
        columns: by which rows are read, for all files or by path; None: rows as they stand.
        flags: how rows are read; None: all at their defaults.

    Raises:
        ConfigError: a file cannot be read at all, is named twice, or an image folder does not exist.
    """
    folders = image_folder if isinstance(image_folder, Mapping) else dict.fromkeys(paths, image_folder)
    for folder in folders.values():
        if folder is not None and not os.path.isdir(folder):
            raise ConfigError(f"--image_folder {folder}: no such folder. Name the one that media paths start from.")
    seen: dict[str, str] = {}
    for path in paths:
        for real in map(os.path.realpath, [path] if len(paths) == 1 else files_of(path)):
            if real in seen:
                raise ConfigError(
                    f"one data file is named twice: {seen[real]} and {path}. Its rows would be trained twice: drop one."
                )
            seen[real] = path
    by = columns if isinstance(columns, Mapping) else dict.fromkeys(paths, columns)
    files = [DataFile(path, image_folder=folders[path], columns=by[path]) for path in paths]
    return RowIndex(
        files,
        np.repeat(np.arange(len(files), dtype=np.int32), [len(file) for file in files]),
        np.concatenate([np.arange(len(file), dtype=np.int32) for file in files]),
        family=family,
        access=access or Access(),
        flags=flags,
    )


def parsed(index: RowIndex) -> Rows:
    """Every row of an index, all in memory: for few of them."""
    samples, bad = [], []
    for row in each(index):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            samples.append(row)
    return Rows(samples=tuple(samples), bad=tuple(bad), counts=index.counts)


def each(index: RowIndex) -> Iterator[Sample | BadRow]:
    """The rows one after another, or why they are refused."""
    for place in range(len(index)):
        try:
            yield index[place]
        except DataError as error:
            yield error.row
