"""The choices of `vlft bench train`: what trains, and the columns of the baseline. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

Preset = Literal["lora", "lora_vision", "full"]
PRESETS: dict[Preset, dict[str, str]] = {
    "lora": {"vision": "frozen", "merger": "frozen", "language": "lora"},
    "lora_vision": {"vision": "lora", "merger": "lora", "language": "lora"},
    "full": {"vision": "full", "merger": "full", "language": "full"},
}
ORDERS = ("random", "grouped")
#: Sides of the baseline -> what each is. The second has what can be added from outside: fused kernels, varlen
#: attention, the head on trained tokens only, and recomputation that leaves a frozen ViT alone.
SIDES = {
    "stock": "stock transformers + peft",
    "kernels": "stock transformers + peft with our kernels",
}


def column(side: str, order: str) -> str:
    """The key of a column in the document's `baselines`: "grouped", or "grouped + kernels"."""
    return order if side == "stock" else f"{order} + {side}"


def title(key: str) -> str:
    """The heading of a column: "stock, grouped", or "stock + kernels, grouped"."""
    order, plus, side = key.partition(" + ")
    return f"stock{plus}{side}, {order}"
