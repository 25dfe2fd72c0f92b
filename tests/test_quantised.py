"""Quantised bases: what is quantised, what it computes, runs and their merges, and what a plan counts."""

from __future__ import annotations

import json

import bitsandbytes
import pytest
import torch
from build import FAMILY
from models import flat_inputs
from peft import PeftModel
from runs import arguments, assert_same, killed_after_a_checkpoint, losses
from transformers import BitsAndBytesConfig, Qwen2VLForConditionalGeneration

from vlft.chat import open_model
from vlft.cli.main import main
from vlft.demo.tiny import build_tiny
from vlft.errors import ConfigError
from vlft.families import FAMILIES
from vlft.merge import merge
from vlft.model import forward, packed
from vlft.model.apply import apply_towers
from vlft.model.load import load_base, load_processor
from vlft.model.quantise import Quantisation, packed_of, quantised_names
from vlft.model.scale import PixelScale
from vlft.model.towers import Towers

NF4, NF4_DOUBLE = Quantisation(kind="nf4"), Quantisation(kind="nf4", double=True)
KINDS = [NF4, NF4_DOUBLE, Quantisation(kind="fp4"), Quantisation(kind="int8")]
SAVE = ("--save_strategy", "steps", "--save_steps", "1")


def by_label(quantisation: Quantisation) -> str:
    return quantisation.label.split(",")[0] + ("-double" if quantisation.double else "")


# ---- layers


@pytest.mark.parametrize("how", KINDS, ids=by_label)
@pytest.mark.parametrize("shape", [(96, 48), (64, 128), (64, 96), (64, 32), (6, 36)])
def test_a_layer_multiplies_by_what_bitsandbytes_stores(how, shape):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0]))
    weight, x = net[0].weight.detach().clone(), torch.randn(5, shape[1], requires_grad=True)
    bias = net[0].bias
    net[0] = packed._quantised(net[0], how, "cpu")
    kept = packed.dequantised(weight, how, torch.float32)
    assert torch.equal(kept, packed.dense(net[0].weight, torch.float32))
    if how.bits == 4:
        torch.testing.assert_close(kept, _by_hand(weight, how), rtol=1e-6, atol=1e-7)
    assert 0 < (kept - weight).abs().max() < 0.3 * weight.abs().max()
    with torch.no_grad():
        net.eval()(x)  # an evaluation before training
    y = net.train()(x)
    torch.testing.assert_close(y, torch.nn.functional.linear(x, kept, bias))
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, (2 * y.detach()) @ kept)
    assert packed.stored_bytes(net[0].weight) == how.nbytes(shape)


def _by_hand(weight: torch.Tensor, how: Quantisation) -> torch.Tensor:
    """bitsandbytes' own packed values times the scales of their blocks, wherever the rows begin."""
    functional = bitsandbytes.functional
    stored, state = functional.quantize_4bit(weight, quant_type=how.kind, compress_statistics=how.double)
    scales = state.absmax
    if how.double:
        scales = functional.dequantize_blockwise(scales, state.state2) + state.offset
    codes = torch.stack((stored.view(-1) >> 4, stored.view(-1) & 15), 1).view(-1)[: weight.numel()]
    return (state.code[codes.int()] * scales.repeat_interleave(64)[: weight.numel()]).view(weight.shape)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_language_models_blocks_are_quantised_and_nothing_else(base_of, model_type):
    family = FAMILIES[model_type]
    model = load_base(base_of(family), family)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    sizes = family.sizes(model.config)
    counts = packed.quantise(model, family, NF4_DOUBLE)
    assert counts == {"language": sum(len(sizes.text.linears(layer)) for layer in sizes.text.layers)}
    found = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert {family.tower_of(name) for name in found} == {"language"}
    assert len(found) == counts["language"]
    kept = {name: p for name, p in model.named_parameters() if name.removesuffix(".weight") not in found}
    assert all(torch.equal(p, before[name]) for name, p in kept.items())
    weights = {name: model.get_submodule(name).weight for name in found}
    assert {name: packed.shape_of(weight) for name, weight in weights.items()} == {
        name: tuple(before[f"{name}.weight"].shape) for name in found
    }
    taken = packed_of(family, sizes, NF4_DOUBLE)
    assert taken.weights == sum(before[f"{name}.weight"].numel() for name in found)
    assert taken.largest == max(before[f"{name}.weight"].numel() for name in found)
    assert taken.nbytes == sum(map(packed.stored_bytes, weights.values()))


