"""Merged weights are base + adapter, with the base's names and dtypes, or nothing is written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import (
    BASES,
    FAMILY,
    KINDS,
    LANGUAGE,
    Shelf,
    base_plus_adapter,
    record_of,
    reloaded,
    save_adapter,
    weights,
)
from safetensors.torch import load_file, save_file

import vlft.merge
import vlft.merge.write
from vlft.checkpoint import base_fingerprint, read_record, write_record
from vlft.demo.tiny import build_tiny
from vlft.errors import CheckpointError
from vlft.merge import merge, towers_of_adapter
from vlft.merge.verify import flips_of


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(root=tmp_path_factory.mktemp("shelf"))


@pytest.fixture
def run(shelf, tmp_path) -> Path:
    """A new run folder: language LoRA on the float32 base, with its record."""
    folder = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "run"))
    write_record(folder, record_of(shelf.base("fp32"), KINDS["language"][1]))
    return folder


# --- adapter = merged = reloaded ---


@pytest.mark.parametrize(
    ("base", "kind"),
    [(base, kind) for kind in ("language", "everywhere", "full_merger") for base in BASES]
    + [(base, kind) for kind in ("one_block", "patterns") for base in ("fp32", "bf16_untied")],
)
def test_merged_is_base_plus_adapter(shelf, tmp_path, base, kind):
    folder, adapter = shelf.base(base), shelf.adapter(base, kind)
    report = merge(adapter, tmp_path / "out")
    before, after = weights(folder), weights(tmp_path / "out")
    assert after.keys() == before.keys()
    assert ("lm_head.weight" in after) == ("untied" in base)
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert report.tensors == len(before)
    assert report.changed == len(moved)
    towers = KINDS[kind][1]
    assert tuple(report.towers[tower] for tower in ("vision", "merger", "language")) == towers
    assert any(name.startswith("visual.blocks") for name in moved) == (towers[0] != "frozen")
    assert any(name.startswith("visual.merger") for name in moved) == (towers[1] != "frozen")
    assert "no vlft.json" in report.lineage
    wanted, found = base_plus_adapter(folder, adapter), reloaded(tmp_path / "out")
    for want, got in zip(wanted, found, strict=True):
        span = (want.max() - want.min()).item()
        assert (want - got).abs().max().item() <= (1e-4 if "fp32" in base else 0.02) * span
    assert not report.warnings


@pytest.mark.parametrize("kind", ["everywhere", "full_merger"])
@pytest.mark.parametrize("base", ["fp32", "bf16_untied"])
def test_the_published_layout_survives(shelf, tmp_path, base, kind):
    published = shelf.published(base)
    write_names = []
    report = merge(shelf.adapter(base, kind), tmp_path / "out", base_model=str(published), progress=write_names.append)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in published.iterdir())
    for name in ("config.json", "generation_config.json", "model.safetensors.index.json", "preprocessor_config.json",
                 "chat_template.json", "tokenizer_config.json"):  # fmt: skip
        assert (out / name).read_bytes() == (published / name).read_bytes(), name
    for file in published.glob("*.safetensors"):
        assert load_file(out / file.name).keys() == load_file(file).keys()
        assert (out / file.name).stat().st_size == file.stat().st_size
    assert [line for line in write_names if line.startswith("merge:")][-1].endswith("(3 of 3)")
    assert report.base_model == str(published)
    for want, got in zip(base_plus_adapter(published, shelf.adapter(base, kind)), reloaded(out), strict=True):
        assert (want - got).abs().max() <= (1e-4 if base == "fp32" else 0.02) * (want.max() - want.min())


def test_stock_transformers_loads_the_published_layout_as_the_original(shelf):
    from transformers import AutoConfig, AutoProcessor, Qwen2VLForConditionalGeneration

    one, two = shelf.base("bf16"), shelf.published("bf16")
    states = [Qwen2VLForConditionalGeneration.from_pretrained(folder).state_dict() for folder in (one, two)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {tensor.dtype for tensor in states[1].values()} == {torch.bfloat16}
    configs = [AutoConfig.from_pretrained(folder) for folder in (one, two)]
    for name in ("hidden_size", "max_position_embeddings", "num_key_value_heads", "sliding_window", "rms_norm_eps"):
        assert getattr(configs[0].text_config, name) == getattr(configs[1].text_config, name)
    ropes = [config.text_config.rope_parameters for config in configs]
    assert all(ropes[1][key] == value for key, value in ropes[0].items())
    processors = [AutoProcessor.from_pretrained(folder) for folder in (one, two)]
    assert processors[0].chat_template == processors[1].chat_template
    assert processors[0].image_processor.size == processors[1].image_processor.size
    assert processors[0].video_processor.size == processors[1].video_processor.size
    text = "<|im_start|>user\ncafé <|image_pad|><|box_start|>(1,2)<|im_end|>"
    assert processors[0].tokenizer(text).input_ids == processors[1].tokenizer(text).input_ids
    for want, got in zip(reloaded(one), reloaded(two), strict=True):
        assert torch.equal(want, got)


@pytest.mark.grid  # test_end_to_end has one such process by default
def test_a_fresh_process_without_vlft_agrees(shelf, tmp_path):
    """All presets, read by transformers and peft alone."""
    pairs = []
    for base, kind in (("bf16", "language"), ("fp32_untied", "everywhere"), ("fp32", "full_merger")):
        out = tmp_path / f"{base}-{kind}"
        merge(shelf.adapter(base, kind), out)
        pairs.append([str(shelf.base(base)), str(shelf.adapter(base, kind)), str(out)])
    script = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration as Model
for base, adapter, out in json.loads(sys.argv[1]):
    ids = AutoProcessor.from_pretrained(out)(text=["<|im_start|>user\\nhow are you?"], return_tensors="pt")
    tuned = PeftModel.from_pretrained(Model.from_pretrained(base, dtype=torch.float32), adapter).eval()
    merged = Model.from_pretrained(out).eval()
    print(merged.dtype, end=" ")
    with torch.no_grad():
        want, got = tuned(**ids).logits, merged.float()(**ids).logits
    print(((want - got).abs().max() / (want.max() - want.min())).item())
assert "vlft" not in sys.modules
"""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONSAFEPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(pairs)], capture_output=True, text=True, env=env, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("torch.")]
    assert [line[0] for line in lines] == ["torch.bfloat16", "torch.float32", "torch.float32"]
    assert [float(line[1]) < limit for line, limit in zip(lines, (0.02, 1e-4, 1e-4), strict=True)] == [True] * 3


