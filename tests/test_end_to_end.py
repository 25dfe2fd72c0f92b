"""From a base and rows to weights that others load: train and merge with the CLI, load with transformers and peft."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from published import rewrite_as_published
from runs import FULL, VISION_LORA, arguments
from safetensors import safe_open

from vlft.checkpoint import tensor_index
from vlft.cli.main import main
from vlft.demo.tiny import build_tiny

PRESETS = {
    "language-lora": (),
    "vision-lora": VISION_LORA,
    "lora-full-merger": ("--vision", "frozen", "--merger", "full", "--language", "lora"),
}
# Enough movement that rounding to bf16 stays below what the merge allows.
MOVE = ("--max_steps", "12", "--learning_rate", "5e-3", "--lr_scheduler_type", "constant")


def tensors(folder: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Name -> dtype and shape of every tensor in the files of a model folder."""
    found = {}
    for file in set(tensor_index(folder).values()):
        with safe_open(file, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118
                tensor = source.get_tensor(name)
                found[name] = (tensor.dtype, tensor.shape)
    return found


def logits(model, encoded) -> torch.Tensor:
    """The last logits of a picture row and of a text row, computed by the stock forward."""
    from models import stock_inputs

    from vlft.model.load import load_processor

    with torch.no_grad():
        rows = [model(**stock_inputs(encoded[name], load_processor(model.name_or_path))).logits[0] for name in
                ("two-turns", "text")]  # fmt: skip
    return torch.cat(rows)


def stock(folder: Path):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)


def with_adapter(base: Path, run: Path):
    from peft import PeftModel

    model = stock(base)
    tuned = PeftModel.from_pretrained(model, run)
    tuned.name_or_path = str(base)
    return tuned


@pytest.fixture(scope="session", params=["fp32-tied", "bf16-untied", "published-bf16-tied"])
def any_base(request, tmp_path_factory) -> Path:
    """Bases that differ in dtype, tying and file layout."""
    folder = tmp_path_factory.mktemp("any") / request.param
    kind = {"dtype": "bfloat16" if "bf16" in request.param else "float32", "tied": "untied" not in request.param}
    if not request.param.startswith("published"):
        return build_tiny(folder, **kind)
    return rewrite_as_published(build_tiny(folder.with_name("modern"), **kind), folder)


@pytest.mark.parametrize("preset", PRESETS)
def test_adapter_equals_merged(any_base, mixed_json, media, tmp_path, encoded, capsys, preset):
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert main(arguments(any_base, mixed_json, media, run, *PRESETS[preset], *MOVE)) == 0
    capsys.readouterr()
    assert main(["merge", str(run), str(merged), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) >= {"dtype", "towers", "max_logit_diff", "tensors", "out"}
    assert tensors(merged) == tensors(any_base)
    ours, theirs, before = (logits(m, encoded) for m in (stock(merged), with_adapter(any_base, run), stock(any_base)))
    moved = (theirs - before).abs().max()
    bf16 = "bf16" in any_base.name
    assert (ours - theirs).abs().max() <= (0.02 * moved if bf16 else 1e-4 * (theirs.max() - theirs.min()))
    assert moved > 0.1


def test_a_full_run_has_the_bases_names_and_dtypes_and_needs_no_merge(any_base, mixed_json, media, tmp_path, capsys):
    run = tmp_path / "run"
    assert main(arguments(any_base, mixed_json, media, run, *FULL, *MOVE)) == 0
    assert tensors(run) == tensors(any_base)
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 1
    assert "needs no merge" in capsys.readouterr().err


def test_a_checkpoint_merges_as_it_stood(base, mixed_json, media, tmp_path, encoded):
    run, merged = tmp_path / "run", tmp_path / "merged"
    more = ("--save_strategy", "steps", "--save_steps", "3")
    assert main([*arguments(base, mixed_json, media, run, *VISION_LORA, *MOVE), *more]) == 0
    assert main(["merge", str(run / "checkpoint-6"), str(merged)]) == 0
    ours, theirs = logits(stock(merged), encoded), logits(with_adapter(base, run / "checkpoint-6"), encoded)
    assert (ours - theirs).abs().max() < 1e-4
    assert (ours - logits(with_adapter(base, run), encoded)).abs().max() > 1e-2


def test_a_fresh_process_with_transformers_alone_serves_the_merged_weights(base, mixed_json, media, tmp_path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    settings = ("--image_max_pixels", str(16 * 28 * 28), "--video_max_pixels", str(16 * 28 * 28))
    assert main(arguments(base, mixed_json, media, run, *VISION_LORA, *MOVE, *settings)) == 0
    assert main(["merge", str(run), str(merged)]) == 0
    script = """
import sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
text = processor.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
inputs = processor(text=[text], images=[Image.open(sys.argv[2])], return_tensors="pt")
print("GRID", int(inputs["image_grid_thw"].prod()) // 4, "vlft" in sys.modules)
print("NEW", model.generate(**inputs, max_new_tokens=4, do_sample=False).shape[1] - inputs["input_ids"].shape[1])
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(merged), str(media / "china.jpg")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    grid = next(line.split() for line in done.stdout.splitlines() if line.startswith("GRID"))
    assert int(grid[1]) <= 16  # the pixel settings of the run travel with the weights
    assert grid[2] == "False"
