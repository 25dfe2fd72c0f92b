"""Bases with random weights for benchmarks: named shapes, and values that a new model of transformers has."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
from build import row, write_json

from vlft.bench.sizes import DECAYS, SHAPES, TINY, is_whole, write_shape, write_weights
from vlft.cli.main import main
from vlft.demo.tiny import tiny_processor
from vlft.families import FAMILIES
from vlft.model.load import load_base
from vlft.plan.strategies import strategies_for


def test_shapes_have_the_names_of_the_models():
    assert {family.model_type for family, _ in TINY.values()} == set(FAMILIES)
    assert SHAPES["2b"] is SHAPES["qwen2-vl-2b"]
    assert SHAPES["7b"] is SHAPES["qwen2-vl-7b"]
    assert SHAPES["tiny"] == SHAPES["tiny-qwen2-vl"]
    assert all(family.label.lower() in f"tiny-{name}" for name, (family, _) in TINY.items() if name != "tiny")


@pytest.mark.parametrize("name", [name for name in TINY if name != "tiny"])
def test_a_written_base_has_the_values_of_a_new_model(name, tmp_path):
    """It loads in plain transformers without a missing tensor, predicts nothing, and has transformers' vectors."""
    family, shape = SHAPES[name]
    write_shape(tmp_path, name, tiny_processor(family))
    write_weights(tmp_path, name)
    assert is_whole(tmp_path)
    model = load_base(tmp_path, family)
    fresh = dict(getattr(transformers, family.model_class)(model.config).named_parameters())
    for parameter, written in model.named_parameters():
        if written.ndim > 1:
            assert written.std().item() == pytest.approx(shape.std, rel=0.4), parameter
        elif parameter.endswith("A_log"):
            rates = written.exp()
            assert (rates > DECAYS[0] * 0.99).all(), parameter
            assert (rates < DECAYS[1] * 1.01).all(), parameter
            assert rates.unique().numel() > 1, parameter
        else:
            assert torch.equal(written, fresh[parameter]), parameter
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (1, 96), generator=generator)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss == pytest.approx(math.log(model.config.text_config.vocab_size), abs=1.0)


def test_experts_are_planned_as_frozen_and_without_zero_3(tmp_path, media, capsys):
    """The plan without torch counts the parameters of the model that transformers builds."""
    name = "tiny-qwen3-vl-moe"
    family, _ = SHAPES[name]
    write_shape(tmp_path, name, tiny_processor(family))
    write_weights(tmp_path, name)
    rows = write_json(tmp_path / "rows.json", [row("<image>\nWhat?", "A temple.", id="a", image="china.jpg")])
    flags = ["plan", "--model_id", str(tmp_path), "--data_path", str(rows), "--image_folder", str(media), "--json"]
    assert main([*flags, "--dataloader_num_workers", "0"]) == 0
    groups = {group["name"]: group for group in json.loads(capsys.readouterr().out)["groups"]}
    weights = dict(load_base(tmp_path, family).named_parameters())
    assert groups["language_frozen"]["parameters"] == sum(
        tensor.numel() for parameter, tensor in weights.items() if family.tower_of(parameter) == "language"
    )
    assert not groups["language_frozen"]["trainable"]
    assert strategies_for(family) == ("ddp", "zero1", "zero2", "zero2_offload")