def test_an_adapter_that_moves_nothing_gives_the_base(shelf, tmp_path):
    report = merge(shelf.adapter("bf16", "language", strength=0.0), tmp_path / "out")
    before, after = weights(shelf.base("bf16")), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert report.max_logit_diff == 0.0
    assert report.rows[0].moved == 0.0


# --- runs of vlft ---


def test_a_checkpoint_of_a_run_merges_with_its_own_processor(run, shelf, tmp_path):
    from transformers import AutoProcessor

    step = Path(shutil.copytree(run, run / "checkpoint-4"))
    processor = AutoProcessor.from_pretrained(shelf.base("fp32"))
    processor.image_processor.size = {"shortest_edge": 4 * 784, "longest_edge": 9 * 784}
    processor.save_pretrained(step)
    own = "{# the run's own #}" + processor.chat_template
    (step / "chat_template.jinja").write_text(own)
    published = shelf.published("fp32")
    report = merge(step, tmp_path / "out", base_model=str(published))
    assert report.lineage.startswith(f"fingerprint {base_fingerprint(published)}")
    out = AutoProcessor.from_pretrained(tmp_path / "out")
    assert out.image_processor.size["longest_edge"] == 9 * 784
    assert out.chat_template == own
    assert not (tmp_path / "out" / "chat_template.json").exists()
    old = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())  # for servers that read no other file
    assert (old["min_pixels"], old["max_pixels"]) == (4 * 784, 9 * 784)
    record = read_record(tmp_path / "out")
    assert record.kind == "full"
    assert record.training["merged_from"] == str(step)
    with pytest.raises(CheckpointError, match="needs no merge: it is already a whole model"):
        merge(tmp_path / "out", tmp_path / "again")


def test_an_adapter_for_another_base_is_refused(run, shelf, tmp_path):
    other = build_tiny(tmp_path / "other", seed=5)
    want, found = base_fingerprint(shelf.base("fp32")), base_fingerprint(other)
    with pytest.raises(CheckpointError, match=rf"fingerprint {want}, but .*other has {found}.*--base_model"):
        merge(run, tmp_path / "out", base_model=str(other))
    assert not (tmp_path / "out").exists()


def test_an_adapter_config_changed_since_training_is_refused(run, tmp_path):
    config = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    with pytest.raises(CheckpointError, match=r"says lora_alpha 1, its vlft.json says 8"):
        merge(run, tmp_path / "merged")


def test_a_base_that_is_gone_says_where_it_was_and_how_to_name_it(run, tmp_path):
    record = read_record(run)
    write_record(run, replace(record, base_model="/gone/base"))
    with pytest.raises(CheckpointError, match=r"run: its base cannot be opened\. /gone/base.*--base_model"):
        merge(run, tmp_path / "out")


