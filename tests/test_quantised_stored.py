"""Bases whose files are quantised: every form in which transformers stores them trains and merges, or is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from runs import arguments, assert_same, killed_after_a_checkpoint
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration

from vlft import load_model, open_base
from vlft.chat import open_model
from vlft.checkpoint import read_record
from vlft.cli.main import main
from vlft.demo.tiny import build_tiny
from vlft.errors import CheckpointError, ConfigError
from vlft.merge import merge
from vlft.model.load import load_processor
from vlft.model.quantise import PACKAGE

pytest.importorskip("bitsandbytes")

FORMS = {
    "plain": {},
    "double": {"bnb_4bit_use_double_quant": True},
    "bfloat16": {"bnb_4bit_quant_storage": torch.bfloat16},  # FSDP wants one dtype for all weights
    "float32": {"bnb_4bit_quant_storage": torch.float32, "bnb_4bit_use_double_quant": True},
    "vit": {"llm_int8_skip_modules": ["lm_head"]},
    "head": {"llm_int8_skip_modules": ["nothing"]},
}


@pytest.fixture(scope="module")
def untied(tmp_path_factory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("untied") / "tiny", tied=False)


@pytest.fixture(scope="module")
def stored_as(untied):
    """A function: name of a form -> the base as transformers stores it, with its processor."""

    def form(name: str) -> Path:
        folder = untied.with_name(f"tiny-{name}-bnb-4bit")
        if not folder.exists():
            skip = {"llm_int8_skip_modules": ["model.visual", "lm_head"]}
            how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **(skip | FORMS[name]))
            model = Qwen2VLForConditionalGeneration.from_pretrained(untied, dtype="auto", quantization_config=how)
            model.save_pretrained(folder)
            for file in untied.iterdir():
                if not (folder / file.name).exists():
                    shutil.copy(file, folder)
        return folder

    return form


@pytest.fixture(scope="module")
def run(stored_as, mixed_json, media, tmp_path_factory) -> Path:
    """A run on the plain form."""
    out = tmp_path_factory.mktemp("stored") / "run"
    assert main(arguments(stored_as("plain"), mixed_json, media, out, "--max_steps", "2", *RATE)) == 0
    return out


RATE = ("--learning_rate", "1e-2")


def logits(model, base: Path) -> torch.Tensor:
    rows = load_processor(base)(text=["<|im_start|>user\nWhat is it?<|im_end|>\n"], return_tensors="pt")
    with torch.no_grad():
        return model(**rows).logits.float()


def assert_answers_alike(run: Path, merged: Path, base: Path, **opened: str) -> None:
    stock = Qwen2VLForConditionalGeneration.from_pretrained(merged, dtype=torch.float32)
    live, wanted = (logits(model, base) for model in (open_model(run, device="cpu", **opened).speaker.model, stock))
    assert (live - wanted).abs().max() <= 1e-5 * (wanted.max() - wanted.min())


@pytest.mark.parametrize("form", ["bfloat16", "float32"])
def test_packed_values_may_be_stored_as_floating_point_numbers(stored_as, untied, train, tmp_path, form):
    base = stored_as(form)
    assert any(
        t.dtype is getattr(torch, form) and t.shape[-1] == 1 for t in load_file(base / "model.safetensors").values()
    )
    out = train("--max_steps", "2", *RATE, base=base)
    report = merge(out, tmp_path / "merged", base_model=str(untied))
    assert report.quantisation_drift <= 1e-5 * max(row.range for row in report.rows)
    assert_answers_alike(out, tmp_path / "merged", untied)


def test_config_yaml_repeats_a_run(run, tmp_path):
    assert main(["train", "--config", str(run / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    assert_same(run, tmp_path / "again", tolerance=0)


# ---- bases that have moved


def test_a_quantised_base_that_has_moved_is_dequantised(run, stored_as, untied, tmp_path, capsys):
    """The unquantised model cannot be compared with files that are gone, and they hold all values themselves."""
    run = Path(shutil.copytree(run, tmp_path / "run"))
    moved = Path(shutil.copytree(stored_as("plain"), tmp_path / "moved"))
    text = (run / "vlft.json").read_text().replace(str(stored_as("plain")), str(tmp_path / "gone"))
    (run / "vlft.json").write_text(text)
    assert main(["merge", str(run), str(tmp_path / "out"), "--base_model", str(untied)]) == 1
    said = capsys.readouterr().err
    assert "fingerprint" in said
    assert "Pass the folder where they are now as --base_model; they are then dequantised" in said
    report = merge(run, tmp_path / "out", base_model=str(moved))
    assert report.lineage.endswith("its quantised tensors are dequantised")
    assert report.quantisation_drift <= 1e-5 * max(row.range for row in report.rows)
    assert_answers_alike(run, tmp_path / "out", untied, base_model=str(moved))
    found, wanted = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", untied))
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in wanted.items()}
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "out", "run"]
    into = merge(run.with_name("run"), tmp_path / "again", base_model=str(moved), dtype="bf16")
    assert into.dtype == "bfloat16"


def test_lora_on_a_whole_model_with_quantised_files_can_be_merged(
    stored_as, untied, mixed_json, media, train, tmp_path
):
    """Also if the whole model's run was killed, and resumed from packed values that are stored as float32."""
    towers = ("--vision", "frozen", "--merger", "full", "--language", "frozen")
    more = (*towers, "--max_steps", "2", *RATE, "--save_strategy", "steps", "--save_steps", "1")
    argv = arguments(stored_as("float32"), mixed_json, media, tmp_path / "whole", *more)
    with killed_after_a_checkpoint():
        main(argv)
    assert main(argv) == 0
    assert read_record(tmp_path / "whole").kind == "full"
    out = train("--max_steps", "2", *RATE, base=tmp_path / "whole", name="lora")
    report = merge(out, tmp_path / "merged")
    assert report.quantisation_drift <= 1e-5 * max(row.range for row in report.rows)
    assert_answers_alike(out, tmp_path / "merged", untied)


