"""Which blocks of a tower train, and where the backward pass ends. Needs no torch.

A choice of blocks (`Towers.language_blocks`, `Towers.vision_blocks`) freezes the other blocks and everything outside of
blocks. Neighbours: `vlft.model.apply` and `vlft.model.groups` apply it to a model and to names of parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from vlft.config.blocks import as_text
from vlft.families import Family, Sizes
from vlft.families.family import BLOCK, LAYER
from vlft.model.towers import Mode, Towers

#: Tower -> beginning of the names in its blocks.
_PREFIXES: Mapping[str, str] = {"vision": BLOCK, "language": LAYER}
#: In names of the parameters that PEFT makes for trained tokens.
TOKENS = ".trainable_tokens_delta"
_ANY = r"\d+"  # in the prefixes
_PLACES = {tower: re.compile(prefix.replace(_ANY, r"(\d+)")) for tower, prefix in _PREFIXES.items()}


def blocks_of(towers: Towers) -> dict[str, tuple[int, ...]]:
    """Tower -> places of its chosen blocks, only for towers with a choice."""
    chosen = {"language": towers.language_blocks, "vision": towers.vision_blocks}
    return {tower: places for tower, places in chosen.items() if places is not None}


def place_of(name: str, tower: str) -> int | None:
    """The place of the block that a parameter or module of a tower is in; None if it is outside of blocks."""
    found = _PLACES[tower].match(name) if tower in _PLACES else None
    return None if found is None else int(found[1])


def mode_of(name: str, family: Family, towers: Towers) -> Mode:
    """How a parameter or module trains: as its tower does, but frozen if it is in no chosen block.

    Raises:
        KeyError: the name belongs to no tower.
    """
    tower = family.tower_of(name)
    chosen = blocks_of(towers).get(tower)
    return towers.modes[tower] if chosen is None or place_of(name, tower) in chosen else "frozen"


def lora_patterns(family: Family, towers: Towers) -> dict[str, str]:
    """Tower with LoRA -> the linear layers that LoRA adapts, as a full-match regex over module names."""
    patterns = family.lora_targets if towers.lora_target == "all" else family.attention_targets
    chosen = blocks_of(towers)
    found = {}
    for tower, mode in towers.modes.items():
        if mode == "lora":
            pattern = patterns[tower]
            if tower in chosen:  # peft's layers_to_transform would apply to both towers
                places = "(?:" + "|".join(map(str, chosen[tower])) + ")"
                pattern = f"(?={_PREFIXES[tower].replace(_ANY, places)})(?:{pattern})"
            found[tower] = pattern
    return found


def choice_in(names: Iterable[str], tower: str, mode: str, depth: int) -> tuple[int, ...] | None:
    """The choice of blocks under which exactly these parameters or modules of a tower train; None: no choice.

    Args:
        names: of the tower, today's.
        tower: vision or language.
        mode: full or lora.
        depth: number of blocks of the tower.
    """
    places = {place_of(name, tower) for name in names}
    found = tuple(sorted(place for place in places if place is not None))
    if None in places or not found or (mode == "lora" and len(found) == depth):
        return None
    return found


def small(towers: Towers, *, vision: Sequence[int], language: Sequence[int]) -> Towers:
    """The same towers for a model that has only the blocks at these places."""

    def kept(chosen: tuple[int, ...] | None, places: Sequence[int]) -> tuple[int, ...] | None:
        return None if chosen is None else tuple(new for new, old in enumerate(places) if old in chosen)

    return replace(
        towers,
        vision_blocks=kept(towers.vision_blocks, vision),
        language_blocks=kept(towers.language_blocks, language),
    )


def first_backward(towers: Towers, tower: str) -> int | None:
    """The first block of a tower (vision, language) that has a backward pass; None if no block has one.

    Every block above the lowest trained weight has one. Vision and merger are below the language model.
    """
    chosen = blocks_of(towers).get(tower)
    if tower == "vision":
        return None if towers.vision == "frozen" else 0 if chosen is None else chosen[0]
    return 0 if below_language(towers) or chosen is None else chosen[0]


def below_language(towers: Towers) -> bool:
    """Whether the input of the language model's first block needs a gradient."""
    embedding = towers.language == "full" and towers.language_blocks is None
    return embedding or bool(towers.tokens) or towers.vision != "frozen" or towers.merger != "frozen"


def trains(towers: Towers, tower: str, place: int) -> bool:
    """Whether a block of a tower has trained weights."""
    chosen = blocks_of(towers).get(tower)
    return towers.modes[tower] != "frozen" and (chosen is None or place in chosen)


def outside_of_blocks(towers: Towers, tower: str) -> Mode:
    """How the weights of a tower that are in no block train."""
    return "frozen" if tower in blocks_of(towers) else towers.modes[tower]


def backward_of(towers: Towers, tower: str, place: int) -> tuple[Mode, bool, bool]:
    """How a block trains, whether its input needs a gradient, and whether its inner activations need one."""
    mode: Mode = towers.modes[tower] if trains(towers, tower, place) else "frozen"
    start = first_backward(towers, tower)
    if start is None or place < start:
        return mode, False, False
    # The lowest input of LoRA comes from frozen weights. A block in full trains the norm before its linear layers.
    below = tower == "language" and below_language(towers)
    return mode, below or mode == "full" or place > start, True


def described(towers: Towers, sizes: Sizes) -> list[str]:
    """A line for each tower with chosen blocks, and for trained tokens: what trains and what stays frozen."""
    outside = {"language": "embedding, last norm and head", "vision": "patch embedding"}
    if sizes.vision.positions:
        outside["vision"] += " and positions"
    depths = {"language": len(sizes.text.layers), "vision": sizes.vision.depth}
    lines = []
    for tower, places in blocks_of(towers).items():
        what = "LoRA in " if towers.modes[tower] == "lora" else ""
        plural = "block" if len(places) == 1 else "blocks"
        rest = f"; frozen: {outside[tower]}" if towers.modes[tower] == "full" else ""
        lines.append(f"{tower}: {what}{plural} {as_text(places)} of {depths[tower]} (0 to {depths[tower] - 1}){rest}")
    if count := len(towers.tokens):
        where = "the embedding, which is also the head" if sizes.text.tied else "the embedding and of the head"
        lines.append(f"tokens: {count} {'row' if count == 1 else 'rows'} of {where}")
    return lines


def token_weights(towers: Towers, sizes: Sizes) -> int:
    """Number of weights that trained tokens add: their rows of the embedding, and of a head of its own."""
    return len(towers.tokens) * sizes.text.width * (1 if sizes.text.tied else 2)
