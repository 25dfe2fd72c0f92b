"""Bases to measure on where the user names none: published sizes, random weights, no download.

The values are those of config.json of Qwen/Qwen2-VL-2B-Instruct and -7B-Instruct. Random weights cost the same work as
trained ones; zeros would not (a GPU that multiplies zeros draws less power and clocks higher).

    python -m vlft.bench.sizes FOLDER 2b       random weights for the config.json in FOLDER
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from vlft.files import write_json

ShapeName = Literal["tiny", "2b", "7b"]
SHAPE_NAMES: tuple[ShapeName, ...] = get_args(ShapeName)
INDEX = "model.safetensors.index.json"  # written last
SHARD_BYTES = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class BaseSize:
    """Sizes of a Qwen2-VL; attributes named as in config.json.

    Attributes:
        vocab_size: None: as small as the tokenizer allows.
        dtype: of the stored weights. std: of the random matrices.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int | None
    tied: bool
    mrope_section: tuple[int, int, int]
    depth: int
    embed_dim: int
    num_heads: int
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    std: float = 0.02


SHAPES: dict[ShapeName, BaseSize] = {
    "tiny": BaseSize(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=None, tied=True, mrope_section=(2, 3, 3), depth=2, embed_dim=32, num_heads=2, dtype="float32",
        std=0.1,
    ),
    "2b": BaseSize(
        hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2,
        vocab_size=151936, tied=True, mrope_section=(16, 24, 24), depth=32, embed_dim=1280, num_heads=16,
    ),
    "7b": BaseSize(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        vocab_size=152064, tied=False, mrope_section=(16, 24, 24), depth=32, embed_dim=1280, num_heads=16,
    ),
}  # fmt: skip


def shape_config(shape: BaseSize, processor: Any) -> Any:
    """transformers' config of a shape whose control tokens are the processor's."""
    from transformers import Qwen2VLConfig

    tokenizer = processor.tokenizer

    def token(text: str) -> int:
        return tokenizer.convert_tokens_to_ids(text)

    ends: dict[str, Any] = {"bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>")}
    return Qwen2VLConfig(
        text_config={
            "vocab_size": shape.vocab_size or 64 * -(-len(tokenizer) // 64),
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.num_hidden_layers,
            "num_attention_heads": shape.num_attention_heads,
            "num_key_value_heads": shape.num_key_value_heads,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": shape.tied,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": list(shape.mrope_section),
            },
            "pad_token_id": token("<|endoftext|>"),
            **ends,
        },
        vision_config={
            "depth": shape.depth,
            "embed_dim": shape.embed_dim,
            "hidden_size": shape.hidden_size,
            "num_heads": shape.num_heads,
            "mlp_ratio": 4,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=shape.tied,
        **ends,
    )


def is_whole(folder: Path) -> bool:
    """Whether a base lies there to its last file."""
    return (folder / INDEX).exists()


def write_shape(folder: Path, name: ShapeName, processor: Any) -> None:
    """A base folder of this shape that plain transformers loads, but for its weights.

    Args:
        processor: a stock processor; its tokenizer may have fewer tokens than the shape's vocabulary.
    """
    shape = SHAPES[name]
    processor.save_pretrained(folder)
    config = shape_config(shape, processor)
    config.architectures = ["Qwen2VLForConditionalGeneration"]
    config.dtype = shape.dtype
    config.save_pretrained(folder)


def write_weights(folder: Path, name: ShapeName, *, seed: int = 0) -> int:
    """Random weights for the config in `folder`, drawn on the GPU where there is one, in shards.

    Returns:
        bytes written.
    """
    import torch
    from safetensors.torch import save_file

    from vlft.model.load import empty_model, load_config

    config, family = load_config(folder)
    kind, std = getattr(torch, SHAPES[name].dtype), SHAPES[name].std
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
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if tensor.ndim > 1:
            made = torch.empty(tensor.shape, device=device, dtype=kind).normal_(0, std, generator=generator)
        else:  # norms scale by one, biases add nothing, as freshly built
            made = torch.full(tensor.shape, float(parameter.endswith("weight")), dtype=kind)
        shard[family.published_name(parameter)] = made.cpu()
        held += made.nbytes
        total += made.nbytes
        if held > SHARD_BYTES:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX, index)  # last: by it the weights count as written
    return total


if __name__ == "__main__":
    where, which = sys.argv[1:]
    write_weights(Path(where), cast(ShapeName, which))
