"""The choices of `vlft bench train`: what trains, and how the baseline orders its rows. Imports nothing heavy."""

from __future__ import annotations

from typing import Literal

Preset = Literal["lora", "lora_vision", "full"]
PRESETS: dict[Preset, dict[str, str]] = {
    "lora": {"vision": "frozen", "merger": "frozen", "language": "lora"},
    "lora_vision": {"vision": "lora", "merger": "lora", "language": "lora"},
    "full": {"vision": "full", "merger": "full", "language": "full"},
}
ORDERS = ("random", "grouped")
