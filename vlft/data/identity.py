"""Digests that say whether rows, or their pictures and videos, are the same. Decodes no picture.

`vlft.check` finds repeated rows with them and divides rows into files, `vlft.setup.overlap` compares training with
evaluation data, and `vlft.setup.held_out` divides the rows of a run. `Marks` collects the digests during a pass over
rows (`vlft.data.costs.cache`).

Letters in shapes: R rows, F files of rows; a file counts once for each time that a row names it.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

import numpy as np

from vlft.data.files.index import RowIndex
from vlft.data.sample import Sample, Text
from vlft.errors import DataError
from vlft.text import short_path

ROW_BYTES = 16
FILE_BYTES = 8
REMEMBERED = 100_000  # files and folders that a process remembers


def turns_digest(sample: Sample) -> bytes:
    """Hash the turns and boxes of a row, without the files that it names: `ROW_BYTES`."""
    turns = [[turn.role, [_plain(part) for part in turn.parts]] for turn in sample.all_turns]
    return _hash(json.dumps([turns, None if sample.objects is None else asdict(sample.objects)]), ROW_BYTES)


def question_digest(sample: Sample) -> bytes:
    """Hash the text of all human turns of a row: `FILE_BYTES`."""
    asked = [part.text for turn in sample.turns if turn.role == "user" for part in turn.parts if isinstance(part, Text)]
    return _hash(json.dumps(asked), FILE_BYTES)


def row_digest(turns: bytes, files: bytes) -> bytes:
    """Combine the digest of a row's turns and those of its files: `ROW_BYTES`."""
    return hashlib.blake2b(turns + files, digest_size=ROW_BYTES).digest()


def files_of(sample: Sample) -> list[str]:
    """Return the paths of all files of a row, in the order of their digests."""
    return [path for part in sample.media for _, path in part.files]


class PathDigest:
    """Digests of files by their path, after links are resolved. A file costs one `lstat` if its folder is known."""

    def __init__(self) -> None:
        self._folders: dict[str, str] = {}

    def __call__(self, path: str) -> bytes:
        """Hash the resolved path: `FILE_BYTES`. The file need not exist."""
        head, name = os.path.split(path)
        if os.path.islink(path):
            return _hash(os.path.realpath(path), FILE_BYTES)
        if head not in self._folders:
            if len(self._folders) >= REMEMBERED:
                self._folders.clear()
            self._folders[head] = os.path.realpath(head or ".")
        return _hash(os.path.join(self._folders[head], name), FILE_BYTES)