@pytest.mark.parametrize("how", [NF4_DOUBLE, Quantisation(kind="int8")], ids=by_label)
def test_a_step_is_that_of_the_dense_model_with_these_weights(base, encoded, how):
    found = []
    for dense in (False, True):
        model = load_base(base, FAMILY)
        if dense:
            for name, parameter in model.named_parameters():
                if quantised_names(FAMILY, [name.removesuffix(".weight")]):
                    parameter.data = packed.dequantised(parameter.data, how)
        else:
            packed.quantise(model, FAMILY, how)
        forward.bind(model, PixelScale.of(load_processor(base)))
        torch.manual_seed(1)
        towers = Towers(vision="lora", merger="full", lora_dropout=0.0, lora_rank=4)
        model = apply_towers(model, FAMILY, towers, masters=True, adapters="peft" if dense else "fused").train()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.05, generator=generator)
        loss = model(**flat_inputs(list(encoded.values())[:3])).loss
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()})
    ours, theirs = found
    assert ours.keys() == theirs.keys()
    for name, wanted in theirs.items():
        assert (ours[name] - wanted).abs().max() <= 1e-5 * wanted.abs().max(), name


# ---- runs


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, mixed_json, media):
    """A run of three steps in 4 bits with evaluations between them, killed after the first and resumed."""
    folder = tmp_path_factory.mktemp("quantised")
    evaluated = ("--eval_path", str(mixed_json), "--eval_strategy", "steps", "--eval_steps", "1", "--report_rows", "1")
    more = ("--bits", "4", "--max_steps", "3", "--learning_rate", "1e-2", *SAVE, *evaluated)
    whole, killed = (arguments(base, mixed_json, media, folder / name, *more) for name in ("whole", "killed"))
    assert main(whole) == 0
    with killed_after_a_checkpoint():
        main(killed)
    assert main(killed) == 0
    return folder / "killed"


def test_a_killed_run_resumes_bit_for_bit(run, base):
    assert_same(run, run.with_name("whole"), tolerance=0)
    assert losses(run)[-1] < losses(run)[0]
    recorded = json.loads((run / "vlft.json").read_text())["quantised"]
    assert recorded == {"bits": 4, "kind": "nf4", "double": True, "dtype": "float32", "modules": {"language": 14}}


def logits(model, base) -> torch.Tensor:
    rows = load_processor(base)(text=["<|im_start|>user\nWhat is it?<|im_end|>\n"], return_tensors="pt")
    with torch.no_grad():
        return model(**rows).logits.float()


def test_the_merged_model_is_what_was_trained(run, base, tmp_path, capsys):
    assert main(["merge", str(run), str(tmp_path / "exact"), "--json"]) == 0
    exact = json.loads(capsys.readouterr().out)
    assert exact["onto"] == "dequantised"
    assert exact["quantisation_drift"] == exact["max_logit_diff"] <= 1e-4
    assert exact["changed"] == 14
    assert main(["merge", str(run), str(tmp_path / "other"), "--onto", "original", "--json"]) == 0
    other = json.loads(capsys.readouterr().out)
    assert other["onto"] == "original"
    assert other["max_logit_diff"] <= 1e-4
    assert other["quantisation_drift"] > 0.01
    live = open_model(run).speaker.model
    assert sum(isinstance(module, bitsandbytes.nn.Linear4bit) for module in live.modules()) == 14
    wanted = logits(live, base)
    merged = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "exact", dtype=torch.float32)
    assert (logits(merged, base) - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())
    assert json.loads((tmp_path / "exact" / "vlft.json").read_text())["quantised"] is None


