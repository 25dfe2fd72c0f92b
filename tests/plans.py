"""`vlft plan` as JSON, and the presets by their flags."""

from __future__ import annotations

import json

import pytest

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


def plan_and_text(capsys, *argv) -> tuple[dict, str]:
    """The same plan as JSON and as what a person reads, made once."""
    import vlft.plan

    made = []
    real = vlft.plan.plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlft.plan, "plan", lambda *args, **kwargs: made.append(real(*args, **kwargs)) or made[0])
        return plan(capsys, *argv), made[0].as_text()


def towers(preset: str) -> tuple[list[str], Towers]:
    modes = dict(zip(("vision", "merger", "language"), PRESETS[preset], strict=True))
    return [word for tower, mode in modes.items() for word in (f"--{tower}", mode)], Towers(**modes)