def content_digest(path: str) -> bytes:
    """Hash all bytes of a file: `FILE_BYTES`.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=FILE_BYTES)).digest()


def _plain(part: Any) -> Any:
    if isinstance(part, Text):
        return part.text if part.trained else ["masked", part.text]
    return [type(part).__name__, astuple(part.overrides), len(part.files)]


def _hash(text: str, size: int) -> bytes:
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=size).digest()


@dataclass(frozen=True, kw_only=True)
class Marked:
    """Rows with their digests.

    Attributes:
        index: the rows.
        rows: digest of each row, uint64 [R].
        files: digest of each file, uint64 [F]; the files of a row are neighbours, in the order of `files_of`.
        ends: end of each row's files in `files`, int64 [R].
        asked: digest of the human turns of each row, uint64 [R]; empty if it was not collected.
        stable: digest of each row that has the names of its files but not their folders, uint64 [R]; or empty.
        sizes: of each file in bytes, uint64 [F]; 0 if it is not there; or empty.
    """

    index: RowIndex
    rows: np.ndarray
    files: np.ndarray
    ends: np.ndarray
    asked: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    stable: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))
    sizes: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.uint64))

    def row_of(self, file: int) -> int:
        """Return the row that names a file, given its position in `files`."""
        return int(np.searchsorted(self.ends, file, side="right"))

    def name_of(self, row: int) -> str:
        """Return the name of a row in messages, such as `train.json[3]`."""
        return self.index.name_of(row)

    def path_of(self, file: int) -> str:
        """Return the path of a file, given its position in `files`. Reads its row again.

        Raises:
            DataError: the row can no longer be read.
        """
        row = self.row_of(file)
        paths = files_of(self.index[row])
        return paths[file - int(self.ends[row])]  # counted from the end of the row's files

    def shown_path(self, file: int) -> str:
        """Return the path of a file for a message, given its position in `files`."""
        try:
            return short_path(os.path.normpath(self.path_of(file)))
        except (DataError, IndexError):  # the data file was changed in the meantime
            return "a file"

    def take(self, chosen_R: np.ndarray) -> Marked:
        """Return the rows for which a bool array [R] is true."""
        counts = np.diff(self.ends, prepend=0)
        chosen_F = np.repeat(chosen_R, counts)
        return Marked(
            index=self.index.take(np.flatnonzero(chosen_R)),
            rows=self.rows[chosen_R],
            files=self.files[chosen_F],
            ends=np.cumsum(counts[chosen_R]),
            asked=self.asked[chosen_R] if len(self.asked) else self.asked,
            stable=self.stable[chosen_R] if len(self.stable) else self.stable,
            sizes=self.sizes[chosen_F] if len(self.sizes) else self.sizes,
        )


class Marks:
    """Collects the digests of rows: `mark` is called in worker processes, `take` where the results arrive."""

    def __init__(self) -> None:
        self._path = PathDigest()
        self._places = array("q")
        self._rows = array("Q")
        self._files = array("Q")
        self._ends = array("q")
        self._asked = array("Q")
        self._stable = array("Q")
        self._sizes = array("Q")

    def mark(self, sample: Sample) -> bytes:
        """Return three digests of a row (`rows`, `asked`, `stable` of `Marked`), those of its files, and their sizes.

        Each has `FILE_BYTES`.
        """
        paths = files_of(sample)
        turns, files = turns_digest(sample), b"".join(map(self._path, paths))
        names = b"".join(_hash(os.path.basename(path), FILE_BYTES) for path in paths)
        own = row_digest(turns, files)[:FILE_BYTES]
        return (
            own + question_digest(sample) + row_digest(turns, names)[:FILE_BYTES] + files + b"".join(map(_size, paths))
        )

    def take(self, place: int, mark: bytes) -> None:
        """Add the digests of the row at this position."""
        self._places.append(place)
        for column, start in ((self._rows, 0), (self._asked, 1), (self._stable, 2)):
            column.frombytes(mark[start * FILE_BYTES : (start + 1) * FILE_BYTES])
        middle = (3 * FILE_BYTES + len(mark)) // 2
        self._files.frombytes(mark[3 * FILE_BYTES : middle])
        self._sizes.frombytes(mark[middle:])
        self._ends.append(len(self._files))

    def of(self, index: RowIndex, good: np.ndarray) -> Marked:
        """Return the digests of some rows.

        Args:
            index: the rows of the pass.
            good: positions of the rows, int64 [R], ascending.
        """
        places = np.array(self._places, dtype=np.int64)
        every = Marked(
            index=index.take(places),
            rows=np.array(self._rows, dtype=np.uint64),
            files=np.array(self._files, dtype=np.uint64),
            ends=np.array(self._ends, dtype=np.int64),
            asked=np.array(self._asked, dtype=np.uint64),
            stable=np.array(self._stable, dtype=np.uint64),
            sizes=np.array(self._sizes, dtype=np.uint64),
        )
        return every.take(np.isin(places, good))


def _size(path: str) -> bytes:
    """Return the size of a file as the digests are kept; 0 if it is not there."""
    try:
        return array("Q", [os.stat(path).st_size]).tobytes()
    except (OSError, ValueError):
        return bytes(FILE_BYTES)


def each_slice(ends: np.ndarray) -> Iterator[slice]:
    """Yield for each row the slice of its files, given their ends."""
    start = 0
    for end in ends.tolist():
        yield slice(start, end)
        start = end
