"""Compare the rows of a check: rows that repeat an earlier row, and rows that share a picture, video or question.

`vlft.check.row` computes the digests of a row, `Digests` collects them, `Compared` answers questions about them.

Letters in shapes: R rows that can be trained, F files of these rows.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from vlft.check.row import RowFacts
from vlft.data.division import groups_of
from vlft.data.equal_files import by_content as by_content_of
from vlft.data.files.index import RowIndex
from vlft.data.identity import FILE_BYTES, ROW_BYTES, Marked, each_slice, row_digest


@dataclass(kw_only=True)
class Digests:
    """Digests of rows, in the order of the rows: some bytes for each row and file."""

    turns: bytearray = field(default_factory=bytearray)
    asked: array = field(default_factory=lambda: array("Q"))
    files: array = field(default_factory=lambda: array("Q"))
    alike: array = field(default_factory=lambda: array("Q"))
    ends: array = field(default_factory=lambda: array("q"))

    def take(self, seen: RowFacts) -> None:
        """Add the digests of a row."""
        self.turns += bytes.fromhex(seen.turns)
        self.asked.frombytes(bytes.fromhex(seen.asked) or bytes(FILE_BYTES))
        self.files.frombytes(bytes.fromhex(seen.files))
        self.alike.frombytes(bytes.fromhex(seen.alike))
        self.ends.append(len(self.files))


@dataclass(frozen=True, kw_only=True)
class Compared:
    """The rows that can be trained, with digests that are the same for the same content.

    Attributes:
        index: these rows.
        rows: digest of each row, V16 [R].
        files: digest of each file, uint64 [F]. Files with equal bytes have the same.
        ends: end of each row's files in `files`, int64 [R].
        asked: of rows without media, the digest of their human turns; else 0. uint64 [R].
        stable: digest of each row that does not depend on where its files are, V16 [R].
    """

    index: RowIndex
    rows: np.ndarray
    files: np.ndarray
    ends: np.ndarray
    asked: np.ndarray
    stable: np.ndarray

    @classmethod
    def of(cls, digests: Digests, index: RowIndex, *, by_content: bool) -> Compared:
        """Compare rows.

        Args:
            digests: of the rows.
            index: the rows.
            by_content: `digests.files` are digests of contents. If they are digests of paths, files of equal size that
                start with the same bytes are read, to find equal files with different names.
        """
        ends = np.array(digests.ends, dtype=np.int64)
        files = np.array(digests.files, dtype=np.uint64)
        alike = np.array(digests.alike, dtype=np.uint64)
        if not by_content:
            every = Marked(index=index, rows=np.zeros(len(ends), dtype=np.uint64), files=files, ends=ends)
            files = by_content_of(every, alike)
        return cls(
            index=index,
            rows=_row_digests(digests.turns, files, ends),
            files=files,
            ends=ends,
            asked=np.array(digests.asked, dtype=np.uint64),
            stable=_row_digests(digests.turns, alike, ends),
        )

    @property
    def marked(self) -> Marked:
        """The rows as `vlft.setup.overlap` takes them."""
        halves_R2 = self.rows.view(np.uint64).reshape(-1, ROW_BYTES // FILE_BYTES)
        return Marked(index=self.index, rows=halves_R2[:, 0], files=self.files, ends=self.ends)

    def repeats(self) -> list[tuple[int, int]]:
        """Return (row, the first row that is the same) for each row with the same turns and files as an earlier one."""
        order = np.argsort(self.rows, kind="stable")
        same = self.rows[order][1:] == self.rows[order][:-1]
        first, found = 0, []
        for position, twin in enumerate(same.tolist(), start=1):
            if twin:
                found.append((int(order[position]), int(order[first])))
            else:
                first = position
        return found

    def groups(self, rows: Sequence[int]) -> np.ndarray:
        """Group rows that share a picture, a video or, without media, their human turns, also through other rows.

        Args:
            rows: positions of the rows, [G].

        Returns:
            for each of the rows the first place in `rows` of its group, int64 [G].
        """
        return groups_of(rows, self.files, self.ends, self.asked)

    def bond(self, rows: Sequence[int]) -> str:
        """Name what a group of rows has in common: the file that most of its rows name, or its question.

        Args:
            rows: positions of the rows.
        """
        slices = list(each_slice(self.ends))
        held: Counter[int] = Counter()
        for row in rows:
            held.update(set(self.files[slices[row]].tolist()))
        if not held:
            return f"the question of {self.marked.name_of(rows[0])}"
        most = held.most_common(1)[0][0]
        file = int((self.files == most).argmax())
        return f"{self.marked.shown_path(file)} of {self.marked.name_of(self.marked.row_of(file))}"


def _row_digests(turns: bytearray, files: np.ndarray, ends: np.ndarray) -> np.ndarray:
    held, every = bytes(turns), files.tobytes()
    found = bytearray()
    for row, part in enumerate(each_slice(ends)):
        own = held[row * ROW_BYTES : (row + 1) * ROW_BYTES]
        found += row_digest(own, every[part.start * FILE_BYTES : part.stop * FILE_BYTES])
    return np.frombuffer(bytes(found), dtype=f"V{ROW_BYTES}")
