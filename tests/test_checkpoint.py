"""Run records, model folders and strict loading: what is read equals what was written, and nothing else is accepted."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from adapters import RECORD
from build import FAMILY
from published import rewrite_as_published
from safetensors.torch import load_file, save_file

from vlft.checkpoint import (
    base_fingerprint,
    family_of,
    find_adapter_or_model,
    library_versions,
    load_adapter_strict,
    load_weights_strict,
    read_record,
    resolve_model,
    snapshot_revision,
    tensor_index,
    write_record,
)
from vlft.demo.tiny import build_tiny
from vlft.errors import CheckpointError


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("bases") / "untied", tied=False, dtype="bfloat16")


@pytest.fixture
def copy(base, tmp_path) -> Path:
    """A copy of the base, to damage."""
    return Path(shutil.copytree(base, tmp_path / "copy"))


def live_model(seed: int = 9, *, tied: bool = True) -> torch.nn.Module:
    from transformers import Qwen2VLForConditionalGeneration

    from vlft.demo.tiny import tiny_config, tiny_processor

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2VLForConditionalGeneration(tiny_config(tiny_processor(), tied=tied))


def live_adapter(seed: int):
    """A peft model with LoRA on the language attention and its own copy of the merger, all random."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=2, target_modules=FAMILY.attention_targets["language"], modules_to_save=["model.visual.merger"]
    )
    model = get_peft_model(live_model(), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
    return model


# --- vlft.json ---


def test_a_record_survives_the_disk(tmp_path):
    write_record(tmp_path, RECORD)
    assert read_record(tmp_path) == RECORD
    assert [path.name for path in tmp_path.iterdir()] == ["vlft.json"]
    raw = json.loads((tmp_path / "vlft.json").read_text(encoding="utf-8"))
    assert raw["format"] == 1
    assert raw["towers"]["merger"] == "full"
    assert raw["data"][0]["file"] == "träin.json"


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_record(tmp_path, RECORD)
    with pytest.raises(TypeError):
        write_record(tmp_path, replace(RECORD, training={"odd": object()}))
    assert read_record(tmp_path) == RECORD


def test_keys_of_a_later_version_are_passed_over(tmp_path):
    path = write_record(tmp_path, RECORD)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mix": "later"}))
    assert read_record(tmp_path) == RECORD


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda raw: "{", "not JSON"),
        (lambda raw: "[]", "expected an object"),
        (lambda raw: json.dumps(raw | {"format": 2}), "format is 2, this vlft reads up to 1"),
        (lambda raw: json.dumps({k: v for k, v in raw.items() if k != "base_model"}), "lacks base_model"),
        (lambda raw: json.dumps(raw | {"towers": {"vision": "half"}}), "each one of"),
        (lambda raw: json.dumps(raw | {"media": {}}), "expected ['fps'"),
        (lambda raw: json.dumps(raw | {"kind": "merged"}), "kind is 'merged'"),
        (lambda raw: json.dumps(raw | {"data": [{"file": "a"}]}), "malformed"),
        (
            lambda raw: json.dumps(raw | {"data": [{"file": "a", "rows": 5, "trained": 3, "skipped": []}]}),
            "a: 5 rows read, but 3 trained + 0 skipped",
        ),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, edit, says):
    path = write_record(tmp_path, RECORD)
    path.write_text(edit(json.loads(path.read_text())))
    with pytest.raises(CheckpointError, match=re.escape(says)):
        read_record(tmp_path)


