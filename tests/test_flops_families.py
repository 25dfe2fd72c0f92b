"""Required operations of every family, against those that torch counts while the prepared model takes a step.

Two differences of the models from the definition are removed first, so that torch counts what is defined: samples are
counted with all their attention scores, and gated delta nets run the recurrence of their definition, token by token.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from build import row, write_json
from models import PRESETS, build, collator
from torch.utils.flop_counter import FlopCounterMode

from vlft.bench.sizes import SHAPES, write_shape, write_weights
from vlft.config.recipe import Recipe
from vlft.config.row_flags import RowFlags
from vlft.data.encode import Encoder
from vlft.data.files.index import index_rows, parsed
from vlft.demo.tiny import tiny_processor
from vlft.families import DEFAULT, FAMILIES
from vlft.model import adapt, flops, forward, recurrent
from vlft.model.load import load_processor
from vlft.model.towers import Towers

LABELS = {family.label: family for family in FAMILIES.values()}
#: Words of the rows and of the chat template, so that samples are short: the recurrence takes a step for each token.
WORDS = ("system", "user", "assistant", "You", " are", " a", " helpful", " assistant", "Compare", " flower", " face")
#: Each family with every tower by LoRA; dense ones also in full and with one frozen tower. Qwen2-VL is in test_flops.
CHOICES = [
    (label, preset)
    for label, family in LABELS.items()
    for preset in ("full", "language-lora", "vision-lora")
    if family is not DEFAULT and (preset == "vision-lora" or "experts" not in family.features)
]


@pytest.fixture(scope="module")
def base_of(tmp_path_factory):
    """A function: family -> its tiny base, with two layers in its language model, one of each kind."""
    built: dict[str, Path] = {}

    def of(family) -> Path:
        name = f"tiny-{family.label.lower()}"
        if name not in built:
            kinds = {"layer_types": ["linear_attention", "full_attention"]} if "recurrent" in family.features else {}
            shape = family.tiny.but(text={"num_hidden_layers": 2, **kinds})
            folder = tmp_path_factory.mktemp(name)
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(SHAPES, name, (family, shape))
                write_shape(folder, name, tiny_processor(family, words=WORDS))
                write_weights(folder, name)
            built[name] = folder
        return built[name]

    return of


@pytest.fixture(scope="module")
def rows(media, tmp_path_factory) -> Path:
    """A row with two pictures, and one without any."""
    made = [
        row("<image><image>\nCompare.", "A flower and a face.", id="two", image=["flower.jpg", "astronaut.jpg"]),
        row("2+2?", "4", id="text"),
    ]
    return write_json(tmp_path_factory.mktemp("rows") / "rows.json", made)


@pytest.fixture
def batch_of(base_of, rows, media):
    """A function: family -> a batch of the rows."""

    def make(family) -> dict:
        processor = load_processor(base_of(family))
        # Up to 7 x 5 merged patches: windows at the edges are not full.
        recipe = Recipe.of(processor, RowFlags(max_length=32768, image_max_pixels=35 * family.factor**2))
        encoder = Encoder(family=family, processor=processor, recipe=recipe)
        samples = parsed(index_rows([str(rows)], image_folder=str(media), family=family)).samples
        return collator(family)([encoder.encode(sample) for sample in samples])

    return make


def by_token(q_TGD, k_TGD, v_TJE, decay_TJ, beta_TJ, segments):
    """The gated delta rule as "Gated Delta Networks" (Yang, Kautz, Hatamizadeh 2024) defines it, equation 10."""
    share = v_TJE.shape[1] // k_TGD.shape[1]
    q_TJD, k_TJD = (recurrent.normalised(x).repeat_interleave(share, dim=1) for x in (q_TGD, k_TGD))
    q_TJD = q_TJD * q_TJD.shape[-1] ** -0.5
    outputs, start = [], 0
    for length in segments.lengths:
        # The first state needs a gradient as all others do.
        state_JDE = v_TJE.new_zeros(v_TJE.shape[1], q_TJD.shape[-1], v_TJE.shape[-1]).requires_grad_()
        for t in range(start, start + length):
            k_JD1, q_J1D, v_J1E = k_TJD[t, :, :, None], q_TJD[t, :, None], v_TJE[t, :, None]
            state_JDE = state_JDE * decay_TJ[t, :, None, None].exp()
            state_JDE = state_JDE + k_JD1 @ ((v_J1E - k_JD1.mT @ state_JDE) * beta_TJ[t, :, None, None])
            outputs.append((q_J1D @ state_JDE)[:, 0])
        start += length
    return torch.stack(outputs)


def required(model, preset: str, batch) -> dict[str, flops.Flops]:
    return flops.required_flops(
        adapt.sizes_of(model),
        PRESETS[preset],
        lengths=batch["lengths"],
        vision_lengths=batch["vision_lengths"],
        window_lengths=batch["vision_meta"].get("window_lengths"),
        supervised=len(batch["targets"]),
        attention="full",
    )


@pytest.mark.parametrize(("label", "preset"), CHOICES)
def test_a_step_does_the_required_operations(label, preset, base_of, batch_of, monkeypatch):
    monkeypatch.setattr(recurrent, "torch_rule", by_token)
    family = LABELS[label]
    batch = batch_of(family)
    model = build(base_of(family), preset, flat=True, family=family)
    if "experts" in family.features:  # torch (2.15) does not count the product that computes all experts at once
        adapt.bare(model).set_experts_implementation("eager")
    want = flops.total(required(model, preset, batch))
    if preset == "full":  # torch (2.15) counts the gradient of a depthwise convolution's weight as if it were dense
        for layer in adapt.recurrent_layers(model):
            layer.conv1d.weight.requires_grad_(False)
            want -= 2 * layer.conv1d.weight.numel() * sum(batch["lengths"])
    with FlopCounterMode(display=False) as counter:
        model(**{key: batch[key] for key in forward.FORWARD_KEYS}).loss.backward()
    # Our convolution also computes the places before each sample; transformers 5.17 multiplies for rotary angles.
    assert counter.get_total_flops() == pytest.approx(want, rel=2e-3)


def test_windows_that_are_not_known_are_assumed_to_be_full(base_of, batch_of):
    """As `vlft plan` has them: it knows the patches of a picture, and not its sides."""
    family = FAMILIES["qwen2_5_vl"]
    batch = batch_of(family)
    model = build(base_of(family), "vision-lora", flat=True, family=family)
    exact = required(model, "vision-lora", batch)
    assert max(batch["vision_meta"]["window_lengths"]) == 64
    assumed = required(model, "vision-lora", batch | {"vision_meta": {}})
    assert exact["vision"].total < assumed["vision"].total < 1.05 * exact["vision"].total
    assert exact["language"] == assumed["language"]


@pytest.mark.parametrize("name", ["qwen3-vl-30b-a3b", "qwen3.5-27b", "qwen3.5-35b-a3b"])
def test_a_token_is_multiplied_once_with_each_weight_that_computes_it(name):
    """Language LoRA of rank 1, whose own work is below 0.3%. Without a sample's length, since states do not grow."""
    family, shape = SHAPES[name]
    sizes = family.sizes_of_shape(shape)
    weights, states = 0.0, 0
    for layer in sizes.text.layers:
        if layer.recurrent is not None:
            states += layer.recurrent.values * layer.recurrent.key_dim
    for parameter, size in family.layout(sizes).items():
        if ".layers." in parameter and len(size) > 1:
            active = shape.text["num_experts_per_tok"] / size[0] if ".experts." in parameter else 1
            weights += active * math.prod(size)
    shape_of = {"lengths": (1,), "vision_lengths": (), "supervised": 0}
    parts = flops.required_flops(sizes, Towers(lora_rank=1), **shape_of)
    assert parts["language"].forward == pytest.approx(2 * weights + 6 * states, rel=3e-3)
    assert parts["language"].backward == pytest.approx(2 * weights + 12 * states, rel=0.02)
