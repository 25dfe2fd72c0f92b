"""Each family's flat forward against its stock forward: losses, gradients and isolation, on rows of every kind.

The rows are short. `test_recurrent.py` has rows of several chunks for the gated delta nets of Qwen3.5.
"""

from __future__ import annotations

import pytest
import torch
from models import PRESETS, TORCH, assert_close, build, flat_inputs, gradients
from stock_rows import changed, stock_loss

from vlft.families import FAMILIES
from vlft.model import kernels
from vlft.model.towers import Towers


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


def rounding(family) -> float:
    """A chunked delta rule rounds its decays: ours and stock's differ as much from a loop in float64 as from each
    other. It also enlarges last bits of the patch embedding: another order of the same sums moves logits by 9e-5.
    """
    return 1e-4 if "recurrent" in family.family.features else 1e-5


def counts(rows):
    """Trained tokens of each row."""
    return [int((row.flat.labels_T[1:] != -100).sum()) for row in rows]


def presets(family):
    """Rows of each preset. Experts stay frozen, so a language model with them has no full preset."""
    some = [family.rows[kind] for kind in ("pictures", "mixed")]
    every = list(family.rows.values())
    if "experts" in family.family.features:
        return {"vision-lora": every, "language-lora": some}
    return {"full": every, "vision-lora": some, "language-lora": some}


def test_a_batch_gives_the_stock_logits_and_gradients_of_each_row_alone(family):
    for preset, rows in presets(family).items():
        stock = family.model(preset, flat=False)
        losses, logits = zip(*(stock_loss(stock, row) for row in rows), strict=True)
        sum(losses).backward()
        theirs = gradients(stock)
        for checkpointing in (False, True):
            ours = family.model(preset, flat=True, checkpointing=checkpointing)
            found = ours(**family.inputs(rows), return_logits=True)
            found.loss.backward()
            assert_close(found.loss, sum(losses), preset)
            for row, part, wanted in zip(rows, found.logits.split(counts(rows)), logits, strict=True):
                assert_close(part, wanted, f"{preset}: {row.flat.id}", tolerance=rounding(family))
            mine = gradients(ours)
            assert set(mine) == set(theirs)
            for name, gradient in theirs.items():
                assert_close(mine[name], gradient, f"{preset}, {checkpointing}: {name}", tolerance=rounding(family))


def test_a_packed_row_is_the_row_alone_and_no_other_row_changes_it(family):
    """The detector of leaks: new tokens and pixels in one row leave the logits of all others bit-equal."""
    model, rows = family.model("vision-lora", flat=True).eval(), list(family.rows.values())

    def logits(rows):
        return model(**family.inputs(rows), return_logits=True).logits.split(counts(rows))

    with torch.no_grad():
        together = logits(rows)
        for place, row in enumerate(rows):
            assert_close(together[place], logits([row])[0], row.flat.id, tolerance=rounding(family))
        for kind in ("text", "pictures", "video"):
            place = list(family.rows).index(kind)
            again = logits([*rows[:place], changed(rows[place]), *rows[place + 1 :]])
            same = [torch.equal(before, after) for before, after in zip(together, again, strict=True)]
            assert same == [other != place for other in range(len(rows))], kind


def test_without_pictures_every_trained_module_runs(family):
    for preset in ("vision-lora", "full") if "full" in presets(family) else ("vision-lora",):
        model = family.model(preset, flat=True, checkpointing=True)
        for kinds in ((), ("text",)):
            model.zero_grad()
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
    model, inputs = family.model("language-lora", flat=True), family.inputs([family.rows["picture"]])
    before = model(**inputs).loss
    layers = family.sizes.text.layers
    mlps = sum(bool(layer.experts.shared if layer.experts else layer.inner) for layer in layers)
    said = kernels.install(model, "true", dtype=torch.float32, functions=TORCH)
    assert said == f"RMSNorm on {2 * len(layers) + 1} modules" + (f", SwiGLU on {mlps}" if mlps else "")
    assert_close(model(**inputs).loss, before, "loss")
