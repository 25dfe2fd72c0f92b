"""A run on a quantised base merges to what was trained, and answers like it."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import LANGUAGE, base_plus_adapter, logits, record_of, reloaded, save_adapter, weights
from build import FAMILY
from peft import PeftModel
from safetensors.torch import save_file

import vlft.model.packed
from vlft.chat import open_model, question
from vlft.checkpoint import base_fingerprint, read_record, write_record
from vlft.cli.main import main
from vlft.config.flags import DataFlags, ModelFlags
from vlft.demo.tiny import build_tiny
from vlft.errors import CheckpointError, ConfigError
from vlft.merge import merge
from vlft.merge.named_base import compare_bases
from vlft.model.quantise import PACKAGE, Quantisation
from vlft.model.quantised_files import QuantisedFiles
from vlft.setup import open_base, start_of

pytest.importorskip("bitsandbytes")

DOWN = "model.layers.0.mlp.down_proj.weight"
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
    eight = {"load_in_8bit": True, "llm_int8_threshold": 0.0}
    config = BitsAndBytesConfig(**skip, **(eight if name == "int8" else four))
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        base, dtype=torch.float32, quantization_config=config, device_map="cpu"
    )
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # else the first forward repacks the weights, and rounds to bf16
    return model


def as_trained(base: Path, run: Path, kind: str) -> list[torch.Tensor]:
    from transformers import AutoProcessor

    model = PeftModel.from_pretrained(stock_quantised(base, kind), run)
    return _logits(model, AutoProcessor.from_pretrained(base))


def _logits(model, processor) -> list[torch.Tensor]:
    model.to = lambda dtype: model  # `logits` casts, and a quantised model cannot be
    return logits(model, processor)


def share(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """The largest difference, as a share of the range of the logits."""
    pairs = zip(wanted, found, strict=True)
    return max(((want - got).abs().max() / (want.max() - want.min())).item() for want, got in pairs)


def linears(tensors: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in tensors if name.startswith("model.layers.") and name.endswith("proj.weight")}


# ---- what is merged


@pytest.mark.parametrize("kind", FORMATS)
def test_merged_is_what_was_trained(shelf, tmp_path, kind):
    """Against the layers that plain transformers makes of the base, and plain peft.

    With fp4, LoRA is on attention only: the MLPs were quantised in training as well.
    """
    target = FAMILY.attention_targets["language"] if kind == "fp4" else LANGUAGE
    base, run = base_of(shelf), run_of(shelf, tmp_path / "run", kind, target_modules=target)
    report = merge(run, tmp_path / "out")
    assert share(as_trained(base, run, kind), reloaded(tmp_path / "out")) <= (0.05 if kind == "int8" else 1e-4)
    assert report.onto == "dequantised"
    assert report.changed == (8 if kind == "fp4" else LAYERS)
    assert report.max_logit_diff < 1e-4
    assert all(row.layers < 1e-5 < row.moved for row in report.rows)
    before, after = weights(base), weights(tmp_path / "out")
    assert {name: tensor.dtype for name, tensor in after.items()} == {n: t.dtype for n, t in before.items()}
    assert {name for name in before if not torch.equal(before[name], after[name])} == linears(before)
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert report.quantisation_drift == report.max_logit_diff
    assert not report.warnings
    merged = read_record(tmp_path / "out")
    assert (merged.kind, merged.quantised) == ("full", None)
    assert merged.training["merged_onto"] == "dequantised"
    assert merged.training["trained_on"] == read_record(run).quantised
    if kind == "double":
        theirs = PeftModel.from_pretrained(stock_quantised(base, kind).dequantize(), run).merge_and_unload()
        published = {FAMILY.published_name(name): tensor for name, tensor in theirs.state_dict().items()}
        assert all((published[name].float() - after[name]).abs().max() <= 1e-5 for name in after)


def test_a_bf16_base_stays_bf16(shelf, tmp_path):
    base, run = base_of(shelf, "bfloat16"), run_of(shelf, tmp_path / "run", "nf4", dtype="bfloat16", strength=0.3)
    report = merge(run, tmp_path / "out")
    assert report.dtype == "bfloat16"
    assert share(as_trained(base, run, "nf4"), reloaded(tmp_path / "out")) <= 0.02


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_run_in_float32_on_a_bf16_base_merges_with_a_word_about_the_base(shelf, tmp_path, kind):
    """Old GPUs and CPUs compute in float32. bf16 cannot hold the base's dequantised values, and says so."""
    base, run = base_of(shelf, "bfloat16"), run_of(shelf, tmp_path / "run", kind, dtype="bfloat16", strength=0.3)
    report = merge(run, tmp_path / "out")
    assert report.dtype == "bfloat16"
    assert all(row.faultless and row.kept and row.same_weights for row in report.rows)
    assert all(row.coarse > 0 for row in report.rows)
    assert report.quantisation_drift >= max(row.coarse for row in report.rows) / 2
    trained = as_trained(base, run, kind)
    worst = max((want - got).abs().max().item() for want, got in zip(trained, reloaded(tmp_path / "out"), strict=True))
    assert worst == pytest.approx(report.quantisation_drift, rel=0.5) or kind == "int8"
    told = [line for line in report.warnings if "too coarse for the values of the quantised base" in line]
    assert bool(told) == any(row.coarse > row.allowed for row in report.rows)


