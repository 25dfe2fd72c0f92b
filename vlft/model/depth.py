"""A whole model from small ones: which blocks differ, and the smallest models that have each of them.

Counts of a step add up over blocks. So those of a model of any depth follow from models of two or three blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from vlft.families import Sizes
from vlft.model import adapt

#: What decides the memory of a block, other than its width.
Kind = tuple[Any, ...]


def kinds(sizes: Sizes) -> dict[adapt.Part, list[Kind]]:
    """Tower -> the kind of each block. The second entry says whether a block of the ViT has a merger of its own."""
    vision = sizes.vision
    windowed = [vision.window is not None and place not in vision.full_blocks for place in range(vision.depth)]
    return {
        "vision": [(windows, place in vision.deepstack) for place, windows in enumerate(windowed)],
        "language": [(layer, False) for layer in sizes.text.layers],
    }


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Blocks to add between the first and the last.

    Attributes:
        places: tower -> a block of the kind.
        vision: number of such blocks in the ViT.
        language: number of such blocks in the language model.
    """

    places: dict[adapt.Part, int]
    vision: int
    language: int


def additions(found_kinds: dict[adapt.Part, list[Kind]]) -> list[Addition]:
    """The fewest models that show each kind of block. Blocks with a merger change both towers, so they come alone."""
    places: dict[adapt.Part, list[tuple[int, int]]] = {"vision": [], "language": []}  # a block, and how many there are
    alone: list[Addition] = []
    for part, all_kinds in found_kinds.items():
        middle = all_kinds[1:-1]
        for kind in dict.fromkeys(middle):
            place, times = 1 + middle.index(kind), middle.count(kind)
            if kind[1]:
                alone.append(Addition(places={part: place}, vision=times, language=times))
            else:
                places[part].append((place, times))
    found = []
    for ones in itertools.zip_longest(*places.values()):
        there = {part: one for part, one in zip(places, ones, strict=True) if one is not None}
        counts = {part: count for part, (_, count) in there.items()}
        found.append(
            Addition(
                places={part: place for part, (place, _) in there.items()},
                vision=counts.get("vision", 0),
                language=counts.get("language", 0),
            )
        )
    return [*found, *alone]


@dataclass(frozen=True, kw_only=True)
class Small:
    """A model whose towers have only some blocks.

    Attributes:
        vision: places of its blocks in the ViT.
        language: places of its layers in the language model.
        weight: factor on its counts; those of all small models then add up to the counts of the whole model.
    """

    vision: tuple[int, ...]
    language: tuple[int, ...]
    weight: int


def small_models(sizes: Sizes) -> list[Small]:
    """Small models for counts that add up over blocks: one with the ends of both towers, and one for each more kind."""
    found_kinds = kinds(sizes)
    ends = {part: tuple(sorted({0, len(blocks) - 1})) for part, blocks in found_kinds.items()}
    more = []
    for part, blocks in found_kinds.items():
        middle = blocks[1:-1]
        for kind in dict.fromkeys(middle):
            places = {**ends, part: tuple(sorted({*ends[part], 1 + middle.index(kind)}))}
            more.append(Small(vision=places["vision"], language=places["language"], weight=middle.count(kind)))
    rest = 1 - sum(one.weight for one in more)
    return [Small(vision=ends["vision"], language=ends["language"], weight=rest), *more]
