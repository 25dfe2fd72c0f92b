"""Adapters of other kits and older versions: read as plain peft reads them, or refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapters import LANGUAGE, Shelf, base_plus_adapter, logits, reloaded, save_adapter, weights
from build import FAMILY
from safetensors.torch import load_file, save_file

from vlft.chat import open_model
from vlft.checkpoint import module_name
from vlft.cli.main import main
from vlft.errors import CheckpointError
from vlft.merge import merge

FILE = "adapter_model.safetensors"
OLD = (("model.language_model.", "model."), ("model.visual.", "visual."))


@pytest.fixture(scope="module")
def shelf(tmp_path_factory) -> Shelf:
    return Shelf(root=tmp_path_factory.mktemp("shelf"))


def renamed(adapter: Path, out: Path, rename: Callable[[str], str]) -> Path:
    """An adapter with other names of tensors."""
    shutil.copytree(adapter, out)
    tensors = {rename(name): tensor for name, tensor in load_file(out / FILE).items()}
    save_file(tensors, out / FILE, metadata={"format": "pt"})
    return out


def old_name(name: str) -> str:
    """The name in transformers before 4.52."""
    for new, old in OLD:
        name = name.replace(new, old)
    return name


def edit(file: Path, change: Callable[[dict], object]) -> None:
    raw = json.loads(file.read_text())
    change(raw)
    file.write_text(json.dumps(raw))


def same(one: Path, other: Path) -> None:
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


# ---- names of older versions, and of wrappers


@pytest.mark.parametrize("kind", ["full_merger", "patterns", pytest.param("everywhere", marks=pytest.mark.grid)])
def test_names_of_older_transformers_are_read(shelf, tmp_path, kind):
    new = shelf.adapter("fp32", kind)
    old = renamed(new, tmp_path / "old", old_name)

    def older(settings: dict) -> None:
        settings["target_modules"] = old_name(settings["target_modules"].replace("\\.", ".")).replace(".", "\\.")
        settings["modules_to_save"] = [old_name(name) for name in settings["modules_to_save"] or ()] or None
        if kind == "patterns":
            settings["rank_pattern"] = {"q_proj": 2, r"model\.layers\.1\.mlp\.up_proj": 3}

    edit(old / "adapter_config.json", older)
    report = merge(old, tmp_path / "old-merged")
    merge(new, tmp_path / "new-merged")
    same(tmp_path / "old-merged", tmp_path / "new-merged")
    assert report.max_logit_diff < 1e-4
    assert re.search(r"\d+ of \d+ tensors have names of another version of transformers", report.notes[0])
    chat = open_model(old, device="cpu")
    assert chat.notes == report.notes
    for want, got in zip(base_plus_adapter(shelf.base("fp32"), new), spoken(chat, shelf.base("fp32")), strict=True):
        assert (want - got).abs().max() < 1e-5


def spoken(chat, base: Path) -> list[torch.Tensor]:
    """Logits of the model that chat answers with."""
    from transformers import AutoProcessor

    return logits(chat.speaker.model, AutoProcessor.from_pretrained(base))


@pytest.mark.parametrize("prefix", ["module.base_model.model.", ""])
def test_names_with_what_wrappers_add_are_read(shelf, tmp_path, prefix):
    def rename(name: str) -> str:
        name = re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", name)
        name = name.replace("self_attn.", "_fsdp_wrapped_module._orig_mod.self_attn.")
        return prefix + name.removeprefix("base_model.model.")

    new = shelf.adapter("fp32", "language")
    assert "read under today's" in merge(renamed(new, tmp_path / "wrapped", rename), tmp_path / "one").notes[0]
    merge(new, tmp_path / "other")
    same(tmp_path / "one", tmp_path / "other")


def test_two_names_of_one_tensor_are_refused(shelf, tmp_path):
    adapter = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "adapter"))
    tensors = load_file(adapter / FILE)
    name = next(iter(tensors))
    save_file(tensors | {old_name(name): tensors[name] + 1}, adapter / FILE, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds the same tensor under two names"):
        merge(adapter, tmp_path / "out")


def test_a_base_with_the_names_of_modules_keeps_them(shelf, tmp_path):
    base = Path(shutil.copytree(shelf.base("fp32"), tmp_path / "base"))
    tensors = {module_name(FAMILY, name): tensor for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    old = renamed(shelf.adapter("fp32", "everywhere"), tmp_path / "old", old_name)
    merge(old, tmp_path / "out", base_model=str(base))
    assert weights(tmp_path / "out").keys() == tensors.keys()
    for want, got in zip(
        base_plus_adapter(shelf.base("fp32"), shelf.adapter("fp32", "everywhere")),
        reloaded(tmp_path / "out"),
        strict=True,
    ):
        assert (want - got).abs().max() < 1e-4


def test_an_adapter_that_names_no_base_or_one_of_another_machine_asks_for_it(shelf, tmp_path, capsys):
    adapter = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "adapter"))
    for named in (None, "", "/elsewhere/models/qwen2vl"):
        edit(adapter / "adapter_config.json", lambda raw, named=named: raw.update(base_model_name_or_path=named))
        for argv in (["merge", str(adapter), str(tmp_path / "out")], ["chat", str(adapter), "Hi."]):
            assert main(argv) == 1
            assert "--base_model" in capsys.readouterr().err


# ---- weights in files beside an adapter


def vision(base: Path, prefix: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A vision tower trained in full: with the base's names, and with the names under which a kit saves it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        trained = {k: v + 0.05 * torch.randn_like(v) for k, v in weights(base).items() if k.startswith("visual.")}
    return trained, {prefix + name: tensor for name, tensor in trained.items()}


@pytest.mark.parametrize(
    ("file", "prefix"),
    [
        ("vit.safetensors", "base_model.model.model."),  # ms-swift
        ("non_lora_state_dict.safetensors", ""),  # 2U1's, converted
    ],
)
def test_weights_trained_in_full_beside_an_adapter_are_merged_and_asked(shelf, tmp_path, file, prefix, capsys):
    base = shelf.base("fp32")
    trained, saved = vision(base, prefix)
    adapter = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "adapter"))
    save_file(saved, adapter / file, metadata={"format": "pt"})
    assert main(["merge", str(adapter), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert f"note: {file}: {len(trained)} tensors that were trained in full replace those of the base." in printed.err
    assert "vision full, merger full, language lora" in printed.out

    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    save_file(weights(base) | trained, moved / "model.safetensors", metadata={"format": "pt"})
    wanted = base_plus_adapter(moved, shelf.adapter("fp32", "language"))
    for want, got in zip(wanted, reloaded(tmp_path / "out"), strict=True):
        assert (want - got).abs().max() < 1e-4
    for want, got in zip(wanted, spoken(open_model(adapter, device="cpu"), base), strict=True):
        assert (want - got).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["non_lora_state_dict.bin", "adapter_model.bin"])
def test_pickled_weights_are_refused_with_the_command_that_converts_them(shelf, tmp_path, name, capsys):
    adapter = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "adapter"))
    if name == "adapter_model.bin":
        torch.save(load_file(adapter / FILE), adapter / name)
        (adapter / FILE).unlink()
    else:
        torch.save(vision(shelf.base("fp32"), "base_model.model.model.")[1], adapter / name)
    for argv in (["merge", str(adapter), str(tmp_path / "out")], ["chat", str(adapter), "Hi."]):
        assert main(argv) == 1
        printed = capsys.readouterr().err
        command = re.search(r'python -c "(.*)" and move the pickle away', printed)
        assert command is not None, printed
    exec(command[1])
    (adapter / name).unlink()
    assert merge(adapter, tmp_path / "out").changed == (14 if name == "adapter_model.bin" else 45)


@pytest.mark.parametrize(
    ("file", "tensors", "says"),
    [
        ("value_head.safetensors", {"v_head.summary.weight": (1, 64)}, "1 of its 1 tensors are no part of Qwen2-VL"),
        ("new_embeddings.safetensors", {"input_embeddings": (2, 64)}, "no part of Qwen2-VL.*input_embeddings.*Move"),
        ("vit.safetensors", {"visual.merger.ln_q.weight": (48,)}, r"ln_q\.weight is \[48\], the base's .* is \[32\]"),
        (
            "extra.safetensors",
            {"model.layers.0.self_attn.q_proj.weight": (64, 64)},
            "which the adapter changes too",
        ),
        ("model.safetensors", {"visual.merger.ln_q.weight": (32,)}, "holds both"),
    ],
)  # fmt: skip
def test_weights_beside_an_adapter_that_cannot_be_used_are_refused(shelf, tmp_path, file, tensors, says):
    adapter = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "adapter"))
    save_file({name: torch.ones(shape) for name, shape in tensors.items()}, adapter / file)
    with pytest.raises(CheckpointError, match=says):
        merge(adapter, tmp_path / "out")


def test_what_is_not_used_is_said_and_states_of_training_are_no_weights(shelf, tmp_path):
    adapter = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "adapter"))
    (adapter / "global_step200").mkdir()
    for name in ("optimizer.pt", "scheduler.pt", "training_args.bin", "rng_state_0.pth", "zero_to_fp32.py", "run.gguf"):
        (adapter / name).write_bytes(b"x")
    report = merge(adapter, tmp_path / "out")
    assert report.notes == (f"not used, because the adapter is {FILE}: global_step200/, run.gguf",)


# ---- one tensor with two roles: embedding and head


@pytest.mark.parametrize(
    ("base", "settings", "untied"),
    [
        ("bf16", {"modules_to_save": ["lm_head"]}, True),
        ("fp32", {"modules_to_save": ["embed_tokens"]}, True),
        ("fp32", {"target_modules": LANGUAGE + r"|lm_head"}, True),
        ("bf16", {"target_modules": LANGUAGE + r"|lm_head"}, True),
        ("fp32", {"save": {"save_embedding_layers": True}}, False),
    ],
)
def test_head_and_embedding_of_a_tied_base_are_merged_as_peft_has_them(shelf, tmp_path, base, settings, untied):
    folder = shelf.published(base)
    adapter = save_adapter(folder, tmp_path / "adapter", **({"target_modules": LANGUAGE} | settings))
    report = merge(adapter, tmp_path / "out")
    after = weights(tmp_path / "out")
    assert ("lm_head.weight" in after) == untied
    assert {tensor.dtype for tensor in after.values()} == {torch.float32 if base == "fp32" else torch.bfloat16}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] != untied
    assert any("tie_word_embeddings" in note for note in report.notes) == untied
    limit = 1e-5 if base == "fp32" else 0.02
    for want, got in zip(base_plus_adapter(folder, adapter), reloaded(tmp_path / "out"), strict=True):
        assert (want - got).abs().max() <= limit * (want.max() - want.min())


def test_an_adapter_with_a_grown_vocabulary_says_so(shelf, tmp_path):
    adapter = Path(shutil.copytree(shelf.adapter("fp32", "language"), tmp_path / "adapter"))
    tensors = load_file(adapter / FILE) | {"base_model.model.model.embed_tokens.weight": torch.ones(400, 64)}
    save_file(tensors, adapter / FILE, metadata={"format": "pt"})
    for use in (lambda: merge(adapter, tmp_path / "out"), lambda: open_model(adapter, device="cpu")):
        with pytest.raises(CheckpointError, match=r"has 400 rows, .* 320: the vocabulary was resized.*--base_model"):
            use()