def test_small_changes_are_still_judged_against_the_rounding(shelf, tmp_path):
    """An adapter whose change bf16 loses is refused, also on a quantised base."""
    run = run_of(shelf, tmp_path / "run", "nf4", dtype="bfloat16", strength=0.002)
    with pytest.raises(CheckpointError, match="too coarse to hold what the adapter changed"):
        merge(run, tmp_path / "out")


def test_onto_the_original_base_tells_the_drift(shelf, tmp_path, capsys):
    base, run = base_of(shelf), run_of(shelf, tmp_path / "run", "nf4")
    assert main(["merge", str(run), str(tmp_path / "out"), "--onto", "original"]) == 0
    for want, got in zip(base_plus_adapter(base, run), reloaded(tmp_path / "out"), strict=True):
        assert (want - got).abs().max() <= 1e-4 * (want.max() - want.min())
    assert share(as_trained(base, run, "nf4"), reloaded(tmp_path / "out")) > 0.05
    shown = capsys.readouterr().out
    assert "onto     original: layers that were quantised in training have the base's own values" in shown
    moved = r"the adapter moves them by [\d.]+; from the quantised base \+ adapter they differ by ([\d.]+)"
    assert float(re.search(moved, shown)[1]) > 0.1


# ---- bases whose files are quantised


@pytest.fixture(scope="module")
def stored(shelf) -> Path:
    """The base as unsloth publishes it: quantised by transformers, with its processor."""
    folder = shelf / "tiny-bnb-4bit"
    stock_quantised(base_of(shelf), "double").save_pretrained(folder)
    for file in base_of(shelf).iterdir():
        if not (folder / file.name).exists():
            shutil.copy(file, folder)
    return folder


def run_on(stored: Path, run: Path) -> Path:
    """Make a run of `run_of` one that was trained on the quantised files of its base."""
    record = read_record(run)
    write_record(run, replace(record, base_model=str(stored), base_fingerprint=base_fingerprint(stored)))
    return run


def test_a_base_that_is_stored_quantised_is_merged_into_the_one_that_is_named(shelf, stored, tmp_path, capsys):
    base, run = base_of(shelf), run_on(stored, run_of(shelf, tmp_path / "run", "double"))
    assert main(["merge", str(run), str(tmp_path / "out"), "--onto", "original"]) == 1
    assert f"Name the unquantised model, probably {shelf}/tiny, as --base_model" in capsys.readouterr().err
    report = merge(run, tmp_path / "out", base_model=str(base))
    assert share(as_trained(base, run, "double"), reloaded(tmp_path / "out")) <= 1e-4
    assert (tmp_path / "out" / "config.json").read_bytes() == (base / "config.json").read_bytes()
    assert weights(tmp_path / "out").keys() == weights(base).keys()
    assert (report.onto, report.base_model) == ("dequantised", str(base))
    assert report.quantisation_drift < 1e-4
    assert "unquantised tensors differ by at most 0" in report.lineage
    asked = question("hello", [], family=FAMILY)
    said = [open_model(folder, device="cpu").answer([asked], max_new_tokens=6) for folder in (run, tmp_path / "out")]
    assert said[0] == said[1]


