"""Tiny models under each preset, flat and stock, and the inputs that give them the same rows."""

from __future__ import annotations

import copy
import functools

import torch
from build import FAMILY
from patches import patches_of
from transformers import Qwen2VLConfig

from vlft.data.collate import Collator
from vlft.demo.tiny import tiny_config, tiny_processor
from vlft.families import Family, Sizes
from vlft.model import attention, forward, towers
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.load import load_base, load_processor
from vlft.model.scale import PixelScale

PRESETS = {
    "full": towers.Towers(vision="full", merger="full", language="full"),
    "language-lora": towers.Towers(lora_dropout=0.0, lora_rank=4),
    "vision-lora": towers.Towers(vision="lora", merger="lora", language="lora", lora_dropout=0.0, lora_rank=4),
    "lora-full-merger": towers.Towers(merger="full", language="lora", lora_dropout=0.0, lora_rank=4),
}

#: What `vlft.model.kernels.install` says of the tiny base of the default family, with all kernels.
EVERYWHERE = (
    "RMSNorm on 5 modules, SwiGLU on 2, LayerNorm on 5, quick GELU on 2, rotary embedding of language on 2, "
    "rotary embedding of vision on 2"
)


@functools.cache
def tiny_sizes(model_type: str = FAMILY.model_type) -> Sizes:
    """The sizes of a family's tiny base."""
    family = Family.of(model_type)
    return family.sizes(tiny_config(tiny_processor(family), family))


def collator(family: Family = FAMILY) -> Collator:
    return Collator(vision=tiny_sizes(family.model_type).vision, filler_token=0)


collate = collator()


def build(
    base, preset: str, *, flat: bool, checkpointing: bool = False, family: Family = FAMILY, loaded=None
) -> torch.nn.Module:
    """A tiny model under a preset; LoRA's B is filled, so that adapters matter. Equal weights each time.

    Args:
        base: its folder.
        preset: of `PRESETS`.
        flat: with the flat forward, or stock.
        checkpointing: whether both towers recompute activations.
        family: of the base.
        loaded: the stock model of the base; a copy of it is faster than to load the base again.
    """
    torch.manual_seed(0)
    model = copy.deepcopy(loaded) if loaded is not None else load_base(base, family, dtype=torch.float32)
    if flat:
        attention.install(model, "sdpa", dtype=torch.float32)
        forward.bind(model, PixelScale.of(load_processor(base)))
    adapters = "fused" if flat else "peft"
    model = apply_towers(model, family, PRESETS[preset], masters=True, adapters=adapters)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.05, generator=generator)
    if checkpointing:
        checkpoint_activations(model, ("vision", "language"))
    return model.train()


def flat_inputs(rows, family: Family = FAMILY) -> dict:
    batch = collator(family)(rows)
    return {key: batch[key] for key in forward.FORWARD_KEYS}


def stock_inputs(row, processor) -> dict:
    """The stock model's inputs for one row, with stock scaling of pixels."""
    pixels = PixelScale.of(processor)
    stills = [m for m in row.media if not m.is_video]
    videos = [m for m in row.media if m.is_video]
    inputs = {"input_ids": row.input_ids_T[None], "mm_token_type_ids": row.kinds_T[None].int(), "use_cache": False}
    side = processor.image_processor.patch_size
    still_patches, video_patches = patches_of(row.media, patch=side)
    made = pixels.patches(still_patches, video_patches)
    if stills:
        inputs["pixel_values"] = made[: len(still_patches)]
        inputs["image_grid_thw"] = torch.tensor([[m.grid.t, m.grid.h, m.grid.w] for m in stills])
    if videos:
        inputs["pixel_values_videos"] = made[len(still_patches) :]
        inputs["video_grid_thw"] = torch.tensor([[m.grid.t, m.grid.h, m.grid.w] for m in videos])
    return inputs


def stock_loss(model, row, processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of one row by the stock forward, and the logits that predict its supervised tokens."""
    return loss_of(model(**stock_inputs(row, processor)).logits, row.labels_T)


def loss_of(logits_1TV, labels_T) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy of one row, and the logits that predict its supervised tokens."""
    logits, targets = logits_1TV[0, :-1].float(), labels_T[1:]
    kept = targets != -100
    return torch.nn.functional.cross_entropy(logits[kept], targets[kept], reduction="sum"), logits[kept]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str, *, tolerance: float = 1e-5) -> None:
    ours, theirs = ours.detach(), theirs.detach()
    scale = theirs.abs().max().clamp(min=1e-6)
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, float(scale)), what


TWO_B = Qwen2VLConfig(
    text_config={
        "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12,
        "num_key_value_heads": 2, "vocab_size": 151936,
    },
    vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4},
)  # fmt: skip


def assert_same_step(stock, ours, rows, processor, batch: dict) -> None:
    """One flat forward and backward over rows gives the loss and gradients of the stock model on each alone."""
    total = sum(stock_loss(stock, row, processor)[0] for row in rows)
    total.backward()
    loss = ours(**batch).loss
    loss.backward()
    assert_close(loss, total, "loss")
    theirs, mine = gradients(stock), gradients(ours)
    assert set(theirs) == set(mine)
    for name, gradient in theirs.items():
        assert_close(mine[name], gradient, name)
