"""Edit distance and longest common subsequence of two sequences: characters of a string, or words.

Both process one item of the shorter sequence at a time, and all items of the longer one at once as the bits of a Python
integer. Two texts of 100,000 characters take seconds instead of the hours of a loop over both.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def edit_distance(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Return the least number of insertions, deletions and substitutions that turn one sequence into the other.

    Source: Myers, "A fast bit-vector algorithm for approximate string matching" (1999), as simplified by Hyyrö (2003).
    """
    long, short = _trimmed(first, second)
    if not short:
        return len(long)
    places = _places(long)
    mask, top = (1 << len(long)) - 1, 1 << (len(long) - 1)
    # Bit i of `more` and `less`: the distance of long[: i + 1] is one more, one less, than that of long[:i].
    more, less, distance = mask, 0, len(long)
    for item in short:
        equal = places.get(item, 0)
        down = equal | less
        across = (((equal & more) + more) ^ more) | equal
        rises = less | (mask & ~(across | more))
        falls = more & across
        distance += bool(rises & top) - bool(falls & top)
        rises = (rises << 1) | 1
        more = ((falls << 1) | ~(down | rises)) & mask
        less = rises & down & mask
    return distance


def common_length(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited" (2004).
    """
    long, short = sorted((first, second), key=len, reverse=True)
    places = _places(long)
    mask = (1 << len(long)) - 1
    zeros = mask  # bits that are 0 mark where the common subsequence grows
    for item in short:
        found = zeros & places.get(item, 0)
        zeros = ((zeros + found) | (zeros - found)) & mask
    return len(long) - zeros.bit_count()


def _places(items: Sequence[Hashable]) -> dict[Hashable, int]:
    """Return where each item stands, as the bits of an integer."""
    listed: dict[Hashable, list[int]] = {}
    for place, item in enumerate(items):
        listed.setdefault(item, []).append(place)
    return {item: _bits(found, len(items)) for item, found in listed.items()}


def _bits(found: list[int], length: int) -> int:
    if len(found) < 16:
        return sum(1 << place for place in found)
    held = bytearray(length // 8 + 1)
    for place in found:
        held[place >> 3] |= 1 << (place & 7)
    return int.from_bytes(held, "little")


def _trimmed(first: Sequence[Hashable], second: Sequence[Hashable]) -> tuple[Sequence[Hashable], Sequence[Hashable]]:
    """Return the longer and the shorter sequence without the start and the end that they share."""
    long, short = sorted((first, second), key=len, reverse=True)
    start, least = 0, len(short)
    while start < least and long[start] == short[start]:
        start += 1
    end = 0
    while end < least - start and long[-1 - end] == short[-1 - end]:
        end += 1
    return long[start : len(long) - end], short[start : least - end]
