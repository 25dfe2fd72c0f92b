"""Memory of activations of every family, estimated from towers of three blocks, against one real step on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest
from mixed_models import LOAD, PLAIN, mixed, real_step
from models import PRESETS

from vlft.families import FAMILIES
from vlft.model import activations

LABELS = {family.label: family for family in FAMILIES.values()}
#: Families that are tested here only in the grid. Qwen2-VL is in test_plan_memory, and Qwen3.5-MoE has most kinds of
#: blocks: gated delta nets, attention, experts, and a ViT with interpolated positions.
COVERED = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Qwen3-VL-MoE", "Qwen3.5")


@pytest.mark.parametrize(
    "label", [pytest.param(label, marks=pytest.mark.grid if label in COVERED else ()) for label in LABELS]
)
def test_each_part_is_what_a_real_step_saves(label):
    """Without recomputation and with it, in one family also in one tower only: towers do not depend on each other."""
    family = LABELS[label]
    config = mixed(family)
    saved = activations.Saved(
        config=config, family=family, towers=PRESETS["vision-lora"], load=LOAD, numbers=PLAIN, device="cpu"
    )
    both = ("vision", "language")
    for checkpointed in ((), both, ("language",)) if "deepstack" in family.features else ((), both):
        real = real_step(config, family, PRESETS["vision-lora"], checkpointed)
        told = saved.estimate(checkpointed)
        for part in activations.PARTS:
            assert told.kept[part] == pytest.approx(real[part], rel=0.02, abs=2000), (part, checkpointed)


def test_dora_saves_one_more_result_of_each_layer():
    plain = PRESETS["vision-lora"]
    towers, family = replace(plain, use_dora=True), LABELS["Qwen2-VL"]
    found = [
        activations.Saved(
            config=mixed(family), family=family, towers=one, load=LOAD, numbers=PLAIN, device="cpu"
        ).estimate()
        for one in (towers, plain)
    ]
    real = real_step(mixed(family), family, towers, ())
    for part in activations.PARTS:
        assert found[0].kept[part] == pytest.approx(real[part], rel=0.02, abs=2000), part
    assert found[0].kept["language"] > found[1].kept["language"]
