"""Cards by name, and their memory."""

from __future__ import annotations

import torch

from vlft.errors import ConfigError

#: GB (10^9 bytes) of a card that a process can use, about the total memory that torch reports.
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
#: Used by CUDA itself, cuBLAS's workspaces and similar, before any tensor; and by NCCL's buffers, with peers.
CONTEXT_BYTES = int(0.7e9)
NCCL_BYTES = int(0.6e9)


def card_bytes(name: str | None) -> tuple[str, int] | None:
    """The name and bytes of a card.

    Args:
        name: a name in `CARDS`, or a number of GB; None: the card of this machine.

    Returns:
        name and bytes; None if `name` is None and this machine has no card.

    Raises:
        ConfigError: `name` is neither.
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
