"""Each family's flat forward against its stock forward: losses, gradients and isolation, on rows of every kind.

Of Qwen3.5 these tests have the layers with softmax attention; its gated delta nets have tests of their own.
"""

from __future__ import annotations

import pytest
import torch
from models import PRESETS, TORCH, assert_close, build, flat_inputs, gradients
from stock_rows import changed, stock_loss

from vlft.families import FAMILIES
from vlft.model import kernels
from vlft.model.towers import Towers

KINDS = ("text", "picture", "pictures", "video", "frames", "mixed")
LORA = ("language-lora", "vision-lora")


class Models:
    """Models and inputs of one family."""

    def __init__(self, opened) -> None:
        self.family, self.rows, self.opened = opened.family, opened.rows, opened
        self.sizes = opened.family.sizes(opened.model.config)

    def model(self, preset, **how):
        return build(self.opened.base, preset, family=self.family, loaded=self.opened.model, **how)

    def inputs(self, rows):
        return flat_inputs([row.flat for row in rows], self.family)


@pytest.fixture(scope="module", params=list(FAMILIES))
def family(request, stock_of):
    return Models(stock_of(request.param))


def presets(family):
    """Experts stay frozen, so a language model with them has no full preset."""
    return LORA if "experts" in family.family.features else ("full", *LORA)


def test_each_kind_of_row_gives_the_stock_logits(family):
    stock, ours = family.model("vision-lora", flat=False), family.model("vision-lora", flat=True)
    with torch.no_grad():
        for kind in KINDS:
            row = family.rows[kind]
            loss, logits = stock_loss(stock, row)
            found = ours(**family.inputs([row]), return_logits=True)
            assert_close(found.logits, logits, kind)
            assert_close(found.loss, loss, kind)


def test_a_batch_of_every_kind_gives_the_stock_gradients_of_each_row_alone(family):
    rows = list(family.rows.values())
    for preset in presets(family):
        stock = family.model(preset, flat=False)
        total = sum(stock_loss(stock, row)[0] for row in rows)
        total.backward()
        theirs = gradients(stock)
        for checkpointing in (False, True):
            ours = family.model(preset, flat=True, checkpointing=checkpointing)
            loss = ours(**family.inputs(rows)).loss
            loss.backward()
            assert_close(loss, total, preset)
            mine = gradients(ours)
            assert set(mine) == set(theirs)
            for name, gradient in theirs.items():
                assert_close(mine[name], gradient, f"{preset}, {checkpointing}: {name}")


def test_a_packed_row_is_the_row_alone_and_no_other_row_changes_it(family):
    """The detector of leaks: new tokens and pixels in one row leave the logits of all others bit-equal."""
    model, rows = family.model("vision-lora", flat=True).eval(), list(family.rows.values())
    counts = [int((row.flat.labels_T[1:] != -100).sum()) for row in rows]
    with torch.no_grad():
        together = model(**family.inputs(rows), return_logits=True).logits.split(counts)
        for place, row in enumerate(rows):
            alone = model(**family.inputs([row]), return_logits=True).logits
            assert_close(together[place], alone, row.flat.id)
            others = [*rows[:place], changed(row), *rows[place + 1 :]]
            again = model(**family.inputs(others), return_logits=True).logits.split(counts)
            assert not torch.equal(again[place], together[place])
            for other, (before, after) in enumerate(zip(together, again, strict=True)):
                assert other == place or torch.equal(before, after), (row.flat.id, rows[other].flat.id)


@pytest.mark.parametrize("kinds", [(), ("text",)], ids=["empty", "text"])
def test_without_pictures_every_trained_module_runs(family, kinds):
    for preset in presets(family):
        model = family.model(preset, flat=True, checkpointing=True)
        model(**family.inputs([family.rows[kind] for kind in kinds])).loss.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, (preset, name)
                assert (kinds and ".visual." not in name) or not parameter.grad.any(), (preset, name)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("merger", ["full", "frozen"])
def test_a_vision_tower_in_full_beside_lora_keeps_its_windows_and_positions(monkeypatch, stock_of, model_type, merger):
    """PEFT copies the tower, or with a frozen merger each block, and what vlft installed in it."""
    towers = Towers(vision="full", merger=merger, language="lora", lora_dropout=0.0, lora_rank=4)
    monkeypatch.setitem(PRESETS, "here", towers)
    of = Models(stock_of(model_type))
    rows = [of.rows[kind] for kind in ("pictures", "video")]
    stock, ours = of.model("here", flat=False), of.model("here", flat=True, checkpointing=True)
    sum(stock_loss(stock, row)[0] for row in rows).backward()
    ours(**of.inputs(rows)).loss.backward()
    theirs, mine = gradients(stock), gradients(ours)
    assert set(mine) == set(theirs)
    for name, gradient in theirs.items():
        assert_close(mine[name], gradient, name)


def test_fused_kernels_replace_the_norms_and_dense_mlps_of_a_family(family):
    model, inputs = family.model("language-lora", flat=True), family.inputs(list(family.rows.values()))
    before = model(**inputs).loss
    layers = family.sizes.text.layers
    mlps = sum(bool(layer.experts.shared if layer.experts else layer.inner) for layer in layers)
    said = kernels.install(model, "true", dtype=torch.float32, functions=TORCH)
    assert said == f"RMSNorm on {2 * len(layers) + 1} modules" + (f", SwiGLU on {mlps}" if mlps else "")
    assert_close(model(**inputs).loss, before, "loss")