def test_a_record_and_an_adapter_of_two_runs_are_refused(run, tmp_path):
    record = read_record(run)
    write_record(run, replace(record, towers=record.towers | {"vision": "lora"}))
    with pytest.raises(CheckpointError, match=r"says it trained .*'vision': 'lora'.*tensors say .*'vision': 'frozen'"):
        merge(run, tmp_path / "out")


# --- dtypes and what rounding costs ---


def test_a_wider_dtype_keeps_everything(shelf, tmp_path):
    adapter = shelf.adapter("bf16", "language", strength=0.002)
    report = merge(adapter, tmp_path / "out", base_model=str(shelf.published("bf16")), dtype="fp32")
    assert report.dtype == "float32"
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}
    assert report.max_logit_diff < 1e-4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float32"
    old, new = (json.loads((f / "model.safetensors.index.json").read_text())
                for f in (shelf.published("bf16"), tmp_path / "out"))  # fmt: skip
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] == 2 * old["metadata"]["total_size"]


def test_what_bf16_cannot_hold_is_refused_with_the_way_out(shelf, tmp_path):
    adapter = shelf.adapter("bf16", "language", strength=0.002)
    with pytest.raises(CheckpointError, match=r"on a text row.*the adapter moves them by.*--dtype fp32.*--dtype bf16"):
        merge(adapter, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    report = merge(adapter, tmp_path / "out", dtype="bf16")
    assert len(report.warnings) == 2
    assert "bfloat16 is too coarse" in report.warnings[0]
    assert all(row.fault <= 1e-4 * row.range < row.difference for row in report.rows)


@pytest.mark.parametrize(("word", "kind"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_a_narrower_dtype_when_told(shelf, tmp_path, word, kind):
    report = merge(shelf.adapter("fp32", "full_merger"), tmp_path / "out", dtype=word)
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {kind}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == report.dtype == str(kind).removeprefix("torch.")
    assert all(row.faultless for row in report.rows)


def test_what_float16_cannot_reach_is_refused(shelf, tmp_path):
    base = Path(shutil.copytree(shelf.base("fp32"), tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: its largest value, 1e\+06, does not fit.*bf16"):
        merge(shelf.adapter("fp32", "language"), tmp_path / "out", base_model=str(base), dtype="fp16")


def test_a_tie_is_no_flip():
    adapted = torch.tensor([[8.0, 7.99, 0.0], [8.0, 7.0, 0.0]])
    merged = torch.tensor([[7.99, 8.0, 0.0], [7.0, 8.0, 0.0]])
    assert flips_of(adapted, merged, torch.bfloat16) == 1
    assert flips_of(adapted, merged, torch.float16) == 2
    assert flips_of(adapted, merged, None) == 2
    assert flips_of(adapted, adapted, None) == 0


@pytest.mark.parametrize("base", ["fp32", "bf16"])
def test_wrong_arithmetic_is_measured(shelf, tmp_path, monkeypatch, base):
    right = vlft.merge.write.merged_weight

    def wrong(weight, update, adapter):
        return right(weight, replace(update, scale=update.scale * 1.02), adapter)

    monkeypatch.setattr(vlft.merge.write, "merged_weight", wrong)
    with pytest.raises(CheckpointError, match=r"not merged: .*It is not rounding"):
        merge(shelf.adapter(base, "language"), tmp_path / "out", dtype="keep" if base == "fp32" else "bf16")
    assert not list(tmp_path.iterdir())


# --- adapters that are refused ---


def edited(adapter: Path, folder: Path, change) -> Path:
    shutil.copytree(adapter, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


LAYER = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t.update({LAYER.replace("0", "7") + ".lora_A.weight": torch.ones(4, 64)}),
            r"1 of 29 tensors.*layers\.7",
        ),
        (lambda t: t.pop(LAYER + ".lora_B.weight"), r"1 of 27 tensors have no place.*q_proj\.lora_A"),
        (lambda t: t.update({LAYER + ".lora_magnitude_vector.weight": torch.ones(64)}), "lora_magnitude_vector"),
        (lambda t: t.update({LAYER + ".weight": torch.ones(64, 64)}), r"no place.*q_proj\.weight"),
        (lambda t: t.update({LAYER + ".lora_A.weight": torch.ones(4, 32)}), r"\[64, 64\] at rank 4.*found A \[4, 32\]"),
        (lambda t: t.update({LAYER + ".lora_A.weight": torch.ones(2, 64)}), r"at rank 4.*found A \[2, 64\]"),
        (lambda t: t.clear(), "holds no tensor"),
    ],
)
def test_every_adapter_tensor_has_its_place(shelf, tmp_path, change, says):
    adapter = edited(shelf.adapter("fp32", "language"), tmp_path / "adapter", change)
    with pytest.raises(CheckpointError, match=says):
        merge(adapter, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_module_copy_of_another_shape_is_refused(shelf, tmp_path):
    def change(tensors):
        tensors["base_model.model.model.visual.merger.ln_q.weight"] = torch.ones(48)

    adapter = edited(shelf.adapter("fp32", "full_merger"), tmp_path / "adapter", change)
    with pytest.raises(
        CheckpointError, match=r"ln_q\.weight is \[48\], the base's visual\.merger\.ln_q\.weight is \[32\]"
    ):
        merge(adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out=True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"a_setting_of_peft_1": 7}, "a_setting_of_peft_1=7"),
    ],
)
def test_what_is_more_than_lora_is_refused_by_name(shelf, tmp_path, settings, says):
    adapter = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "adapter"))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=says + ".*merge_and_unload"):
        merge(adapter, tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, r"needs a lora_magnitude_vector \[\d+\].*found none"),
        (
            {"trainable_token_indices": [1]},
            r"trainable_token_indices is \[1\], but the adapter holds no rows of tokens",
        ),
    ],
)
def test_settings_whose_tensors_are_missing_are_refused(shelf, tmp_path, settings, says):
    adapter = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "adapter"))
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=says):
        merge(adapter, tmp_path / "out")


