"""The flat forward against the stock forward of transformers: logits, loss and every gradient."""

from __future__ import annotations

import copy

import pytest
import torch
from models import PRESETS, assert_close, assert_same_step, build, flat_inputs, gradients, stock_inputs, stock_loss


@pytest.mark.parametrize("name", ["still", "two-turns", "clip", "text", "both", "frames"])
def test_each_kind_of_row_gives_the_stock_logits(base, encoder, encoded, name):
    row = encoded[name]
    with torch.no_grad():
        theirs_loss, theirs = stock_loss(build(base, "full", flat=False), row, encoder.processor)
        ours = build(base, "full", flat=True)(**flat_inputs([row]), return_logits=True)
    assert_close(ours.logits, theirs, name)
    assert_close(ours.loss, theirs_loss, name)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_flat_row_of_many_samples_gives_the_stock_loss_and_gradients_of_each_alone(
    base, encoder, encoded, preset, checkpointing
):
    rows = list(encoded.values())
    stock, ours = build(base, preset, flat=False), build(base, preset, flat=True, checkpointing=checkpointing)
    assert_same_step(stock, ours, rows, encoder.processor, flat_inputs(rows))


def test_a_batch_without_pictures_gives_the_vision_tower_zero_gradients(base, encoder, encoded):
    stock, ours = build(base, "full", flat=False), build(base, "full", flat=True)
    rows = [encoded["text"], encoded["text-2"]]
    sum(stock_loss(stock, row, encoder.processor)[0] for row in rows).backward()
    ours(**flat_inputs(rows)).loss.backward()
    theirs, mine = gradients(stock), gradients(ours)
    assert set(mine) == {name for name, _ in ours.named_parameters()}
    for name, gradient in mine.items():
        if "visual" in name:
            assert torch.equal(gradient, torch.zeros_like(gradient)), name
        else:
            assert_close(gradient, theirs[name], name)


def test_an_empty_batch_weighs_nothing_and_still_reaches_every_parameter(base):
    model = build(base, "full", flat=True)
    loss = model(**flat_inputs([])).loss
    loss.backward()
    assert float(loss) == 0.0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def _one_segment(batch):
    tokens = batch["input_ids"].shape[1]
    return batch | {"cu_seqlens": torch.tensor([0, tokens], dtype=torch.int32), "lengths": (tokens,)}


def _pictures_see_each_other(batch):
    patches = sum(batch["vision_lengths"])
    cu = torch.tensor([0, patches], dtype=torch.int32)
    return batch | {"vision_cu_seqlens": cu, "vision_lengths": (patches,)}


def _positions_run_on(batch):
    tokens = batch["input_ids"].shape[1]
    return batch | {"position_ids": torch.arange(tokens).expand(4, 1, -1)}


@pytest.mark.parametrize("broken", [_one_segment, _pictures_see_each_other, _positions_run_on])
def test_breaking_the_isolation_of_samples_shows(base, encoder, encoded, broken):
    rows = [encoded["still"], encoded["two-turns"], encoded["clip"]]
    model = build(base, "full", flat=True)
    with torch.no_grad():
        alone = torch.cat([model(**flat_inputs([row]), return_logits=True).logits for row in rows])
        together = model(**flat_inputs(rows), return_logits=True).logits
        leaked = model(**broken(flat_inputs(rows)), return_logits=True).logits
    assert_close(together, alone, "together")
    assert (leaked - alone).abs().max() > 1e-3


def test_features_and_their_places_must_be_equally_many(base, encoded):
    inputs = flat_inputs([encoded["still"]])
    inputs["vision_rows"] = inputs["vision_rows"][:-1]
    with pytest.raises(ValueError, match=r"places in the row for \d+ features"):
        build(base, "full", flat=True)(**inputs)


@pytest.mark.parametrize("padding", [False, True])
def test_generate_goes_the_stock_way(base, encoder, encoded, padding):
    """Bound and unbound model generate the same tokens, also with a left-padded batch."""
    processor = copy.deepcopy(encoder.processor)
    processor.tokenizer.padding_side = "left"
    if padding:
        prompts = processor.tokenizer(["Hi", "A longer one"], return_tensors="pt", padding=True)
        inputs = dict(prompts)
    else:
        inputs = stock_inputs(encoded["both"], processor)
        inputs.pop("use_cache")
    outputs = []
    for flat in (False, True):
        model = build(base, "full", flat=flat).eval()
        outputs.append(model.generate(**inputs, max_new_tokens=8, do_sample=False))
    assert torch.equal(*outputs)


def test_one_vision_call_a_batch_whatever_is_in_it(base, encoded):
    model = build(base, "full", flat=True)
    calls = []
    model.model.visual.register_forward_pre_hook(lambda *_: calls.append(1))
    for rows in ([], [encoded["text"]], list(encoded.values())):
        calls.clear()
        model(**flat_inputs(rows))
        assert len(calls) == 1


@pytest.mark.parametrize("preset", ["language-lora", "lora-full-merger"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_nothing_runs_backward_in_a_frozen_tower(base, encoded, preset, checkpointing):
    """Floating-point operations of the ViT's blocks in backward: none, with and without checkpointing."""
    from torch.utils.flop_counter import FlopCounterMode

    model = build(base, preset, flat=True, checkpointing=checkpointing)
    blocks = model.get_base_model().model.visual.blocks
    loss = model(**flat_inputs([encoded["two-turns"]])).loss
    ran = []
    for block in blocks:
        block.register_forward_pre_hook(lambda *_: ran.append("recomputed"))
        block.register_full_backward_hook(lambda *_: ran.append("backward"))
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    assert ran == []
    assert counter.get_total_flops() > 0
    assert not [name for name in counter.get_flop_counts() if "visual.blocks" in name]
