"""Bases for benchmarks if the user names none: published sizes with random weights, and no download.

`vlft.families` defines the sizes. Random weights cost the same work as trained ones. Zeros do not: a GPU that
multiplies zeros draws less power and clocks higher.

    python -m vlft.bench.sizes FOLDER 2b       random weights for the config.json in FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from vlft.families import DEFAULT, FAMILIES, Family, Shape
from vlft.files import write_json
from vlft.model.build import build_config

#: Name -> family and shape. "tiny" is the tiny shape of the default family.
SHAPES: dict[str, tuple[Family, Shape]] = {
    "tiny": (DEFAULT, DEFAULT.tiny),
    **{name: (family, shape) for family in FAMILIES.values() for name, shape in family.shapes.items()},
}
SHAPE_NAMES = tuple(SHAPES)
INDEX = "model.safetensors.index.json"  # written last
SHARD_BYTES = 2 * 2**30


def is_whole(folder: Path) -> bool:
    """Whether the base in a folder is complete."""
    return (folder / INDEX).exists()


def write_shape(folder: Path, name: str, processor: Any) -> None:
    """Write a base folder of this shape that plain transformers can load, except for its weights.

    Args:
        processor: stock processor; its tokenizer may have fewer tokens than the shape's vocabulary.
    """
    family, shape = SHAPES[name]
    processor.save_pretrained(folder)
    config = build_config(family, shape, processor.tokenizer)
    config.architectures = [family.model_class]
    config.dtype = shape.dtype
    config.save_pretrained(folder)


def write_weights(folder: Path, name: str, *, seed: int = 0) -> int:
    """Write random weights for the config in `folder`, in shards. They are drawn on the GPU if there is one.

    Returns:
        bytes written.
    """
    import torch
    from safetensors.torch import save_file

    from vlft.model.load import empty_model, load_config

    config, family = load_config(folder)
    shape = SHAPES[name][1]
    kind, std = getattr(torch, shape.dtype), shape.std
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(seed)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    total = held = 0

    def flush() -> None:
        nonlocal shard, held
        file = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard, held = {}, 0

    for parameter, tensor in empty_model(config, family).state_dict().items():
        if parameter == family.head and shape.tied:
            continue
        if tensor.ndim > 1:
            made = torch.empty(tensor.shape, device=device, dtype=kind).normal_(0, std, generator=generator)
        else:  # weights of norms are ones, and biases are zeros, as in a new model
            made = torch.full(tensor.shape, float(parameter.endswith("weight")), dtype=kind)
        shard[family.published_name(parameter)] = made.cpu()
        held += made.nbytes
        total += made.nbytes
        if held > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)  # last: the weights count as complete once it exists
    return total


if __name__ == "__main__":
    where, which = sys.argv[1:]
    write_weights(Path(where), which)