# ---- what is refused


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize(
    ("form", "flags", "says"),
    [
        ("head", "", "lm_head.weight is quantised"),
        ("vit", "--vision full", "--vision full: 8 weights of the vision tower"),
        ("vit", "--merger full", "--merger full: 2 weights of the merger tower"),
        ("plain", "--language full", "--language full: 14 weights of the language tower"),
        ("plain", "--deepspeed zero3", "with --deepspeed zero3: ZeRO-3 splits weights"),
        ("plain", "--bits 4 --double_quant true", "--double_quant true: the files of"),
        ("plain", "--bits 8", "--bits 8: the files of"),
    ],
)
def test_what_packed_weights_cannot_do_is_refused(stored_as, mixed_json, tmp_path, capsys, verb, form, flags, says):
    argv = (
        verb,
        "--model_id",
        str(stored_as(form)),
        "--data_path",
        str(mixed_json),
        "--output_dir",
        str(tmp_path / "r"),
    )
    assert main([*argv, *flags.split()]) == 1
    assert says in capsys.readouterr().err


def test_a_benchmark_compares_with_16_bits(stored_as, capsys):
    assert main(["bench", "train", "--model_id", str(stored_as("plain")), "--use_cpu", "true"]) == 1
    assert "its files are quantised, and vlft bench compares with a trainer of 16 bits" in capsys.readouterr().err


def test_bits_alone_leave_the_rest_to_the_files(stored_as, mixed_json, media, tmp_path, capsys):
    argv = arguments(stored_as("plain"), mixed_json, media, tmp_path / "run", "--bits", "4", "--quant_type", "nf4")
    assert main(["plan", *argv[1:]]) == 0


def test_a_quantised_head_is_refused_by_chat_merge_and_python(stored_as, run, untied, tmp_path):
    head = str(stored_as("head"))
    for call in (
        lambda: open_model(head),
        lambda: merge(run, tmp_path / "out", base_model=head),
        lambda: open_base(head),
    ):
        with pytest.raises(CheckpointError, match=r"lm_head\.weight is quantised"):
            call()


def test_a_quantisation_that_config_json_names_for_the_language_model_alone(stored_as, train, tmp_path):
    base = Path(shutil.copytree(stored_as("plain"), tmp_path / "nested"))
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["quantization_config"] = config.pop("quantization_config")
    (base / "config.json").write_text(json.dumps(config))
    out = train("--max_steps", "1", base=base)
    assert "quantised to nf4" in open_model(out, device="cpu").name
    assert merge(out, tmp_path / "merged").quantisation_drift < 1e-4


# ---- without a working bitsandbytes


@pytest.fixture(params=["missing", "broken"])
def without_bitsandbytes(request, monkeypatch, tmp_path) -> str:
    """Returns what messages say."""
    if request.param == "missing":
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == PACKAGE else real(name, *a))
        return "which is not installed: pip install 'bitsandbytes>=0.48'"
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "site" / PACKAGE).mkdir(parents=True)
    (tmp_path / "site" / PACKAGE / "__init__.py").write_text("raise RuntimeError('no libcudart')")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return "which is installed but cannot be imported (no libcudart)"


def test_it_is_missed_before_rows_are_read(stored_as, run, untied, mixed_json, tmp_path, capsys, without_bitsandbytes):
    out = ("--data_path", str(mixed_json), "--output_dir", str(tmp_path / "run"))
    bits = [] if "not installed" in without_bitsandbytes else [["--model_id", str(untied), "--bits", "4"]]
    for more in (
        ["--model_id", str(stored_as("plain"))],
        ["--model_id", str(stored_as("plain")), "--adapter", str(run)],
        *bits,
    ):
        assert main(["train", *more, *out]) == 1
        said = capsys.readouterr()
        assert without_bitsandbytes in said.err
        assert "tokens:" not in said.out
    assert main(["chat", str(stored_as("plain")), "hello"]) == 1
    said = capsys.readouterr().err
    assert without_bitsandbytes in said
    assert "vlft merge" not in said
    with pytest.raises((ConfigError, CheckpointError), match=without_bitsandbytes[:30]):
        load_model(open_base(str(stored_as("plain"))))