def test_untied_embeddings_and_head_merge(shelf, tmp_path):
    adapter = save_adapter(
        shelf.base("fp32_untied"),
        tmp_path / "adapter",
        target_modules=LANGUAGE,
        modules_to_save=["model.language_model.embed_tokens", "lm_head"],
    )
    assert merge(adapter, tmp_path / "out").changed == 16


def test_a_bare_adapter_whose_shapes_differ_is_refused(shelf, tmp_path):
    base = build_tiny(tmp_path / "base", shape=FAMILY.tiny.but(text={"intermediate_size": 96}))
    with pytest.raises(CheckpointError, match=r"for model\.layers\.0\.mlp\.\w+\.weight \[.*96.*\].*--base_model"):
        merge(shelf.adapter("fp32", "language"), tmp_path / "out", base_model=str(base))


def test_towers_are_read_from_names():
    lora = "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_A.weight"
    old = "base_model.model.visual.blocks.1.attn.qkv.lora_B.weight"  # transformers before 4.52
    merger = "base_model.model.model.visual.merger.mlp.0.bias"
    assert towers_of_adapter([lora], FAMILY) == {"vision": "frozen", "merger": "frozen", "language": "lora"}
    assert towers_of_adapter([old, merger], FAMILY) == {"vision": "lora", "merger": "full", "language": "frozen"}
    with pytest.raises(CheckpointError, match="no part of Qwen2-VL"):
        towers_of_adapter(["base_model.model.encoder.lora_A.weight"], FAMILY)


# --- OUT ---


def test_what_is_no_adapter_is_refused(shelf, tmp_path):
    with pytest.raises(CheckpointError, match="needs no merge"):
        merge(shelf.base("fp32"), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"neither adapter_model\.safetensors"):
        merge(tmp_path, tmp_path / "out")


def test_out_must_be_new_or_empty(shelf, tmp_path):
    adapter = shelf.adapter("fp32", "language")
    out = tmp_path / "out"
    out.mkdir()
    assert merge(adapter, out).out == str(out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(CheckpointError, match="already exists and is not empty"):
        merge(adapter, out)
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_killed_merge_leaves_no_half_out_and_its_leftovers_go(shelf, tmp_path, monkeypatch):
    left = tmp_path / ".out.merging"
    left.mkdir()
    (left / "model-00001-of-00009.safetensors").write_bytes(b"half")
    seen = []

    def look(**_):
        seen.append((tmp_path / "out").exists())
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("vlft.merge.verify.verify", look)
        with pytest.raises(KeyboardInterrupt):
            merge(shelf.adapter("fp32", "language"), tmp_path / "out")
    assert seen == [False]
    assert not list(tmp_path.iterdir())
    left.mkdir()
    (left / "old.bin").write_bytes(b"half")
    merge(shelf.adapter("fp32", "language"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "old.bin").exists()


def test_two_merges_do_not_write_one_out(shelf, tmp_path):
    with vlft.merge._workshop(tmp_path / "out"), pytest.raises(CheckpointError, match="another merge is writing it"):
        merge(shelf.adapter("fp32", "language"), tmp_path / "out")


def test_a_full_disk_is_one_clear_message(shelf, tmp_path, monkeypatch):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(CheckpointError, match=r"the disk is full\. .* removed; .* (GiB|MB) are free now"):
            merge(shelf.adapter("fp32", "language"), tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(vlft.merge.write.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"need [0-9.]*[1-9][0-9.]* MB, 0\.0 MB are free"):
        merge(shelf.adapter("fp32", "language"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
