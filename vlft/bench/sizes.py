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

#: Name of the tiny shape of each family -> family and shape, such as "tiny-qwen3-vl". "tiny" is of the default family.
TINY: dict[str, tuple[Family, Shape]] = {
    "tiny": (DEFAULT, DEFAULT.tiny),
    **{f"tiny-{family.label.lower()}": (family, family.tiny) for family in FAMILIES.values()},
}
_PUBLISHED = {name: (family, shape) for family in FAMILIES.values() for name, shape in family.shapes.items()}
#: Name -> family and shape; "2b" and "7b" are short for sizes of Qwen2-VL.
SHAPES: dict[str, tuple[Family, Shape]] = {
    **TINY,
    **{size: _PUBLISHED[f"qwen2-vl-{size}"] for size in ("2b", "7b")},
    **_PUBLISHED,
}
SHAPE_NAMES = tuple(SHAPES)
INDEX = "model.safetensors.index.json"  # written last
SHARD_BYTES = 2 * 2**30
DECAYS = (0.01, 16.0)  # range of decay rates of a new gated delta net (transformers 5.23, Qwen3_5PreTrainedModel)


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
        made = torch.empty(tensor.shape, device=device, dtype=kind)
        value = _constant(parameter, family) if tensor.ndim == 1 else None
        if value is not None:
            made.fill_(value)
        elif tensor.ndim == 1:
            made.uniform_(*DECAYS, generator=generator).log_()
        else:
            made.normal_(0, std, generator=generator)
        shard[family.published_name(parameter)] = made.cpu()
        held += made.nbytes
        total += made.nbytes
        if held > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)  # last: the weights count as complete once it exists
    return total


def _constant(parameter: str, family: Family) -> float | None:
    """The value of a vector in a new model of transformers; None for decay rates, whose logarithm is drawn."""
    module, _, kind = parameter.rpartition(".")
    if kind == "A_log":
        return None
    if kind == "bias":
        return 0.0
    # Norms that multiply by 1 + w start at 0. The norm of a gated delta net is plain in all families.
    centred = family.norm == "1 + w" and family.tower_of(parameter) == "language" and kind == "weight"
    return 0.0 if centred and not module.endswith("linear_attn.norm") else 1.0


if __name__ == "__main__":
    where, which = sys.argv[1:]
    write_weights(Path(where), which)
