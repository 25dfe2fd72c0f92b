"""A tiny model of any family with chosen blocks or trained tokens, ready for a step of the flat forward."""

from __future__ import annotations

import copy

import torch

from vlft.model import attention, forward
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.scale import PixelScale
from vlft.model.towers import Towers


def prepared(opened, towers: Towers, checkpointed: tuple[str, ...] = ()):
    torch.manual_seed(0)
    model = copy.deepcopy(opened.model)
    attention.install(model, "sdpa", dtype=torch.float32)
    forward.bind(model, PixelScale.of(opened.processor))
    model = apply_towers(model, opened.family, towers, masters=True)
    checkpoint_activations(model, checkpointed)
    return model.train()


def lora(**more) -> Towers:
    return Towers(**{"lora_rank": 4, "lora_dropout": 0.0, **more})