def test_plain_peft_loads_it_on_a_base_that_transformers_quantised(run, base):
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32, llm_int8_skip_modules=["model.visual", "lm_head"],
    )  # fmt: skip
    stock = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32, quantization_config=settings)
    for module in stock.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False  # it would compute in bf16
    wanted = logits(open_model(run).speaker.model, base)
    found = logits(PeftModel.from_pretrained(stock, run), base)
    assert (found - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())


def test_a_base_whose_files_are_quantised_trains_and_merges_into_the_one_it_was_made_from(
    base, train, mixed_json, tmp_path, capsys
):
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["model.visual", "lm_head"]
    )
    stock = Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32, quantization_config=settings)
    stored = tmp_path / "tiny-bnb-4bit"
    stock.save_pretrained(stored)
    config = json.loads((stored / "config.json").read_text())
    # As published bases have it: names of older versions of transformers.
    config["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", "visual", "merger"]
    (stored / "config.json").write_text(json.dumps(config))
    load_processor(base).save_pretrained(stored)
    run = train("--max_steps", "2", "--learning_rate", "1e-2", base=stored)
    assert "quantised: 14 linear layers of the language model to nf4" in capsys.readouterr().out
    recorded = json.loads((run / "vlft.json").read_text())["quantised"]
    assert recorded == {"bits": 4, "kind": "nf4", "double": False, "dtype": "float32", "modules": {"language": 14}}
    report = merge(run, tmp_path / "merged", base_model=str(base))
    assert report.quantisation_drift <= 1e-4 * max(row.range for row in report.rows)
    wanted = logits(open_model(run).speaker.model, base)
    merged = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert (logits(merged, base) - wanted).abs().max() <= 1e-4 * (wanted.max() - wanted.min())
    capsys.readouterr()
    words = ("plan", "--model_id", str(stored), "--data_path", str(mixed_json))
    assert main([*words, "--bits", "8"]) == 1
    assert "--bits 8: the files of" in capsys.readouterr().err
    assert main([*words, "--language", "full"]) == 1
    assert "such weights cannot be trained" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bits", "flags"),
    [
        ("8", ()),
        ("8", ("--use_dora", "true", "--bf16", "true")),
        ("4", ("--use_dora", "true", "--bf16", "true")),
        ("4", ("--quant_type", "fp4", "--double_quant", "false", "--lora_target", "attention")),
        ("4", ("--bf16", "true", "--vision", "lora", "--gradient_checkpointing", "true")),
    ],
)
def test_other_formats_are_merged_as_exactly(base, train, tmp_path, bits, flags):
    out = train("--max_steps", "2", "--learning_rate", "1e-2", "--bits", bits, *flags)
    report = merge(out, tmp_path / "merged")
    merged = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    live, wanted = (logits(model, base) for model in (open_model(out, device="cpu").speaker.model, merged))
    assert (live - wanted).abs().max() <= 1e-5 * (wanted.max() - wanted.min())
    assert report.onto == "dequantised"
    assert report.quantisation_drift <= 1e-4 * max(row.range for row in report.rows)
    assert report.changed >= (8 if "attention" in flags else 14)


