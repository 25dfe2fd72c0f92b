"""Find files with equal bytes and different names: copies, and hard links. Reads only files that may be equal.

`vlft.check` and `vlft.setup.held_out` divide rows with it, so that a copy of a picture stays with the picture.

Letters in shapes: F files of rows.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from typing import BinaryIO

import numpy as np

from vlft.data.identity import FILE_BYTES, Marked, content_digest
from vlft.errors import DataError

HEAD = 4096  # bytes at the start of a file


def head_digest(file: BinaryIO) -> bytes:
    """Hash the size and the first bytes of an open file: `FILE_BYTES`. It is the same for equal files."""
    size = os.fstat(file.fileno()).st_size
    return hashlib.blake2b(size.to_bytes(8, "little") + file.read(HEAD), digest_size=FILE_BYTES).digest()


def by_content(marked: Marked, alike: np.ndarray | None = None) -> np.ndarray:
    """Return the digests of files, where files with equal bytes have the same.

    Args:
        marked: rows with digests of paths.
        alike: of each file a digest that is the same for equal files, uint64 [F]: files without a partner are not
            read. None: the sizes of `marked`, and then the first bytes of files of equal size.

    Returns:
        uint64 [F]. Of equal files the first one gives its digest.
    """
    _, first = np.unique(marked.files, return_index=True)  # each file once
    if alike is None:
        # Photographs of equal size are frequent, and equal first bytes are not.
        heads = {int(place): head for place, head in _each(marked, first[_shared(marked.sizes[first])], _head)}
        first = np.array(sorted(heads), dtype=np.int64)
        alike_of = np.array([int.from_bytes(heads[int(place)], "little") for place in first], dtype=np.uint64)
    else:
        alike_of = alike[first]
    several = first[_shared(alike_of)]
    contents: dict[bytes, int] = {}
    same: dict[int, int] = {}
    for place, content in _each(marked, np.sort(several), content_digest):  # so that the first name stays
        name = int(marked.files[place])
        same[name] = contents.setdefault(content, name)
    return _replaced(marked.files, same)


def _shared(values: np.ndarray) -> np.ndarray:
    """Return whether each value occurs more than once."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[which] > 1


def _each(marked: Marked, places: np.ndarray, digest: Callable[[str], bytes]) -> list[tuple[int, bytes]]:
    """Return (place, digest) of files; those that were changed since the row was read are left out."""
    found = []
    for place in places.tolist():
        try:
            found.append((place, digest(marked.path_of(place))))
        except (OSError, DataError, IndexError):
            continue
    return found


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return head_digest(file)


def _replaced(files: np.ndarray, same: Mapping[int, int]) -> np.ndarray:
    if all(old == new for old, new in same.items()):
        return files
    old = np.array(sorted(same), dtype=np.uint64)
    new = np.array([same[int(one)] for one in old], dtype=np.uint64)
    places = np.minimum(np.searchsorted(old, files), len(old) - 1)
    return np.where(old[places] == files, new[places], files)
