"""Weights of every family, in every form of its published files: loaded, merged, saved and resumed exactly."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import transformers
from adapters import logits, weights
from build import row, write_json
from mishaps import before_each_loss
from peft import LoraConfig, get_peft_model
from runs import FULL, arguments, losses, split
from stored import fused, rewritten, transposed, with_mtp
from transformers import AutoProcessor

from vlft.checkpoint import load_weights_strict, module_name, write_trained
from vlft.cli.main import main
from vlft.errors import CheckpointError
from vlft.families import FAMILIES, Family
from vlft.merge import merge
from vlft.model.load import load_base

#: Form of the files -> family, changes of the tiny base's tensors, number of files.
FORMS = {
    "qwen2_5_vl": ("qwen2_5_vl", dict, 1),
    "qwen3_vl": ("qwen3_vl", dict, 3),
    "qwen3_5-mtp": ("qwen3_5", with_mtp, 2),
    "qwen3_vl_moe-fused": ("qwen3_vl_moe", dict, 1),
    "qwen3_vl_moe-transposed": ("qwen3_vl_moe", transposed, 2),
    "qwen3_5_moe-each-mtp": ("qwen3_5_moe", with_mtp, 2),
    "qwen3_5_moe-fused": ("qwen3_5_moe", fused, 1),
}
NEW = [family for family in FAMILIES.values() if family.model_type != "qwen2_vl"]


@pytest.fixture(scope="session")
def form_of(base_of, tmp_path_factory):
    """A function: name of a form -> its family and folder."""
    made: dict[str, Path] = {}

    def form(name: str) -> tuple[Family, Path]:
        model_type, change, shards = FORMS[name]
        family = FAMILIES[model_type]
        if name not in made:
            out = tmp_path_factory.mktemp("forms") / name
            made[name] = rewritten(base_of(family), out, change, shards=shards)
        return family, made[name]

    return form


def stock(family: Family, folder: Path, **more):
    """The model as plain transformers loads it, complete."""
    model_class = getattr(transformers, family.model_class)
    model, info = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **more)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def test_every_form_loads_as_the_base_it_was_made_from(form_of, base_of):
    for name in FORMS:
        family, folder = form_of(name)
        whole, ours = stock(family, base_of(family)).state_dict(), load_base(folder, family).state_dict()
        assert whole.keys() == ours.keys()
        assert all(torch.equal(whole[key], ours[key]) for key in whole), name


@pytest.mark.parametrize("name", FORMS)
def test_an_adapter_of_plain_peft_merges_into_the_files_of_the_base(form_of, name, tmp_path):
    """Every LoRA target of every tower and every merger in full, against peft's own merge in float32."""
    family, folder = form_of(name)
    model = stock(family, folder)
    targets = "|".join(f"({family.lora_targets[tower]})" for tower in ("language", "vision"))
    mergers = ["model.visual.merger", *(n for n, _ in model.named_modules() if re.fullmatch(r".*merger_list\.\d+", n))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=mergers))
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if parameter.requires_grad and "lora_A" not in key:
                    parameter.add_(torch.randn_like(parameter) * 0.06)
    tuned.save_pretrained(tmp_path / "adapter")
    processor = AutoProcessor.from_pretrained(folder)
    wanted = logits(tuned, processor)
    report = merge(tmp_path / "adapter", tmp_path / "out", base_model=str(folder))

    assert report.towers == {"vision": "lora", "merger": "full", "language": "lora"}
    before, after = weights(folder), weights(tmp_path / "out")
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert sorted(p.name for p in (tmp_path / "out").glob("model*")) == sorted(p.name for p in folder.glob("model*"))
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert not any(n.startswith("mtp.") or ".experts." in n for n in moved)
    deepstack = {n for n in before if "deepstack_merger_list" in n}
    assert len(deepstack) == 6 * len(model.config.vision_config.to_dict().get("deepstack_visual_indexes") or ())
    assert deepstack <= moved
    assert sum(n.startswith("mtp.") for n in before) == (3 if "mtp" in name else 0)
    assert any(n.startswith("mtp.") for n in before) == any("mtp." in note for note in report.notes)

    for want, got in zip(wanted, logits(stock(family, tmp_path / "out"), processor), strict=True):
        assert (want - got).abs().max() <= 1e-4 * (want.max() - want.min())
    theirs = tuned.merge_and_unload().state_dict()
    ours = stock(family, tmp_path / "out").state_dict()
    assert max(float((theirs[key] - ours[key]).abs().max()) for key in theirs) < 1e-5


