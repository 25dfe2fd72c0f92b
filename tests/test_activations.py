"""Memory of activations of every family, estimated from towers of three blocks, against one real step on the CPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import PRESETS

from vlft.data.collate import Collator
from vlft.data.sample import EncodedMedia, EncodedSample, Grid
from vlft.demo.tiny import tiny_processor
from vlft.families import FAMILIES, Family, VisionSizes
from vlft.model import activations, attention, forward, tracing
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.build import build_config
from vlft.model.load import empty_model
from vlft.model.scale import PixelScale

LABELS = {family.label: family for family in FAMILIES.values()}
SIDES = {96: 12, 40: 10}  # tokens of a sample -> patches of a side of its picture
LOAD = tracing.Load(lengths=tuple(SIDES), vision_lengths=tuple(n**2 for n in SIDES.values()), supervised=50)
PLAIN = tracing.numbers_of(torch.float32, None, deepspeed=False)
#: What makes a tiny model of four layers and five blocks of all kinds, in an order that no simple rule would guess.
MIXED: dict[str, dict[str, Any]] = {
    "windows": {"vision": {"fullatt_block_indexes": [1, 3]}},
    "deepstack": {"vision": {"deepstack_visual_indexes": [1, 3]}},
    "recurrent": {"text": {"layer_types": ["linear_attention", "full_attention", *["linear_attention"] * 2]}},
}


def mixed(family: Family) -> Any:
    """The config of a tiny model with more layers and blocks than the estimate runs."""
    parts: dict[str, dict[str, Any]] = {"vision": {"depth": 5}, "text": {"num_hidden_layers": 4}}
    for feature in family.features & MIXED.keys():
        for part, values in MIXED[feature].items():
            parts[part] |= values
    return build_config(family, family.tiny.but(**parts), tiny_processor().tokenizer)


def batch_of(vision: VisionSizes) -> dict[str, Any]:
    """The batch of `LOAD`: two samples that begin with a picture and end with 25 trained tokens."""
    samples = []
    for tokens, side in SIDES.items():
        patches = torch.zeros(side**2, vision.channels, vision.patch, vision.patch, dtype=torch.uint8)
        place = torch.arange(tokens)
        samples.append(
            EncodedSample(
                file="rows.json",
                index=0,
                id=None,
                input_ids_T=place,
                labels_T=place.where(place >= tokens - 25, -100),
                kinds_T=(place < side**2 // vision.cell).to(torch.uint8),
                positions_3T=place.expand(3, -1),
                media=(EncodedMedia(grid=Grid(t=1, h=side, w=side), patches=patches, is_video=False),),
                text="",
            )
        )
    batch: Any = Collator(vision=vision, filler_token=0)(samples)
    assert len(batch["targets"]) == LOAD.supervised
    return {key: batch[key] for key in forward.FORWARD_KEYS}


def real_step(config: Any, family: Family, checkpointed: tuple[str, ...]) -> dict[str, int]:
    """Part -> bytes that a forward pass on the CPU saves."""
    model: Any = empty_model(copy.deepcopy(config), family).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(std=0.02)
    attention.install(model, "sdpa", dtype=torch.float32)
    forward.bind(model, PixelScale(mean=(0.5,) * 3, std=(0.5,) * 3))
    model = apply_towers(model, family, PRESETS["vision-lora"], masters=True).train()
    checkpoint_activations(model, checkpointed)
    batch = batch_of(family.sizes(config).vision)
    with activations.Ledger(model, batch.values()) as ledger:
        model(**batch)
    return dict(ledger.kept)


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
        real = real_step(config, family, checkpointed)
        told = saved.estimate(checkpointed)
        for part in activations.PARTS:
            assert told.kept[part] == pytest.approx(real[part], rel=0.02, abs=2000), (part, checkpointed)


def test_dora_saves_one_more_result_of_each_layer(monkeypatch):
    plain = PRESETS["vision-lora"]
    towers, family = replace(plain, use_dora=True), LABELS["Qwen2-VL"]
    monkeypatch.setitem(PRESETS, "vision-lora", towers)
    found = [
        activations.Saved(
            config=mixed(family), family=family, towers=one, load=LOAD, numbers=PLAIN, device="cpu"
        ).estimate()
        for one in (towers, plain)
    ]
    real = real_step(mixed(family), family, ())
    for part in activations.PARTS:
        assert found[0].kept[part] == pytest.approx(real[part], rel=0.02, abs=2000), part
    assert found[0].kept["language"] > found[1].kept["language"]
