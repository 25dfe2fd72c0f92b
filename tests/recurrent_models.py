"""Tiny Qwen3.5 models in memory, whose recurrent layers remember, and flat batches of text rows for them."""

from __future__ import annotations

import itertools

import torch
from models import PRESETS

from vlft.families import FAMILIES
from vlft.model import attention, forward
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.scale import PixelScale
from vlft.model.tracing import Load, batch_of

FAMILY, EXPERTS = FAMILIES["qwen3_5"], FAMILIES["qwen3_5_moe"]
LENGTHS = (1, 2, 3, 5, 64, 65, 200)


def config_of(family):
    import transformers

    return getattr(transformers, family.config_class)(
        text_config={**family.tiny.text, "vocab_size": 256}, vision_config=dict(family.tiny.vision)
    )


def build(family, preset, *, flat, recompute=False):
    """A tiny model, the same each time. Its recurrent layers remember, so that a leak is large."""
    import transformers

    torch.manual_seed(0)
    model = getattr(transformers, family.model_class)(config_of(family))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(std=family.tiny.std)
        elif name.endswith("A_log"):
            parameter.data.copy_(torch.logspace(-2, 1, len(parameter)).log())
    if flat:
        attention.install(model, "sdpa", dtype=torch.float32)
        forward.bind(model, PixelScale(mean=(0.5,) * 3, std=(0.5,) * 3))
    model = apply_towers(model, family, PRESETS[preset], masters=True)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.01)  # times alpha / rank, 16
    if recompute:
        checkpoint_activations(model, ("vision", "language"))
    return model.train()


def flat_batch(family, config, rows):
    """A flat batch of text rows, and the places that are supervised in each: all but the last."""
    lengths = tuple(map(len, rows))
    starts = [0, *itertools.accumulate(lengths)]
    supervised = [start + place for start, n in zip(starts, lengths, strict=False) for place in range(n - 1)]
    vision = family.sizes(config).vision
    batch = batch_of(vision, Load(lengths=lengths, vision_lengths=(), supervised=len(supervised)))
    within = torch.cat([torch.arange(n) for n in lengths])
    return batch | {
        "input_ids": torch.cat(rows)[None],
        "position_ids": within.expand(4, 1, -1).clone(),
        "cu_seqlens": torch.tensor(starts, dtype=torch.int32),
        "vision_grid": torch.tensor([[1, vision.merge, vision.merge]]),
        "vision_cu_seqlens": torch.tensor([0, vision.cell], dtype=torch.int32),
        "supervised_rows": torch.tensor(supervised),
        "targets": torch.cat([row[1:] for row in rows]),
    }


def text_rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 250, (n,), generator=generator) for n in lengths]