@pytest.mark.parametrize("name", FORMS)
def test_trained_weights_are_written_into_the_files_of_the_base_and_read_back(form_of, name, tmp_path):
    """What a full run saves: every float32 master, exact, in the form of the base."""
    family, folder = form_of(name)
    model = load_base(folder, family)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    trained, tied = dict(model.named_parameters()), family.tiny.tied
    write_trained(folder, tmp_path, trained, family, tied=tied, as_stored=True)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    before, after = weights(folder), weights(tmp_path)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    assert {n for n in before if torch.equal(before[n], after[n])} == {n for n in before if n.startswith("mtp.")}
    for other in (stock(family, tmp_path), load_base(folder, family)):
        if not torch.equal(other.lm_head.weight, model.lm_head.weight):
            assert load_weights_strict(other, tmp_path, family) == len(after) - sum(n.startswith("mtp.") for n in after)
        there = other.state_dict()
        assert all(torch.equal(there[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("qwen3_5_moe-each-mtp", lambda t: t.pop("model.language_model.layers.1.mlp.experts.2.up_proj.weight"),
         r"1 tensors are missing for Qwen3_5Moe.*layers\.1\.mlp\.experts\.2\.up_proj\.weight"),
        ("qwen3_5_moe-fused", lambda t: t.update({k: v.transpose(1, 2) for k, v in t.items() if ".experts." in k}),
         r"are mismatched for Qwen3_5Moe.*experts\.down_proj \(\[4, 24, 64\] in the files, \[4, 64, 24\] by config"),
        ("qwen3_vl_moe-fused", lambda t: t.update({"model.x.experts.4.up_proj": t["lm_head.weight"].clone()}),
         r"1 tensors are unexpected for Qwen3VLMoe.*experts\.4\.up_proj"),
        ("qwen3_vl", lambda t: t.update({"mtp.norm.weight": t["model.visual.merger.norm.weight"].clone()}),
         r"1 tensors are unexpected for Qwen3VLFor.*mtp\.norm\.weight"),
    ],
)  # fmt: skip
def test_files_that_lack_a_tensor_or_have_one_too_many_are_refused(form_of, name, change, says, tmp_path):
    family, folder = form_of(name)
    model = load_base(folder, family)

    def changed(tensors):
        change(tensors)
        return tensors

    broken = rewritten(folder, tmp_path / "broken", changed)
    (broken / "model.safetensors.index.json").unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match=says):
        load_base(broken, family)
    kept = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"Missing in the file|shapes differ"):
        load_weights_strict(model, broken, family)
    assert all(torch.equal(tensor, kept[key]) for key, tensor in model.state_dict().items())


def test_square_experts_that_transformers_would_misread_are_refused(tmp_path):
    """As wide inside as out: the transposed files have the shape of others, and transformers goes by the shape."""
    from vlft.demo.tiny import build_tiny

    family = FAMILIES["qwen3_vl_moe"]
    square = family.tiny.but(text={"moe_intermediate_size": 32})
    base = build_tiny(tmp_path / "base", family, shape=square)
    load_base(base, family)
    other = rewritten(base, tmp_path / "transposed", transposed)
    name = "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert not torch.equal(*(stock(family, one).get_parameter(name) for one in (base, other)))
    with pytest.raises(CheckpointError, match=r"stored transposed, and 3 of them are square.*reads these wrongly"):
        load_base(other, family)


# ---- runs

ROWS = [
    row("<image>\nWhat is it?", "A temple.", id="still", image="china.jpg"),
    row("<image><image>\nCompare.", "A flower and a face.", id="two", image=["flower.jpg", "astronaut.jpg"]),
    row("2+2?", "4", id="text"),
    row("Hi.", "Hello.", id="text-2"),
]
MERGER = ("--merger", "full")
TOWERS = ("--vision", "full", "--merger", "full", "--language", "frozen")


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_json(tmp_path_factory.mktemp("rows") / "rows.json", ROWS)


@pytest.mark.parametrize(
    ("name", "towers"),
    [
        pytest.param("qwen2_5_vl", FULL, marks=pytest.mark.grid),
        ("qwen3_vl", MERGER),
        ("qwen3_5-mtp", FULL),
        pytest.param("qwen3_vl_moe-transposed", TOWERS, marks=pytest.mark.grid),
        pytest.param("qwen3_5_moe-each-mtp", MERGER, marks=pytest.mark.grid),
    ],
)
def test_a_killed_run_resumes_to_the_same_bits_and_others_load_its_weights(
    form_of, name, towers, data, media, tmp_path, monkeypatch, capsys
):
    family, folder = form_of(name)
    more = (*towers, *split(1, 2), "--save_strategy", "steps", "--save_steps", "1", "--num_train_epochs", "1")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert main(arguments(folder, data, media, whole, *more)) == 0
    argv = arguments(folder, data, media, run, *more)
    with monkeypatch.context() as patch:
        before_each_loss(patch, _die_in_the_second_step)
        with pytest.raises(KeyError, match="killed"):
            main(argv)
    assert not list(run.glob("*.safetensors"))
    assert main(argv) == 0
    said = capsys.readouterr().out
    assert f"resuming from {run / 'checkpoint-1'}" in said
    one, two = weights(run), weights(whole)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in two)
    assert losses(run) == losses(whole)

    before = weights(folder)
    merger = tuple(prefix for prefix, tower in family.tower_prefixes if tower == "merger")
    mergers = {key for key in before if module_name(family, key).startswith(merger)}
    if towers == MERGER:
        stored_whole = {key.removeprefix("base_model.model.") for key in one if ".lora_" not in key}
        assert mergers == stored_whole
        assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
        run = tmp_path / "merged"
    else:
        assert ("copied unchanged" in said) == ("mtp" in name)
        masters = weights(run / "checkpoint-1")
        assert masters.keys() == before.keys()
        assert all(torch.equal(masters[key], before[key]) for key in before if key.startswith("mtp."))
    after = weights(run)
    assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
    same = {key for key in before if torch.equal(before[key], after[key])}
    assert {key for key in before if key.startswith("mtp.") or ".experts." in key} <= same
    assert same.isdisjoint(mergers)
    stock(family, run)


def _die_in_the_second_step(trainer, batch) -> None:
    if trainer.state.global_step == 1:
        raise KeyError("killed")
