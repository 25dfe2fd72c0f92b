"""Required operations against those torch counts while the prepared model takes a step."""

from __future__ import annotations

import pytest
from models import PRESETS, build, collate
from torch.utils.flop_counter import FlopCounterMode

from vlft.families import sizes_of
from vlft.model import flops, forward
from vlft.model.towers import Towers

PARTS = {"vision": "visual.blocks", "merger": "visual.merger", "language": "language_model.layers", "head": "lm_head"}


def counted(model, batch) -> int:
    """Operations torch counts in one forward and backward."""
    inputs = {key: batch[key] for key in forward.FORWARD_KEYS}
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    return counter.get_total_flops()


def required(model, towers: Towers, batch, **choice) -> dict[str, flops.Flops]:
    return flops.required_flops(
        sizes_of(model.config),
        towers,
        lengths=batch["lengths"],
        vision_lengths=batch["vision_lengths"],
        supervised=batch["counts"]["supervised_tokens"],
        **choice,
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_does_the_required_operations(base, encoded, preset):
    """language-lora is frozen/frozen/lora, lora-full-merger frozen/full/lora; also full, and LoRA on all three.

    On transformers 5.23 they are equal; 5.17 makes its rotary angles by a small matmul.
    """
    model, batch = build(base, preset, flat=True), collate(list(encoded.values()))
    want = flops.total(required(model, PRESETS[preset], batch, attention="full"))
    assert counted(model, batch) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("preset", ["language-lora", "lora-full-merger"])
def test_checkpointing_adds_one_more_forward_of_the_language_layers_and_nothing_else(base, encoded, preset):
    """Recomputation stops at the last tensor that backward needs, so each layer's last matmuls do not run again.

    Those are down_proj and its LoRA's B.
    """
    batch = collate(list(encoded.values()))
    plain, checkpointed = (counted(build(base, preset, flat=True, checkpointing=on), batch) for on in (False, True))
    model = build(base, preset, flat=True)
    text = model.config.text_config
    last = 2 * sum(batch["lengths"]) * text.hidden_size * (PRESETS[preset].lora_rank + text.intermediate_size)
    layers = required(model, PRESETS[preset], batch, attention="full")["language"].forward
    assert checkpointed - plain == layers - text.num_hidden_layers * last


@pytest.mark.parametrize("towers", [Towers(lora_target="attention", lora_rank=4, lora_dropout=0.0)], ids=["attention"])
def test_lora_on_attention_alone(base, encoded, towers, monkeypatch):
    monkeypatch.setitem(PRESETS, "here", towers)
    model, batch = build(base, "here", flat=True), collate(list(encoded.values()))
    want = flops.total(required(model, towers, batch, attention="full"))
    assert counted(model, batch) == pytest.approx(want, rel=1e-3)


def published(layers: int, width: int, inner: int, heads: int, keys: int, tied: bool):
    """The config of a published Qwen2-VL."""
    from transformers import Qwen2VLConfig

    return Qwen2VLConfig(
        text_config={
            "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": 151936,
            "num_attention_heads": heads, "num_key_value_heads": keys,
        },
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": width, "num_heads": 16, "mlp_ratio": 4},
        tie_word_embeddings=tied,
    )  # fmt: skip


def test_the_2b_by_hand():
    """1,310.2 M weights in the layers, 233.4 M in the head (2B): 4 N a token under LoRA, 6 N in full."""
    config = published(28, 1536, 8960, 12, 2, True)
    shape = {"lengths": (1000,), "vision_lengths": (), "supervised": 10}
    full = flops.required_flops(sizes_of(config), Towers(vision="full", merger="full", language="full"), **shape)
    lora = flops.required_flops(sizes_of(config), Towers(lora_rank=1), **shape)
    causal = 86_016 * 1000 * 1000
    assert full["language"].forward == pytest.approx(2 * 1310.2e6 * 1000 + causal, rel=1e-4)
    assert full["language"].backward == pytest.approx(2 * full["language"].forward)
    assert lora["language"].forward == pytest.approx(full["language"].forward, rel=1e-3)
    # Only dense gradients of inputs, except for the first layer's q, k and v, whose input needs none; and a rank of 1.
    first = 2 * 1536 * (1536 + 2 * 256) * 1000
    assert lora["language"].backward == pytest.approx(2 * 1310.2e6 * 1000 + 2 * causal - first, rel=2e-3)
    assert full["head"].forward == 2 * 151936 * 1536 * 10
    assert full["head"].backward == 2 * lora["head"].backward == 2 * full["head"].forward
    assert full["vision"].total == full["merger"].total == 0


def test_a_picture_in_a_frozen_tower_costs_one_forward():
    """1,258 M a patch for the blocks, 163,840 S for their attention; the merger 2 * 34.1 M a merged token (2B)."""
    config = published(28, 1536, 8960, 12, 2, True)
    parts = flops.required_flops(sizes_of(config), Towers(), lengths=(1199,), vision_lengths=(3996,), supervised=100)
    patch_embedding = 2 * 1176 * 1280
    assert parts["vision"].forward == pytest.approx(3996 * (1.2583e9 + patch_embedding + 163_840 * 3996), rel=1e-3)
    assert parts["merger"].forward == pytest.approx(999 * 2 * 34.1e6, rel=1e-3)
    assert parts["vision"].backward == parts["merger"].backward == 0
    # The figure of a step on it: 14.5 TF with LoRA, the tower without a graph.
    assert flops.total(parts) == pytest.approx(14.5e12, rel=0.02)
