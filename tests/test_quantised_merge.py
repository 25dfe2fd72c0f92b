"""A run on a quantised base merges to what was trained, and answers like it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import LANGUAGE, logits, record_of, reloaded, save_adapter, weights

from vlft.checkpoint import read_record, write_record
from vlft.cli.main import main
from vlft.demo.tiny import build_tiny
from vlft.merge import merge

pytest.importorskip("bitsandbytes")

LAYERS = 14  # linear layers of the tiny language model
FORMATS = {"nf4": ("nf4", False), "double": ("nf4", True), "fp4": ("fp4", False), "int8": ("int8", False)}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("quantised")


def base_of(shelf: Path, dtype: str = "float32") -> Path:
    folder = shelf / dtype
    return folder if folder.is_dir() else build_tiny(folder, dtype=dtype)


def run_of(shelf: Path, folder: Path, kind: str, *, dtype: str = "float32", strength: float = 0.06, **settings) -> Path:
    """A run folder: an adapter of plain peft, and a record which says how the base was quantised."""
    base = base_of(shelf, dtype)
    save_adapter(base, folder, strength=strength, **{"target_modules": LANGUAGE, **settings})
    name, double = FORMATS[kind]
    quantised = {"bits": 8 if name == "int8" else 4, "kind": name, "double": double, "modules": {"language": LAYERS}}
    write_record(folder, replace(record_of(base, ("frozen", "frozen", "lora")), quantised=quantised))
    return folder


def stock_quantised(base: Path, kind: str):
    """The base as plain transformers quantises it with bitsandbytes: only the linear layers of the language model."""
    from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration

    name, double = FORMATS[kind]
    skip = {"llm_int8_skip_modules": ["model.visual", "lm_head"]}
    four = {"load_in_4bit": True, "bnb_4bit_quant_type": name, "bnb_4bit_use_double_quant": double}
    config = BitsAndBytesConfig(**skip, **({"load_in_8bit": True, "llm_int8_threshold": 0.0} if name == "int8" else four))
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        base, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # else the first forward repacks the weights, and rounds to bf16
    return model


def as_trained(base: Path, run: Path, kind: str) -> list[torch.Tensor]:
    from peft import PeftModel
    from transformers import AutoProcessor

    model = PeftModel.from_pretrained(stock_quantised(base, kind), run)
    return _logits(model, AutoProcessor.from_pretrained(base))


def _logits(model, processor) -> list[torch.Tensor]:
    model.to = lambda dtype: model  # `logits` casts, and a quantised model cannot be
    return logits(model, processor)


@pytest.mark.parametrize("kind", FORMATS)
def test_probe(shelf, tmp_path, kind):
    run = run_of(shelf, tmp_path / "run", kind)
    for onto in ("dequantised", "original"):
        report = merge(run, tmp_path / onto, onto=onto)
        print(kind, onto, report.max_logit_diff, report.quantisation_drift, report.rows, report.warnings)
        for want, got in zip(as_trained(base_of(shelf), run, kind), reloaded(tmp_path / onto), strict=True):
            print((want-got).abs().max(), want.max()-want.min())
