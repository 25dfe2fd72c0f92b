"""The rows of data files as a sequence that reads and parses one row at a time, so that millions fit into memory.

Only the position of each row is in memory, 28 bytes per row. A row is read and parsed when it is indexed, in the
process that indexes it. Combines `vlft.data.files.read` and `vlft.data.rows.records`. Opens data files, but no media.
"""

from __future__ import annotations

import array
import copy
import hashlib
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

from vlft.config.columns import Columns
from vlft.config.row_flags import RowFlags
from vlft.data.files.mapping import mapped, missing, refuse_missing
from vlft.data.files.read import LINE_BYTES, BrokenLine, files_of, opened, row_of, row_spans
from vlft.data.files.unpack import restored
from vlft.data.rows.access import Access
from vlft.data.rows.compact import packed, unpacked
from vlft.data.rows.parts import up_to
from vlft.data.rows.records import parse_record
from vlft.data.sample import Sample
from vlft.data.shared_cache import SharedCache
from vlft.errors import BadRow, ConfigError, DataError
from vlft.families import Family

SHOWN_KEYS = 1000  # keys of rows that are collected for a message
_KEY = struct.Struct("<ii")  # of a row in `SharedCache`: its file, its index in the file


class DataFile:
    """An open data file, and the positions of its rows.

    If the file is replaced by another one later, the old content is read. If it is written to, its rows are refused.

    Attributes:
        name: the path as the user wrote it, for messages.
        image_folder: where relative media paths start. None: the folder of the file.
        columns: the mapping of `--columns`. None: rows are read as they are.
        pairs: whether its rows are read as preference rows, for the names of a table's columns.

    Raises:
        ConfigError: the file does not exist, cannot be read or unpacked, holds no rows, or no row has a column that
            `columns` names.
    """

    def __init__(
        self, name: str, *, image_folder: str | None, columns: Columns | None = None, pairs: bool = False
    ) -> None:
        self.name = name
        self.image_folder = image_folder
        starts, lengths, lines = array.array("q"), array.array("q"), array.array("i")
        found = opened(name, columns, pairs=pairs)
        self.columns = columns
        self._path, self._digest = found.file, found.digest
        self._file = open(self._path, "rb", buffering=0)  # noqa: SIM115 - open as long as this object exists
        self._stamp = self._now()  # taken before the rows are located, to detect writes during that time
        for span in row_spans(self._path):
            starts.append(span.start)
            lengths.append(span.length)
            lines.append(span.line)
        self._starts, self._lengths, self._lines = starts, lengths, lines
        if found.keys is None and columns is not None:
            self._check(columns)

    def _check(self, columns: Columns) -> None:
        """Refuse columns that no row has. Reads rows until each column has occurred."""
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
        """Return a row, mapped to the plain form if there are columns, or the `BrokenLine` that stands in for it."""
        value = restored(self._read(row))
        return value if self.columns is None or isinstance(value, BrokenLine) else mapped(value, self.columns)

    def print(self) -> bytes:
        """Return a digest of all rows, 32 bytes. It does not depend on the folder of an unpacked table.

        For a JSON file, this reads the whole file.
        """
        if self._digest is not None:
            return bytes.fromhex(self._digest)
        with open(self._path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    def _read(self, row: int) -> object:
        if self.written_to:
            return BrokenLine(reason=f"{self.name} was written to after its rows were counted. Run again")
        line, length = self._lines[row], self._lengths[row]
        most = LINE_BYTES + 1 if line else length
        return row_of(os.pread(self._file.fileno(), min(length, most), self._starts[row]), line)

    @property
    def written_to(self) -> bool:
        """Whether the file has changed after its rows were located."""
        return self._now() != self._stamp

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
            unpacked = "" if self._path == self.name else f" (the unpacked rows of {self.name})"
            raise ConfigError(
                f"{self._path}{unpacked}: cannot be read by every process of the run: {error.strerror}. Several nodes "
                "need a shared folder for data, and for VLFT_MEDIA_CACHE"
            ) from error
        if self.written_to:
            raise ConfigError(f"{self._path}: changed while the run started. Run again")


class RowIndex(Sequence[Sample]):
    """Rows of data files, or samples that they are split into, in any order. A row may occur several times.

    Indexing with an integer raises `DataError` if the row cannot be trained (`records.parse_record`).

    Args:
        files: the data files.
        file_of: for each row, the index of its file in `files`; int32 [N].
        row_of: for each row, its index in the file; int32 [N].
        family: its control tokens are refused.
        access: which files rows may name.
        flags: how rows are read. None: the defaults.
        answer_of: for each entry, the place of the turn that it ends with (`vlft.data.rows.parts`), -1 for a whole row;
            int32 [N]. None: all rows are whole.
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
        answer_of: np.ndarray | None = None,
    ) -> None:
        self.files = tuple(files)
        self.file_of = file_of
        self.row_of = row_of
        self.family = family
        self.access = access
        self.flags = flags or RowFlags()
        self.answer_of = answer_of
        self._kept = SharedCache()

    def __len__(self) -> int:
        return len(self.row_of)

    @overload
    def __getitem__(self, place: int) -> Sample: ...

    @overload
    def __getitem__(self, place: slice) -> RowIndex: ...

    def __getitem__(self, place: int | slice) -> Sample | RowIndex:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        sample = self._sample(int(self.file_of[place]), int(self.row_of[place]))
        answer = -1 if self.answer_of is None else int(self.answer_of[place])
        return sample if answer < 0 else up_to(sample, answer)

    def _sample(self, of: int, row: int) -> Sample:
        """Parse a row, or take it from the memory that processes share: a row is parsed once, also over epochs."""
        file, key = self.files[of], _KEY.pack(of, row)
        known = self.access.remote is None  # else the row is refused as soon as one of its files cannot be fetched
        if known and not file.written_to and (kept := self._kept.get(key)) is not None:
            return unpacked(kept)
        sample = parse_record(
            file.raw(row),
            file=file.name,
            index=row,
            image_folder=file.image_folder,
            family=self.family,
            access=self.access,
            flags=self.flags,
        )
        if known:
            self._kept.put(key, packed(sample))
        return sample

    def raw(self, place: int) -> object:
        """Return a row as its file has it, or a `BrokenLine`; columns are mapped."""
        return self.files[self.file_of[place]].raw(int(self.row_of[place]))

    def take(self, places: Sequence[int] | np.ndarray) -> RowIndex:
        """Return an index of the rows at these places, in their order."""
        chosen = np.asarray(places, dtype=np.int64)
        answer_of = None if self.answer_of is None else self.answer_of[chosen]
        return self._with(file_of=self.file_of[chosen], row_of=self.row_of[chosen], answer_of=answer_of)

    def split(self, answer_of: np.ndarray) -> RowIndex:
        """Return the entries with the turns that they end with; int32 [N], -1 for a whole row."""
        return self._with(answer_of=answer_of)

    def _with(self, **changed: np.ndarray | None) -> RowIndex:
        made = copy.copy(self)
        vars(made).update(changed)
        return made

    def name_of(self, place: int) -> str:
        """Return the name of a row in messages, such as `train.json[3]`."""
        return f"{self.files[self.file_of[place]].name}[{self.row_of[place]}]"

    @property
    def starts(self) -> np.ndarray:
        """Index of the first sample of each row, int64: all entries if no row is split.

        A row that is there twice counts twice.
        """
        first = np.ones(len(self), dtype=bool)
        if self.answer_of is not None and len(self) > 1:
            same = (self.file_of[1:] == self.file_of[:-1]) & (self.row_of[1:] == self.row_of[:-1])
            first[1:] = ~(same & (self.answer_of[1:] > self.answer_of[:-1]))
        return np.flatnonzero(first)

    @property
    def counts(self) -> dict[str, int]:
        """File -> number of its rows."""
        return {file.name: len(file) for file in self.files}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Parsed rows of data files.

    Attributes:
        samples: rows that can be trained, in the order of the files.
        bad: rows that are refused.
        counts: file -> number of its rows. The sum is `len(samples) + len(bad)`.
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
    """Locate the rows of data files without parsing them.

    Args:
        paths: data files: JSON files or tables.
        image_folder: where relative media paths start, for all files or by path. None: the folder of the data file.
        family: its control tokens are refused.
        access: which files rows may name. None: files in the folder, and absolute paths.
        columns: the mapping of `--columns`, for all files or by path. None: rows are read as they are.
        flags: how rows are read. None: the defaults.

    Raises:
        ConfigError: a file cannot be read, is named twice, or an image folder does not exist.
    """
    folders = image_folder if isinstance(image_folder, Mapping) else dict.fromkeys(paths, image_folder)
    for folder in folders.values():
        if folder is not None and not os.path.isdir(folder):
            raise ConfigError(f"--image_folder {folder}: no such folder. Name the folder where media paths start.")
    seen: dict[str, str] = {}
    for path in paths:
        for real in map(os.path.realpath, [path] if len(paths) == 1 else files_of(path)):
            if real in seen:
                raise ConfigError(
                    f"one data file is named twice: {seen[real]} and {path}. Its rows would be trained twice: drop one."
                )
            seen[real] = path
    by = columns if isinstance(columns, Mapping) else dict.fromkeys(paths, columns)
    pairs = flags is not None and flags.pairs
    files = [DataFile(path, image_folder=folders[path], columns=by[path], pairs=pairs) for path in paths]
    return RowIndex(
        files,
        np.repeat(np.arange(len(files), dtype=np.int32), [len(file) for file in files]),
        np.concatenate([np.arange(len(file), dtype=np.int32) for file in files]),
        family=family,
        access=access or Access(),
        flags=flags,
    )


def parsed(index: RowIndex) -> Rows:
    """Parse all rows of an index into memory. Use it for few rows only."""
    samples, bad = [], []
    for row in each(index):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            samples.append(row)
    return Rows(samples=tuple(samples), bad=tuple(bad), counts=index.counts)


def each(index: RowIndex) -> Iterator[Sample | BadRow]:
    """Yield each row of an index, or the reason why it is refused."""
    for place in range(len(index)):
        try:
            yield index[place]
        except DataError as error:
            yield error.row