def test_another_named_base_is_refused(shelf, stored, tmp_path):
    run = run_on(stored, run_of(shelf, tmp_path / "run", "double"))
    for change, message in (
        (lambda w: w.update({"model.norm.weight": w["model.norm.weight"] * 1.1}), "model.norm.weight, which is not"),
        (lambda w: w.update({DOWN: -w[DOWN]}), f"quantised again, .*% of {DOWN}"),
        (
            lambda w: w.update({"model.extra.weight": w[DOWN] + 0}),
            "have another shape, e.g. model.extra.weight missing",
        ),
    ):
        named = Path(shutil.copytree(base_of(shelf), tmp_path / "named", dirs_exist_ok=True))
        tensors = weights(base_of(shelf))
        change(tensors)
        files = QuantisedFiles.of(stored, FAMILY)
        save_file(tensors, named / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            compare_bases(run, files, str(named), named, FAMILY)


def test_an_adapter_of_plain_peft_on_such_a_base(shelf, stored, tmp_path, capsys):
    """What unsloth's users have: no vlft.json, and adapter_config.json names the quantised files."""
    run = run_of(shelf, tmp_path / "run", "double")
    (run / "vlft.json").unlink()
    settings = json.loads((run / "adapter_config.json").read_text())
    (run / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(stored)}))
    argv = ["merge", str(run), str(tmp_path / "out"), "--base_model", str(base_of(shelf)), "--onto", "original"]
    assert main([*argv, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["onto"] == "original"
    assert report["max_logit_diff"] < 1e-4 < 0.1 < report["quantisation_drift"]


# ---- what answers


def test_a_run_answers_as_the_merged_model(shelf, tmp_path):
    run = run_of(shelf, tmp_path / "run", "nf4", strength=0.3)
    merge(run, tmp_path / "out")
    chats = [open_model(folder, device="cpu") for folder in (run, tmp_path / "out")]
    assert len(stock_linear4bit(chats[0].speaker.model)) == LAYERS
    assert "quantised to nf4 as in training" in chats[0].name
    asked = [question(text, [], family=FAMILY) for text in ("hello", "1 2 3 4")]
    mine, merged = ([chat.answer([one], max_new_tokens=6) for one in asked] for chat in chats)
    assert mine == merged


def stock_linear4bit(model) -> list[str]:
    from bitsandbytes.nn import Linear4bit

    return [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]


def test_without_bitsandbytes_the_package_is_named(shelf, tmp_path, monkeypatch, capsys):
    run = run_of(shelf, tmp_path / "run", "nf4")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == PACKAGE else real(name, *rest))
    for argv in (["chat", str(run), "hello"], ["merge", str(run), str(tmp_path / "out")]):
        assert main(argv) == 1
        said = capsys.readouterr().err
        assert "pip install 'bitsandbytes>=0.48'" in said
        assert ("vlft merge" in said) == (argv[0] == "chat")
        assert "Traceback" not in said


# ---- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "nf3"}, "vlft knows nf4, fp4, int8"),
        ({"kind": "int8", "double": True}, "vlft knows nf4, fp4, int8"),
        ({"modules": {"language": 13}}, "says that 13 linear layers of the language model were quantised"),
    ],
)
def test_a_record_that_does_not_fit(shelf, tmp_path, change, message):
    run = run_of(shelf, tmp_path / "run", "nf4")
    record = read_record(run)
    write_record(run, replace(record, quantised={**record.quantised, **change}))
    with pytest.raises(CheckpointError, match=message):
        merge(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_onto_needs_a_quantised_run(shelf, tmp_path, capsys):
    run = run_of(shelf, tmp_path / "run", "nf4")
    write_record(run, replace(read_record(run), quantised=None))
    assert main(["merge", str(run), str(tmp_path / "out"), "--onto", "original"]) == 1
    assert "--onto original has no effect" in capsys.readouterr().err
    (run / "vlft.json").unlink()
    assert main(["merge", str(run), str(tmp_path / "out"), "--onto", "dequantised"]) == 1
    assert "as far as is known without vlft.json" in capsys.readouterr().err


def test_another_base_is_refused(shelf, tmp_path):
    run = run_of(shelf, tmp_path / "run", "nf4")
    other = build_tiny(tmp_path / "other", seed=1)
    with pytest.raises(CheckpointError, match="fingerprint"):
        merge(run, tmp_path / "out", base_model=str(other))


def test_a_merge_that_fails_leaves_nothing(shelf, tmp_path, monkeypatch):
    run = run_of(shelf, tmp_path / "run", "nf4")
    real = vlft.model.packed.dequantised
    monkeypatch.setattr(vlft.model.packed, "dequantised", lambda weight, how, dtype: real(weight, how, dtype) * 1.01)
    with pytest.raises(CheckpointError, match="nf4 layers and of their dequantised weights differ"):
        merge(run, tmp_path / "out")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(vlft.model.packed, "dequantised", killed)
    with pytest.raises(KeyboardInterrupt):
        merge(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


# ---- a run that starts from one


def start_on(base: Path, adapter: Path, **flags):
    model = ModelFlags(model_id=str(base), adapter=str(adapter), **flags)
    start = start_of(model)
    return open_base(DataFlags(data_path=["unused.json"]), model, given=frozenset(flags), start=start)


def test_an_adapter_decides_how_its_base_is_quantised(shelf, tmp_path):
    base, run = base_of(shelf), run_of(shelf, tmp_path / "run", "double")
    assert start_on(base, run).quantisation == Quantisation(kind="nf4", double=True)
    assert start_on(base, run, bits="4", quant_type="nf4").quantisation == Quantisation(kind="nf4", double=True)
    for flags, both in (({"bits": "16"}, "--bits is 16, but .* has 4"),
                        ({"quant_type": "fp4"}, "--quant_type is fp4, but .* has nf4"),
                        ({"double_quant": False}, "--double_quant is false, but .* has true")):  # fmt: skip
        with pytest.raises(ConfigError, match=both):
            start_on(base, run, **flags)


def test_an_adapter_of_an_unquantised_base_may_start_a_quantised_run(shelf, tmp_path):
    base, run = base_of(shelf), run_of(shelf, tmp_path / "run", "nf4")
    write_record(run, replace(read_record(run), quantised=None))
    opened = start_on(base, run, bits="4", double_quant=False)
    assert opened.quantisation == Quantisation(kind="nf4")
    shown = opened.start.described(["bits"], quantisation=opened.quantisation)
    assert "trained on a base that was not quantised, and this run quantises it to nf4" in shown
