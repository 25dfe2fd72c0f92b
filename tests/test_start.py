"""`vlft train --adapter DIR`: a new run starts from a trained adapter, or is refused before anything is loaded."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from runs import arguments, weights

from vlft.cli.main import main

SAVE = ("--save_strategy", "steps", "--save_steps", "1")
TOWERS = ("--vision", "lora", "--merger", "full", "--language", "lora")


def ran(argv: list[str]) -> str:
    """What a command that succeeds prints on stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(argv) == 0
    return out.getvalue()


@pytest.fixture(scope="module")
def parent(tmp_path_factory, base, mixed_json, media) -> Path:
    """A run of two steps: LoRA on vision and language, the merger in full."""
    out = tmp_path_factory.mktemp("parent") / "sft"
    ran(arguments(base, mixed_json, media, out, *TOWERS, "--max_steps", "2", "--vision_lr", "1e-3", *SAVE))
    return out


@pytest.fixture
def go(base, mixed_json, media, tmp_path, parent):
    """`vlft train` from an adapter, by default the parent's; returns the run folder and what was printed."""

    def run(*more: str, name: str = "run", start: Path = parent) -> tuple[Path, str]:
        argv = arguments(base, mixed_json, media, tmp_path / name, "--adapter", str(start), *more)
        return tmp_path / name, ran([word for word in argv])

    return run


def test_smoke(go, parent):
    out, printed = go("--max_steps", "1", "--learning_rate", "0")
    print(printed)
    print((out / "config.yaml").read_text())
    print(json.loads((out / "vlft.json").read_text())["training"]["adapter"])
    a, b = weights(out), weights(parent)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)
