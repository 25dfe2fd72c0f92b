"""A whole model from small ones: which blocks differ, and the smallest models that have each of them.

Counts of a step add up over blocks. So those of a model of any depth follow from models of two or three blocks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from vlft.families import Sizes
from vlft.model import adapt
from vlft.model.chosen import blocks_of, first_backward, trains
from vlft.model.towers import Towers

#: What decides the memory of a block, other than its width.
Kind = tuple[Any, ...]


def kinds(sizes: Sizes, towers: Towers) -> dict[adapt.Part, list[Kind]]:
    """Tower -> the kind of each block. The second entry says whether a block of the ViT has a merger of its own.

    The last entry says whether a block trains, has a backward pass without training, or has none.
    """
    vision = sizes.vision
    windowed = [vision.window is not None and place not in vision.full_blocks for place in range(vision.depth)]
    found: dict[adapt.Part, list[Kind]] = {
        "vision": [(windows, place in vision.deepstack) for place, windows in enumerate(windowed)],
        "language": [(layer, False) for layer in sizes.text.layers],
    }
    return {
        part: [(*kind, *_backward(towers, part, place)) for place, kind in enumerate(blocks)]
        for part, blocks in found.items()
    }


def _backward(towers: Towers, part: adapt.Part, place: int) -> tuple[bool, bool]:
    start = first_backward(towers, part)
    return trains(towers, part, place), start is not None and place >= start


def ends(found_kinds: dict[adapt.Part, list[Kind]], towers: Towers) -> dict[adapt.Part, tuple[int, ...]]:
    """Tower -> the blocks of every small model: the first, the last, and the first that trains if blocks are chosen."""
    chosen = blocks_of(towers)
    return {
        part: tuple(sorted({0, len(blocks) - 1, *chosen.get(part, ())[:1]})) for part, blocks in found_kinds.items()
    }


@dataclass(frozen=True, kw_only=True)
class Addition:
    """Blocks to add to those of `ends`.

    Attributes:
        places: tower -> a block of the kind.
        vision: number of such blocks in the ViT.
        language: number of such blocks in the language model.
    """

    places: dict[adapt.Part, int]
    vision: int
    language: int


def additions(found_kinds: dict[adapt.Part, list[Kind]], towers: Towers) -> list[Addition]:
    """The fewest models that show each kind of block. Blocks with a merger change both towers, so they come alone."""
    places: dict[adapt.Part, list[tuple[int, int]]] = {"vision": [], "language": []}  # a block, and how many there are
    alone: list[Addition] = []
    for part, others in _others(found_kinds, towers).items():
        for kind, (place, times) in others.items():
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


def _others(found_kinds: dict[adapt.Part, list[Kind]], towers: Towers) -> dict[adapt.Part, dict[Kind, tuple[int, int]]]:
    """Tower -> kind -> its first block that is not among `ends`, and how many there are."""
    found: dict[adapt.Part, dict[Kind, tuple[int, int]]] = {}
    for part, kept in ends(found_kinds, towers).items():
        others: dict[Kind, tuple[int, int]] = {}
        for place, kind in enumerate(found_kinds[part]):
            if place not in kept:
                first, times = others.get(kind, (place, 0))
                others[kind] = first, times + 1
        found[part] = others
    return found


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


def small_models(sizes: Sizes, towers: Towers) -> list[Small]:
    """Small models for counts that add up over blocks: one with the ends of both towers, and one for each more kind."""
    found_kinds = kinds(sizes, towers)
    kept = ends(found_kinds, towers)
    more = []
    for part, others in _others(found_kinds, towers).items():
        for place, times in others.values():
            places = {**kept, part: tuple(sorted({*kept[part], place}))}
            more.append(Small(vision=places["vision"], language=places["language"], weight=times))
    rest = 1 - sum(one.weight for one in more)
    return [Small(vision=kept["vision"], language=kept["language"], weight=rest), *more]
