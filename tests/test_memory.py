"""Memory of activations, and which towers recompute them."""

from __future__ import annotations

import pytest
import torch
from models import TWO_B

from vlft.families import sizes_of
from vlft.model.memory import activations, choose_checkpointing, fit
from vlft.model.towers import Towers


def towers(vision: str, language: str = "lora") -> Towers:
    plain = {"lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0, "lora_target": "all"}
    return Towers(vision=vision, merger="frozen", language=language, **plain)


def test_megabytes_a_token_of_the_2b():
    """About 2.05 MB a token by another count (performance notes of the project)."""
    kept = activations(sizes_of(TWO_B), towers("frozen"), tokens=1000, patches=4000, element_bytes=2)
    assert kept["language"].whole / 1e9 == pytest.approx(2.05, rel=0.05)
    assert kept["language"].recomputed < 0.1 * kept["language"].whole
    assert kept["vision"].whole == 0


def test_the_hungriest_tower_recomputes_first():
    kept = activations(sizes_of(TWO_B), towers("lora"), tokens=16384, patches=65536, element_bytes=2)
    language, vision = kept["language"].whole, kept["vision"].whole
    assert vision > language
    order = ["vision", "language"]
    assert fit(order, kept, room=2 * (language + vision))[0] == ()
    assert fit(order, kept, room=int(1.3 * (language + kept["vision"].recomputed)))[0] == ("vision",)
    chosen, words = fit(order, kept, room=0)
    assert chosen == ("vision", "language")
    assert words.startswith("vision and language (activations ")


def test_by_name_and_on_a_cpu():
    kept = activations(sizes_of(TWO_B), towers("lora"), tokens=100, patches=400, element_bytes=2)
    cpu = torch.device("cpu")
    assert choose_checkpointing("auto", kept, trained=10, device=cpu) == ((), "off")
    assert choose_checkpointing("false", kept, trained=10, device=cpu) == ((), "off")
    assert set(choose_checkpointing("true", kept, trained=10, device=cpu)[0]) == {"vision", "language"}
    frozen = activations(sizes_of(TWO_B), towers("frozen"), tokens=100, patches=400, element_bytes=2)
    assert choose_checkpointing("true", frozen, trained=10, device=cpu)[0] == ("language",)