def test_no_record_at_all(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no vlft\.json"):
        read_record(tmp_path)


def test_versions_name_what_is_installed():
    assert {"torch", "transformers", "peft"} <= library_versions().keys()


# --- finding models ---


def test_a_folder_resolves_to_itself(base):
    assert resolve_model(str(base)) == base
    assert family_of(base) is FAMILY


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere_at_all"])
def test_a_missing_folder_says_what_was_looked_for(name):
    with pytest.raises(CheckpointError, match=r"no such model folder \(looked for /.*Give a folder"):
        resolve_model(name)


def test_an_adapter_is_no_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2-VL-2B-Instruct"}')
    with pytest.raises(CheckpointError, match=r"an adapter, not a whole model.*'Qwen/Qwen2-VL-2B-Instruct'"):
        resolve_model(tmp_path)


def test_a_folder_without_config_is_no_base(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json in"):
        resolve_model(tmp_path)


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    for read in (resolve_model, tensor_index):
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: pickled weights run code.*safetensors"):
            read(copy)


def test_another_kind_of_model_is_refused(copy):
    (copy / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"model_type is 'llama'.*Supported: Qwen2-VL"):
        family_of(copy)


def test_a_hub_id_is_fetched_without_pickles(base, monkeypatch):
    asked = {}

    def download(repo, *, revision, allow_patterns):
        asked.update(repo=repo, revision=revision, patterns=allow_patterns)
        return str(base)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert resolve_model("Qwen/Qwen2-VL-2B-Instruct", "main") == base
    assert asked["repo"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert asked["revision"] == "main"
    assert not [pattern for pattern in asked["patterns"] if "bin" in pattern or "py" in pattern]


def test_every_way_the_hub_fails_is_one_message(monkeypatch):
    from huggingface_hub import errors

    response = Mock()  # works for any http client under the hub's client
    failures = [
        (errors.RepositoryNotFoundError("404", response=response), "the hub has no such model"),
        (errors.RevisionNotFoundError("404", response=response), "no such revision"),
        (errors.GatedRepoError("403", response=response), "gated"),
        (errors.LocalEntryNotFoundError("offline"), "not in the cache"),
        (errors.HFValidationError("bad id"), "not in the cache"),
        (OSError("disk"), "not in the cache"),
    ]
    for error, says in failures:

        def download(*_, error=error, **__):
            raise error

        monkeypatch.setattr("huggingface_hub.snapshot_download", download)
        with pytest.raises(CheckpointError, match=rf"Qwen/No-Such at revision v2: no folder /.*{says}"):
            resolve_model("Qwen/No-Such", "v2")


def test_the_commit_of_a_cached_snapshot():
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert snapshot_revision(f"hub/models--Qwen--x/snapshots/{commit}") == commit
    assert snapshot_revision("runs/snapshots/latest") is None


# --- weight files ---


def test_the_fingerprint_sees_weights_and_not_how_they_are_kept(base, untied, tmp_path):
    from vlft.checkpoint import module_name

    prints = {base_fingerprint(base)}
    prints.add(base_fingerprint(rewrite_as_published(base, tmp_path / "published")))
    modules = shutil.copytree(base, tmp_path / "modules")
    tensors = load_file(base / "model.safetensors")
    save_file({module_name(FAMILY, name): tensor for name, tensor in tensors.items()}, modules / "model.safetensors")
    assert "model.language_model.norm.weight" in tensor_index(modules)
    prints.add(base_fingerprint(modules))
    twice = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(twice, modules / "model.safetensors")
    prints.add(base_fingerprint(modules))
    assert len(prints) == 1

    wide = shutil.copytree(untied, tmp_path / "wide")
    save_file({k: v.float() for k, v in load_file(untied / "model.safetensors").items()}, wide / "model.safetensors")
    assert base_fingerprint(wide) == base_fingerprint(untied)
    assert base_fingerprint(untied) not in prints
    assert base_fingerprint(build_tiny(tmp_path / "other", seed=1)) not in prints


def test_an_index_must_tell_the_truth(base, tmp_path):
    folder = rewrite_as_published(base, tmp_path / "published")
    assert tensor_index(folder).keys() == tensor_index(base).keys()
    index, shard = folder / "model.safetensors.index.json", folder / "model-00002-of-00003.safetensors"
    raw = json.loads(index.read_text())

    index.write_text(json.dumps({"weight_map": raw["weight_map"] | {"ghost": shard.name}}))
    with pytest.raises(CheckpointError, match=r"names 58 tensors, the shards hold 57.*ghost"):
        tensor_index(folder)
    less = {name: file for name, file in raw["weight_map"].items() if name != "model.norm.weight"}
    index.write_text(json.dumps({"weight_map": less}))
    with pytest.raises(CheckpointError, match=r"not in the index: model\.norm\.weight"):
        tensor_index(folder)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="no readable weight_map"):
        tensor_index(folder)
    index.write_text(json.dumps(raw))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: not a complete safetensors file"):
        tensor_index(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: no such file"):
        tensor_index(folder)


@pytest.mark.parametrize("published", [False, True])
def test_a_full_checkpoint_loads_whole(base, tmp_path, published):
    folder = rewrite_as_published(base, tmp_path / "published") if published else base
    model = live_model()
    parameters = dict(model.named_parameters())
    assert load_weights_strict(model, folder, FAMILY) == 57
    stored = load_file(base / "model.safetensors")
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, stored[FAMILY.published_name(name)]), name
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_an_untied_bf16_checkpoint_loads_into_float32_masters(untied):
    model = live_model(tied=False)
    assert load_weights_strict(model, untied, FAMILY) == 58
    assert model.lm_head.weight.dtype == torch.float32
    assert torch.equal(model.lm_head.weight.bfloat16(), load_file(untied / "model.safetensors")["lm_head.weight"])


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.pop("visual.merger.ln_q.bias"), r"Missing in the file: visual\.merger\.ln_q\.bias"),
        (lambda t: t.update(odd=torch.zeros(2)), r"unexpected in it: odd"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32)}), r"model\.norm\.weight \[32\].*\[64\]"),
        (lambda t: t.update({"lm_head.weight": torch.ones(320, 64)}), r"lm_head\.weight differs from model\.embed"),
        (lambda t: t.update({"model.visual.merger.ln_q.bias": torch.ones(32)}), r"published and its module name"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(copy, edit, says):
    tensors = load_file(copy / "model.safetensors")
    edit(tensors)
    save_file(tensors, copy / "model.safetensors")
    model = live_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(CheckpointError, match=says):
        load_weights_strict(model, copy, FAMILY)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_tied_head_that_was_written_out_is_taken(copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, copy / "model.safetensors")
    assert load_weights_strict(live_model(), copy, FAMILY) == 58


def test_an_untied_model_wants_its_head(base):
    with pytest.raises(CheckpointError, match=r"Missing in the file: lm_head\.weight"):
        load_weights_strict(live_model(tied=False), base, FAMILY)


def test_an_adapter_loads_whole_and_in_place(tmp_path):
    saved, live = live_adapter(seed=1), live_adapter(seed=2)
    saved.save_pretrained(tmp_path)
    optimizer = torch.optim.SGD([p for p in live.parameters() if p.requires_grad])
    assert load_adapter_strict(live, tmp_path) == 22
    wanted = {name: p for name, p in saved.named_parameters() if p.requires_grad}
    for name, parameter in live.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, wanted[name]), name
    held = {id(p) for p in optimizer.param_groups[0]["params"]}
    assert held == {id(p) for p in live.parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t, a, b: t.pop(a), "Missing in the file: base_model"),
        (lambda t, a, b: t.pop(b), "Missing in the file: base_model"),
        (lambda t, a, b: t.update({a + "x": t[a].clone()}), "unexpected in it: base_model"),
        (lambda t, a, b: t.update({a: torch.zeros(4, 64)}), r"\[4, 64\] in the file, \[2, 64\] live"),
    ],
)
def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path, edit, says):
    live_adapter(seed=1).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    lora = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"
    edit(tensors, lora, "base_model.model.model.visual.merger.mlp.0.weight")
    save_file(tensors, file)
    live = live_adapter(seed=2)
    before = {name: parameter.clone() for name, parameter in live.named_parameters()}
    with pytest.raises(CheckpointError, match=says):
        load_adapter_strict(live, tmp_path)
    assert all(torch.equal(parameter, before[name]) for name, parameter in live.named_parameters())


