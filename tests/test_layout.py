"""Names, shapes and totals of parameters without torch, against transformers' models and published totals."""

from __future__ import annotations

import math

import pytest

from vlft.bench.sizes import SHAPES
from vlft.demo.tiny import tiny_processor
from vlft.families import FAMILIES, TOWERS
from vlft.model.build import build_config
from vlft.model.load import empty_model

#: Name -> millions of parameters of vision tower, mergers and language model; None where only the sum is published.
MILLIONS: dict[str, tuple[float, tuple[float, float, float] | None]] = {
    "qwen2-vl-2b": (2209.0, None),
    "qwen2-vl-7b": (8291.4, None),
    "qwen2.5-vl-3b": (3754.6, (632.0, 36.7, 3085.9)),
    "qwen2.5-vl-7b": (8292.2, (632.0, 44.6, 7615.6)),
    "qwen2.5-vl-32b": (33452.7, None),
    "qwen2.5-vl-72b": (73410.8, None),
    "qwen3-vl-2b": (2127.5, (306.2, 100.7, 1720.6)),
    "qwen3-vl-4b": (4437.8, (306.2, 109.1, 4022.5)),
    "qwen3-vl-8b": (8767.1, (415.9, 160.5, 8190.7)),
    "qwen3-vl-32b": (33357.4, None),
    "qwen3-vl-30b-a3b": (31070.8, None),
    "qwen3-vl-235b-a22b": (235670.0, None),
    "qwen3.5-0.8b": (853.0, (88.0, 12.6, 752.4)),
    "qwen3.5-2b": (2213.2, None),
    "qwen3.5-4b": (4539.3, None),
    "qwen3.5-9b": (9409.8, (415.9, 40.1, 8953.8)),
    "qwen3.5-27b": (27356.7, None),
    "qwen3.5-35b-a3b": (35107.2, None),
}


def test_each_published_shape_is_in_the_table():
    assert set(MILLIONS) == {name for family in FAMILIES.values() for name in family.shapes}
    assert set(MILLIONS) < set(SHAPES)


@pytest.mark.parametrize("name", MILLIONS)
def test_published_shapes_have_their_parameters(name):
    family, shape = SHAPES[name]
    parts = dict.fromkeys(TOWERS, 0)
    for parameter, size in family.layout(family.sizes_of_shape(shape)).items():
        parts[family.tower_of(parameter)] += math.prod(size)
    whole, by_tower = MILLIONS[name]
    assert round(sum(parts.values()) / 1e6, 1) == whole
    if by_tower is not None:
        assert tuple(round(parts[tower] / 1e6, 1) for tower in TOWERS) == by_tower


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.label)
def test_the_layout_is_that_of_the_model(family):
    """The tiny shape with a tied head and with its own, and the published shapes with the fewest and most layers."""
    tokenizer = tiny_processor().tokenizer
    ranked = sorted(family.shapes.values(), key=lambda shape: shape.text[family.text_names.depth])
    for shape in (family.tiny.but(tied=True), family.tiny.but(tied=False), *ranked[:1], *ranked[-1:]):
        config = build_config(family, shape, tokenizer)
        theirs = {name: tuple(one.shape) for name, one in empty_model(config, family).named_parameters()}
        assert family.layout(family.sizes(config)) == theirs


def test_some_layers_of_a_model_of_experts_may_be_dense():
    family = FAMILIES["qwen3_vl_moe"]
    shape = family.tiny.but(text={"mlp_only_layers": [1]})
    config = build_config(family, shape, tiny_processor().tokenizer)
    theirs = {name: tuple(one.shape) for name, one in empty_model(config, family).named_parameters()}
    assert family.layout(family.sizes(config)) == theirs
    assert {"model.language_model.layers.1.mlp.gate_proj.weight"} < set(theirs)
