"""Cards by name, and what they hold."""

from __future__ import annotations

import torch

from vlft.errors import ConfigError

#: GB (10^9 bytes) that a card offers to a process, about what torch reports as its total memory.
CARDS: dict[str, float] = {
    "b200": 191.0,
    "h200": 150.1,
    "h100": 84.9,
    "a100-80": 84.9,
    "a100-40": 42.3,
    "rtx-pro-6000": 101.9,
    "l40s": 47.7,
    "a6000": 50.9,
    "5090": 33.7,
    "4090": 25.3,
    "3090": 25.3,
    "a10g": 23.6,
    "l4": 23.6,
    "v100-32": 34.0,
    "t4": 15.6,
}
#: Taken by CUDA itself, cuBLAS's work spaces and the like, before any tensor; by NCCL's buffers where there are peers.
CONTEXT_BYTES = int(0.7e9)
NCCL_BYTES = int(0.6e9)


def card_bytes(name: str | None) -> tuple[str, int] | None:
    """A card's name and bytes: of a name in `CARDS`, a number of GB, or None for the one that is here, if there is one.

    Raises:
        ConfigError: neither.
    """
    if name is None:
        if not torch.cuda.is_available():
            return None
        return torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
    word = name.lower()
    if word in CARDS:
        return word, int(CARDS[word] * 1e9)
    try:
        size = float(word.removesuffix("gb"))
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise ConfigError(f"--gpu {name}: neither a number of GB nor one of {', '.join(CARDS)}")
    return f"{size:g} GB", int(size * 1e9)