# --- finding runs ---


def fake_adapter(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base", "revision": "v1"}')
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    return folder


def test_a_run_a_checkpoint_and_a_bare_adapter_are_found(base, tmp_path):
    run = fake_adapter(tmp_path / "run")
    bare = find_adapter_or_model(run)
    assert (bare.kind, bare.record, bare.base_model, bare.base_revision) == ("adapter", None, "some/base", "v1")
    write_record(run, RECORD)
    found = find_adapter_or_model(str(run))
    assert (found.kind, found.record, found.base_model) == ("adapter", RECORD, RECORD.base_model)
    step = fake_adapter(run / "checkpoint-20")
    write_record(step, RECORD)
    assert find_adapter_or_model(step).folder == step
    assert find_adapter_or_model(base).kind == "full"


def test_an_unfinished_run_names_its_newest_checkpoint(tmp_path):
    for step in (9, 20, 100):
        fake_adapter(tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-tmp").mkdir()
    with pytest.raises(CheckpointError, match=r"has not finished.*newest checkpoint, .*checkpoint-100\."):
        find_adapter_or_model(tmp_path)


def test_what_is_no_run_is_refused(base, tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        find_adapter_or_model(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"neither adapter_model\.safetensors nor model\.safetensors"):
        find_adapter_or_model(tmp_path)
    run = fake_adapter(tmp_path / "run")
    write_record(run, replace(RECORD, kind="full"))
    with pytest.raises(CheckpointError, match=r"says 'full', the files are 'adapter'"):
        find_adapter_or_model(run)
    (run / "adapter_model.safetensors").rename(run / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin, a pickle"):
        find_adapter_or_model(run)
    (run / "adapter_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config\.json without adapter_model\.safetensors"):
        find_adapter_or_model(run)
    both = fake_adapter(shutil.copytree(base, tmp_path / "both"))
    with pytest.raises(CheckpointError, match="holds both"):
        find_adapter_or_model(both)
    (both / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"without adapter_config\.json"):
        find_adapter_or_model(both)
