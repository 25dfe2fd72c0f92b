"""Adapters of plain peft on tiny bases, their run records, and the logits they must be merged to."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from build import FAMILY
from published import rewrite_as_published
from safetensors.torch import load_file

from vlft.checkpoint import RunRecord, base_fingerprint
from vlft.demo.tiny import build_tiny

RECORD = RunRecord(
    kind="adapter",
    base_model="Qwen/Qwen2-VL-2B-Instruct",
    base_revision="a" * 40,
    base_fingerprint="0123456789abcdef",
    model_type="qwen2_vl",
    towers={"vision": "frozen", "merger": "full", "language": "lora"},
    lora={"rank": 32, "alpha": 64, "dropout": 0.05, "target": "all"},
    media={
        "image_min_pixels": 3136,
        "image_max_pixels": 50176,
        "video_min_pixels": 3136,
        "video_max_pixels": 50176,
        "fps": 2.0,
        "nframes": None,
        "video_max_frames": 768,
    },
    versions={"vlft": "0.1"},
    training={"seed": 42, "global_batch": 8},
    data=[
        {
            "file": "träin.json",
            "rows": 3,
            "trained": 2,
            "skipped": [{"index": 1, "id": None, "field": "image[0]", "reason": "no such file"}],
        }
    ],
)

ALL = "|".join(f"({FAMILY.lora_targets[tower]})" for tower in ("language", "vision", "merger"))

LANGUAGE = FAMILY.lora_targets["language"]

# Settings for plain peft, and the towers that must be read from the resulting adapter.
KINDS = {
    "language": ({"target_modules": LANGUAGE}, ("frozen", "frozen", "lora")),
    "everywhere": ({"target_modules": ALL}, ("lora", "lora", "lora")),
    "full_merger": (
        {"target_modules": LANGUAGE, "modules_to_save": ["model.visual.merger"]},
        ("frozen", "full", "lora"),
    ),
    "one_block": (
        {"target_modules": LANGUAGE, "modules_to_save": ["model.visual.blocks.0"]},
        ("full", "frozen", "lora"),
    ),
    "patterns": (
        {
            "target_modules": LANGUAGE,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3},
            "alpha_pattern": {"down_proj": 4},
        },
        ("frozen", "frozen", "lora"),
    ),
}

BASES = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "fp32_untied": {"dtype": "float32", "tied": False},
    "bf16_untied": {"dtype": "bfloat16", "tied": False},
}


@dataclass(frozen=True, kw_only=True)
class Shelf:
    """Bases and adapters, each built once for all tests and never changed."""

    root: Path

    def base(self, name: str) -> Path:
        folder = self.root / "bases" / name
        return folder if folder.is_dir() else build_tiny(folder, **BASES[name])

    def published(self, name: str) -> Path:
        folder = self.root / "published" / name
        return folder if folder.is_dir() else rewrite_as_published(self.base(name), folder)

    def adapter(self, base: str, kind: str, *, strength: float = 0.06) -> Path:
        """An adapter of plain peft on a base, its B and module copies moved by normal noise of this size."""
        folder = self.root / "adapters" / f"{base}-{kind}-{strength}"
        if not folder.is_dir():
            save_adapter(self.base(base), folder, strength=strength, **KINDS[kind][0])
        return folder


def save_adapter(base: Path, folder: Path, *, strength: float = 0.06, save: dict | None = None, **settings) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2VLForConditionalGeneration

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
        tuned = get_peft_model(model, LoraConfig(**({"r": 4, "lora_alpha": 8} | settings)))
        with torch.no_grad():
            for name, parameter in tuned.named_parameters():
                if parameter.requires_grad and "lora_A" not in name:
                    parameter.add_(torch.randn_like(parameter) * strength)
        tuned.save_pretrained(folder, **(save or {}))
    return folder


def record_of(base: Path, towers: tuple[str, str, str]) -> RunRecord:
    return replace(
        RECORD,
        base_model=str(base),
        base_revision=None,
        base_fingerprint=base_fingerprint(base),
        lora={"rank": 4, "alpha": 8, "dropout": 0.0, "target": "all"},
        towers=dict(zip(("vision", "merger", "language"), towers, strict=True)),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a model folder, as its files spell them."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def logits(model, processor, *, dtype=torch.float32) -> list[torch.Tensor]:
    """Logits of a text row and a picture row, all positions. They are not the rows that the merge itself uses."""
    from PIL import Image

    picture = Image.effect_mandelbrot((112, 84), (-2, -1.5, 1, 1.5), 90).convert("RGB")
    rows = [
        processor(text=["<|im_start|>user\nhello<|im_end|>\n"], return_tensors="pt"),
        processor(text=["<|vision_start|><|image_pad|><|vision_end|>what?"], images=[picture], return_tensors="pt"),
    ]
    with torch.no_grad():
        return [model.to(dtype).eval()(**row, use_cache=False).logits[0] for row in rows]


def base_plus_adapter(base: Path, adapter: Path) -> list[torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, adapter), AutoProcessor.from_pretrained(base))


def reloaded(folder: Path) -> list[torch.Tensor]:
    from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

    model, info = Qwen2VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return logits(model, AutoProcessor.from_pretrained(folder))