@pytest.mark.parametrize("how", [NF4, Quantisation(kind="int8")], ids=by_label)
def test_dora_in_bf16_starts_with_the_lengths_of_the_weights_that_are_multiplied(base, how):
    model = load_base(base, FAMILY)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    packed.quantise(model, FAMILY, how)
    towers = Towers(use_dora=True, lora_dropout=0.0)
    model = apply_towers(model, FAMILY, towers, masters=True, computing=torch.bfloat16)
    found = {name: p for name, p in model.named_parameters() if ".lora_magnitude_vector." in name}
    assert len(found) == 14
    for name, vector in found.items():
        weight = weights[name.removeprefix("base_model.model.").split(".lora_")[0] + ".weight"]
        rounded = packed.dequantised(weight, how, torch.bfloat16)
        torch.testing.assert_close(vector.data, rounded.double().norm(dim=1).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("model_type", ["qwen2_vl", pytest.param("qwen3_5", marks=pytest.mark.grid)])
def test_a_run_in_bf16_on_a_bf16_base_merges_into_its_dtype(train, tmp_path, model_type):
    """Layers multiply by weights in bf16, so rounding the merged weights costs as much as in a run of 16 bits."""
    base = build_tiny(tmp_path / "base", FAMILIES[model_type], dtype="bfloat16")
    reports = {}
    for bits in ("16", "4"):
        run = train(
            "--max_steps", "3", "--learning_rate", "3e-2", "--bits", bits, "--bf16", "true", base=base, name=bits
        )
        reports[bits] = merge(run, tmp_path / f"merged-{bits}", dtype="bf16")
    four = reports["4"]
    assert json.loads((tmp_path / "4" / "vlft.json").read_text())["quantised"]["dtype"] == "bfloat16"
    assert four.dtype == "bfloat16"
    noise = {bits: max(row.difference / row.moved for row in report.rows) for bits, report in reports.items()}
    assert noise["4"] <= 2 * noise["16"]
    assert all(row.layers <= 1e-4 * row.range for row in four.rows)


def test_an_adapter_decides_the_bits(run, base, mixed_json, media, tmp_path, capsys):
    argv = arguments(base, mixed_json, media, tmp_path / "next", "--adapter", str(run), "--max_steps", "1")
    assert main([*argv, "--bits", "8"]) == 1
    assert "--bits is 8, but the adapter" in capsys.readouterr().err
    assert main([*argv, "--learning_rate", "0"]) == 0
    assert json.loads((tmp_path / "next" / "vlft.json").read_text())["quantised"]["kind"] == "nf4"
    assert "quantised: 14 linear layers of the language model to nf4" in capsys.readouterr().out


def test_other_bits_are_another_run(run, base, mixed_json, media, capsys):
    more = ("--max_steps", "3", "--learning_rate", "1e-2", "--report_rows", "1", "--eval_path", str(mixed_json))
    argv = arguments(base, mixed_json, media, run, *more, *SAVE, "--eval_strategy", "steps", "--eval_steps", "1")
    assert main(argv) == 1
    assert "its quantised base (--bits) is" in capsys.readouterr().err


# ---- what a plan counts, and what is refused


def test_a_plan_counts_the_packed_weights(base, mixed_json, media, tmp_path, capsys):
    totals = {}
    for bits in ("16", "4"):
        argv = arguments(base, mixed_json, media, tmp_path / "run", "--bits", bits, "--gpu", "4090", "--bf16", "true")
        assert main(["plan", *argv[1:], "--json"]) == 0
        totals[bits] = json.loads(capsys.readouterr().out)["memory"]["weights"]
    sizes = FAMILY.sizes(load_base(base, FAMILY).config)
    taken = packed_of(FAMILY, sizes, NF4_DOUBLE)
    assert totals["16"] - totals["4"] == 4 * taken.weights - taken.nbytes


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--bits 4 --language full", "--bits 4 with --language full: quantised weights cannot be trained"),
        ("--bits 8 --language frozen --merger full", "--bits 8 with --language frozen"),
        ("--bits 4 --deepspeed zero3", "--bits 4 with --deepspeed zero3"),
        ("--bits 8 --quant_type fp4", "--quant_type fp4 has no effect with --bits 8"),
        ("--double_quant false", "--double_quant false has no effect with --bits 16"),
    ],
)
@pytest.mark.parametrize("verb", ["train", "plan"])
def test_what_cannot_be_combined_is_refused(base, mixed_json, tmp_path, capsys, verb, flags, says):
    out = ("--model_id", str(base), "--data_path", str(mixed_json), "--output_dir", str(tmp_path / "run"))
    assert main([verb, *out, *flags.split()]) == 1
    assert says in capsys.readouterr().err


def test_without_bitsandbytes_it_is_refused_at_the_door(base, mixed_json, tmp_path, capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    out = ("--model_id", str(base), "--data_path", str(mixed_json), "--output_dir", str(tmp_path / "run"))
    assert main(["plan", *out, "--bits", "4"]) == 1
    assert "pip install 'bitsandbytes>=0.48'" in capsys.readouterr().err


def test_onto_has_no_effect_on_a_run_of_16_bits(train, tmp_path):
    out = train("--max_steps", "1")
    with pytest.raises(ConfigError, match=r"--onto original has no effect"):
        merge(out, tmp_path / "merged", onto="original")
