"""Tiny bases in the forms in which models are published: layouts of experts, tensors that are not loaded, shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from adapters import weights
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def rewritten(base: Path, out: Path, change: Callable[[Tensors], Tensors], *, shards: int = 1) -> Path:
    """A copy of a model folder with other tensors; with several shards it has an index."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = {name: tensor.contiguous() for name, tensor in change(weights(base)).items()}
    names = sorted(tensors)
    files = ["model.safetensors"]
    if shards > 1:
        files = [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
        where = {name: files[place % shards] for place, name in enumerate(names)}
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (out / "model.safetensors.index.json").write_text(json.dumps(index))
    for place, file in enumerate(files):
        save_file({name: tensors[name] for name in names[place::shards]}, out / file, metadata={"format": "pt"})
    return out


def with_mtp(tensors: Tensors) -> Tensors:
    """With heads that predict several tokens, as Qwen3.5's files have them. transformers does not load them."""
    made = torch.Generator().manual_seed(1)
    of = {"mtp.fc.weight": (64, 128), "mtp.norm.weight": (64,), "mtp.layers.0.self_attn.q_proj.weight": (256, 64)}
    return tensors | {name: torch.randn(shape, generator=made).bfloat16() for name, shape in of.items()}


def transposed(tensors: Tensors) -> Tensors:
    """Experts as [E, in, out], as Qwen3-VL-MoE is published."""
    return {n: t.transpose(1, 2) if ".experts." in n else t for n, t in tensors.items()}


def fused(tensors: Tensors) -> Tensors:
    """Experts as one tensor per matrix, as Qwen3.5-MoE is published."""
    found = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for prefix in sorted({name.split(".experts.")[0] for name in tensors.keys() - found.keys()}):
        count = 1 + max(
            int(n.split(".experts.")[1].split(".")[0]) for n in tensors if n.startswith(f"{prefix}.experts")
        )
        one = [
            {p: tensors[f"{prefix}.experts.{e}.{p}_proj.weight"] for p in ("gate", "up", "down")} for e in range(count)
        ]
        found[f"{prefix}.experts.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in one])
        found[f"{prefix}.experts.down_proj"] = torch.stack([e["down"] for e in one])
    return found
