"""A base stored in float16 trains in bfloat16 on a CPU, where torch has no norm for the two together."""

from __future__ import annotations

import pytest
import torch
from runs import losses
from safetensors.torch import load_file, save_file

from vlft.demo.tiny import build_tiny


@pytest.fixture(scope="module")
def half_base(tmp_path_factory):
    folder = build_tiny(tmp_path_factory.mktemp("half") / "tiny", dtype="bfloat16")
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("bfloat16", "float16"))
    return folder


@pytest.mark.parametrize("flags", [(), ("--bits", "4"), ("--vision", "lora", "--merger", "full", "--use_dora", "true")])
def test_a_float16_base_trains_in_bfloat16(half_base, train, tmp_path, flags):
    from vlft.merge import merge

    whole = train("--max_steps", "2", "--bf16", "true", *flags, base=half_base, name="half")
    exact = train("--max_steps", "2", *flags, base=half_base, name="exact")
    assert losses(whole) == pytest.approx(losses(exact), rel=0.02)
    assert merge(whole, tmp_path / "merged", dtype="fp32").max_logit_diff < 1e-4
    assert {t.dtype for t in load_file(half_base / "model.safetensors").values()} == {torch.float16}
