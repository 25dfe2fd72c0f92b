"""Rewrite a model folder of transformers 5 into the layout Qwen published Qwen2-VL in (transformers 4.41 to 4.45)."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

# Keys that stand in the published flat config.json and in text_config today.
TEXT_KEYS = (
    "attention_dropout",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "max_window_layers",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "use_cache",
    "use_sliding_window",
    "vocab_size",
)
TOP_KEYS = ("architectures", "bos_token_id", "eos_token_id", "model_type", "tie_word_embeddings")
TOKEN_KEYS = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
VISION_KEYS = (
    "depth",
    "embed_dim",
    "mlp_ratio",
    "num_heads",
    "hidden_size",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
)


def rewrite_as_published(folder: str | Path, out: str | Path, *, shards: int = 3) -> Path:
    """The same model as the hub's Qwen2-VL folders have it.

    Flat `config.json` with `rope_scaling` of type mrope and `torch_dtype`, `preprocessor_config.json` with min_pixels
    and max_pixels, `chat_template.json`, weights in shards with an index, tokenizer as JSON, vocab and merges.

    Args:
        folder: as `build_tiny` writes it.
        out: folder to fill.
        shards: weight files.

    Returns:
        `out` as a path.
    """
    folder, out = Path(folder), Path(out)
    out.mkdir(parents=True)
    _write(out / "config.json", _config(_read(folder / "config.json")))
    _write(out / "generation_config.json", _read(folder / "generation_config.json"))
    pictures = _read(folder / "processor_config.json")["image_processor"]
    _write(
        out / "preprocessor_config.json",
        {
            "min_pixels": pictures["size"]["shortest_edge"],
            "max_pixels": pictures["size"]["longest_edge"],
            "patch_size": pictures["patch_size"],
            "temporal_patch_size": pictures["temporal_patch_size"],
            "merge_size": pictures["merge_size"],
            "image_mean": pictures["image_mean"],
            "image_std": pictures["image_std"],
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2VLProcessor",
        },
    )
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    _write(out / "chat_template.json", {"chat_template": template})
    _tokenizer(folder, out, template)
    _weights(folder, out, shards)
    return out


def _config(new: dict[str, Any]) -> dict[str, Any]:
    text, vision = new["text_config"], new["vision_config"]
    rope = text["rope_parameters"]
    return {
        # transformers 5.17 writes the end tokens into text_config only, 5.23 at the top too
        **{key: new.get(key, text.get(key)) for key in TOP_KEYS},
        **{key: new[key] for key in TOKEN_KEYS},
        "vision_token_id": new["vision_end_token_id"] + 1,
        **{key: text[key] for key in TEXT_KEYS},
        "rope_theta": rope["rope_theta"],
        "sliding_window": 32768,
        "torch_dtype": new["dtype"],
        "transformers_version": "4.41.2",
        "vision_config": {**{key: vision[key] for key in VISION_KEYS}, "in_chans": 3, "spatial_patch_size": 14},
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }


def _tokenizer(folder: Path, out: Path, template: str) -> None:
    shutil.copyfile(folder / "tokenizer.json", out / "tokenizer.json")
    whole = _read(folder / "tokenizer.json")
    _write(out / "vocab.json", whole["model"]["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in whole["model"]["merges"]]
    (out / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    settings = _read(folder / "tokenizer_config.json")
    special = settings.pop("extra_special_tokens")
    settings.pop("backend", None)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    ids = {added["content"]: added["id"] for added in whole["added_tokens"]}
    settings |= {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(ids[text]): {"content": text, **flags} for text in special},
        "additional_special_tokens": special,
        "chat_template": template,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    _write(out / "tokenizer_config.json", settings)


def _weights(folder: Path, out: Path, shards: int) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    share = -(-len(names) // shards)
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * share : (number + 1) * share]
        save_file({name: tensors[name] for name in part}, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
    _write(out / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
