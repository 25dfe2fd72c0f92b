"""Activations of a small model with every kind of block: one real step on the CPU, and its batch."""

from __future__ import annotations

import copy
from typing import Any

import torch

from vlft.data.collate import Collator
from vlft.data.sample import EncodedMedia, EncodedSample, Grid
from vlft.demo.tiny import tiny_processor
from vlft.families import Family, VisionSizes
from vlft.model import activations, attention, forward, tracing
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.build import build_config
from vlft.model.load import empty_model
from vlft.model.scale import PixelScale
from vlft.model.towers import Towers

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
        pixels = torch.zeros(1, side * vision.patch, side * vision.patch, 3, dtype=torch.uint8)
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
                media=(EncodedMedia(grid=Grid(t=1, h=side, w=side), pixels=pixels, is_video=False),),
                text="",
            )
        )
    batch: Any = Collator(vision=vision, filler_token=0)(samples)
    assert len(batch["targets"]) == LOAD.supervised
    return {key: batch[key] for key in forward.FORWARD_KEYS}


def real_step(config: Any, family: Family, towers: Towers, checkpointed: tuple[str, ...]) -> dict[str, int]:
    """Part -> bytes that a forward pass on the CPU saves."""
    model: Any = empty_model(copy.deepcopy(config), family).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.normal_(std=0.02)
    attention.install(model, "sdpa", dtype=torch.float32)
    forward.bind(model, PixelScale(mean=(0.5,) * 3, std=(0.5,) * 3))
    model = apply_towers(model, family, towers, masters=True).train()
    checkpoint_activations(model, checkpointed)
    batch = batch_of(family.sizes(config).vision)
    with activations.Ledger(model, batch.values()) as ledger:
        model(**batch)
    return dict(ledger.kept)
