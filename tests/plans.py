"""`vlft plan` as JSON, and the presets by their flags."""

from __future__ import annotations

import json

from vlft.cli.main import main
from vlft.model.towers import Towers

PRESETS = {
    "full": ("full", "full", "full"),
    "language": ("frozen", "frozen", "lora"),
    "vision and language": ("lora", "lora", "lora"),
    "2U1": ("full", "full", "lora"),
}


def plan(capsys, *argv) -> dict:
    assert main(["plan", *map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def towers(preset: str) -> tuple[list[str], Towers]:
    modes = dict(zip(("vision", "merger", "language"), PRESETS[preset], strict=True))
    return [word for tower, mode in modes.items() for word in (f"--{tower}", mode)], Towers(**modes)
