"""Divide rows into parts for training, evaluation and test. Integers in, integers out; opens no file.

Groups of rows stay whole. Which group goes where depends only on the seed, on the shares and on what the rows hold.
`vlft.check.fix` writes the parts into files, `vlft.setup.held_out` holds out one part of a run's rows.

Letters in shapes: R rows, F files of rows.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence

import numpy as np

from vlft.data.identity import each_slice


def wanted_rows(total: int, shares: Sequence[float]) -> list[int]:
    """Return how many rows each part gets if all groups are small: at least 1, in all `total`.

    Args:
        total: number of rows, at least one for each share.
        shares: share of each part; they sum to 1.
    """
    exact = [total * share for share in shares]
    counts = [max(1, int(one)) for one in exact]
    order = sorted(
        range(len(shares)), key=lambda part: counts[part] - exact[part]
    )  # the part that lacks the most first
    for part in itertools.cycle(order):
        if sum(counts) >= total:
            break
        counts[part] += 1
    while sum(counts) > total:  # the smallest parts were raised to 1
        counts[counts.index(max(counts))] -= 1
    return counts


def groups_of(rows: Sequence[int], files: np.ndarray, ends: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Group rows that share a picture, a video or, without media, their human turns, also through other rows.

    Args:
        rows: positions of the rows to group, [G].
        files: digest of each file of all rows, uint64 [F]; the files of a row are neighbours.
        ends: end of each row's files in `files`, int64 [R].
        asked: digest of the human turns of each row, uint64 [R]; read of rows without media only.

    Returns:
        for each of the rows the first place in `rows` of its group, int64 [G].
    """
    parent = list(range(len(rows)))

    def root(place: int) -> int:
        while parent[place] != place:
            parent[place] = parent[parent[place]]
            place = parent[place]
        return place

    slices = list(each_slice(ends))
    first: dict[int, int] = {}
    for place, row in enumerate(rows):
        shared = files[slices[row]].tolist() or [int(asked[row])]
        for one in shared:
            a, b = root(first.setdefault(one, place)), root(place)
            parent[max(a, b)] = min(a, b)
    return np.array([root(place) for place in range(len(rows))], dtype=np.int64)


def split(groups: np.ndarray, stable: np.ndarray, shares: Sequence[float], *, seed: int) -> np.ndarray:
    """Choose a part for each row.

    Large groups are placed first, each into the part that lacks the largest share of its rows and has room for the
    group. A group that fits nowhere goes where the most rows are missing.

    Args:
        groups: for each row a number that is the same in its group, int64 [R].
        stable: digest of each row, V16 or uint64 [R]. It decides the order of groups with equally many rows.
        shares: share of each part; they sum to 1. There are at least as many groups as parts.
        seed: other seeds choose other groups.

    Returns:
        the part of each row, int64 [R].
    """
    names, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    keys = [b"\xff" * 17] * len(names)
    salt = str(seed).encode()
    for group, digest in zip(group_of.tolist(), stable, strict=True):
        keys[group] = min(keys[group], hashlib.blake2b(salt + digest.tobytes(), digest_size=16).digest())
    order = sorted(range(len(names)), key=lambda group: (-int(sizes[group]), keys[group]))
    wanted = wanted_rows(len(groups), shares)
    missing = list(wanted)
    part_of = np.zeros(len(names), dtype=np.int64)
    for done, group in enumerate(order):
        size = int(sizes[group])
        empty = [part for part in range(len(shares)) if missing[part] == wanted[part]]
        if len(order) - done <= len(empty):  # the last groups go to parts that would have no row
            part = empty[0]
        elif fitting := [part for part in range(len(shares)) if missing[part] >= size]:
            part = max(fitting, key=lambda part: missing[part] / wanted[part])
        else:
            part = max(range(len(shares)), key=lambda part: missing[part])
        missing[part] -= size
        part_of[group] = part
    return part_of[group_of]
