"""DoRA, rsLoRA and LoRA+: trained runs against plain peft, their groups, plans and refusals."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runs import VISION_LORA, arguments, weights

from vlft.checkpoint import load_adapter_strict
from vlft.cli.main import main
from vlft.families import FAMILIES, QWEN2_VL
from vlft.merge import merge
from vlft.model import dora, lora, tracing
from vlft.model.apply import apply_towers
from vlft.model.load import load_base
from vlft.model.towers import Towers

QWEN3_5 = FAMILIES["qwen3_5"]
BOTH = [pytest.param(family, id=family.model_type) for family in (QWEN2_VL, QWEN3_5)]
ALL = ("--use_dora", "true", "--use_rslora", "true", "--loraplus_ratio", "4")
SAVE = ("--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2")
BF16 = torch.bfloat16


def everywhere(**more) -> Towers:
    return Towers(vision="lora", merger="lora", lora_rank=4, lora_alpha=6, lora_dropout=0.0, use_dora=True, **more)


def filled(model: torch.nn.Module) -> torch.nn.Module:
    """Adapters that change the model: B and DoRA's vectors are moved."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2, generator=generator)
            if "magnitude" in name:
                weight.mul_(1 + 0.3 * torch.rand(weight.shape, generator=generator).to(weight))
    return model


# ---- one layer


class One(torch.nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(48, 40, bias=bias)

    def forward(self, x):
        return self.proj(x)


def layers(*, bias: bool = True, dropout: float = 0.0):
    """A layer with DoRA, by peft alone and with our function."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=["proj"], use_dora=True, lora_dropout=dropout)
    theirs = filled(get_peft_model(One(bias), config)).train()
    ours = copy.deepcopy(theirs)
    lora.bind(ours)
    return theirs, ours


def one_pass(model, x, upstream, autocast=None):
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    with tracing.autocast("cpu", autocast):
        y = model(leaf)
    y.backward(upstream.to(y.dtype))
    return {"y": y.detach(), "x": leaf.grad, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_gradients_are_those_of_peft(bias, monkeypatch):
    theirs, ours = layers(bias=bias)
    x, upstream = torch.randn(2, 15, 48), torch.randn(2, 15, 40)
    wanted = one_pass(theirs, x, upstream)
    used = []
    real = dora.scaled_linear
    monkeypatch.setattr(dora, "scaled_linear", lambda *a, **k: used.append(1) or real(*a, **k))
    found = one_pass(ours, x, upstream)
    assert used
    assert found.keys() == wanted.keys()
    assert len(found) == 5
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_dropout_computes_as_peft_does(monkeypatch):
    monkeypatch.setattr(dora, "scaled_linear", lambda *a, **k: pytest.fail("the function was used"))
    theirs, ours = layers(dropout=0.5)
    x, upstream = torch.randn(30, 48), torch.randn(30, 40)
    torch.manual_seed(3)
    wanted = one_pass(theirs, x, upstream)
    torch.manual_seed(3)
    assert all(torch.equal(value, wanted[name]) for name, value in one_pass(ours, x, upstream).items())


def test_in_bf16_no_row_of_the_weight_is_too_long():
    """peft rounds the lengths to bf16, which scales all results of a row. Other errors differ from input to input."""
    theirs, ours = layers(bias=False)
    for model in (theirs, ours):
        model.get_base_model().proj.base_layer.to(BF16)
    x, upstream = torch.randn(4000, 48), torch.randn(4000, 40)
    wanted = one_pass(copy.deepcopy(theirs).double(), x.double(), upstream.double())
    off = []
    for model in (ours, theirs):
        found = one_pass(model, x, upstream, autocast=BF16)
        assert found["y"].dtype is BF16
        assert {v.dtype for name, v in found.items() if "lora" in name} == {torch.float32}
        scale_O = (found["y"].double() * wanted["y"]).sum(0) / wanted["y"].square().sum(0)
        off.append(float((scale_O - 1).abs().max()))
        for name, value in found.items():
            error = (value.double() - wanted[name]).square().mean().sqrt() / wanted[name].square().mean().sqrt()
            assert error < 0.01, name
    assert off[0] < 3e-4 < 1e-3 < off[1], off


@pytest.mark.parametrize("stored", [torch.float32, BF16], ids=str)
def test_a_new_adapter_starts_as_its_base(stored):
    torch.manual_seed(0)
    base = torch.nn.Linear(48, 40, bias=False).to(stored)
    model = One(False)
    model.proj = base
    lengths = base.weight.float().norm(dim=1)
    x = torch.randn(30, 48).to(stored)
    wanted = base(x)
    adapted = get_peft_model(model, LoraConfig(target_modules=["proj"], use_dora=True))
    dora.start(adapted)
    lora.bind(adapted)
    vector = adapted.get_base_model().proj.lora_magnitude_vector["default"].weight
    assert vector.dtype is torch.float32
    torch.testing.assert_close(vector.data, lengths, rtol=3e-7, atol=0)
    with tracing.autocast("cpu", None if stored is torch.float32 else stored):
        assert torch.equal(adapted(x), wanted)


# ---- a run, from flags to merged weights


@pytest.fixture(scope="module")
def run_of(base_of, mixed_json, media, tmp_path_factory):
    """A function: family -> a run of two steps with all variants on all towers. Each is trained once."""
    made: dict[str, Path] = {}

    def of(family) -> Path:
        if family.model_type not in made:
            out = tmp_path_factory.mktemp("runs") / family.model_type
            argv = arguments(base_of(family), mixed_json, media, out, *VISION_LORA, *ALL, *SAVE)
            assert main([*argv, "--learning_rate", "2e-2"]) == 0
            made[family.model_type] = out
        return made[family.model_type]

    return of


def stock(base: Path, family) -> torch.nn.Module:
    import transformers

    return getattr(transformers, family.model_class).from_pretrained(base, dtype=torch.float32)


def logits(model, stock_of, family) -> torch.Tensor:
    """Logits of a row with a picture, by a stock forward pass."""
    from PIL import Image

    processor = stock_of(family.model_type).processor
    pads = f"{family.vision_start}{family.image_pad}{family.vision_end}"
    picture = Image.effect_mandelbrot((112, 84), (-2, -1.5, 1, 1.5), 90).convert("RGB")
    row = processor(text=[f"{pads}what is it?"], images=[picture], return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**row, use_cache=False).logits[0]


@pytest.mark.parametrize("family", BOTH)
def test_a_run_loads_in_peft_and_merges_as_peft_merges(family, run_of, base_of, stock_of, tmp_path):
    run, base = run_of(family), base_of(family)
    record = json.loads((run / "vlft.json").read_text())
    assert record["lora"] == {"rank": 4, "alpha": 64, "dropout": 0.0, "target": "all", "dora": True, "rslora": True}
    assert record["training"]["loraplus_ratio"] == 4
    found = weights(run)
    modules = sum(".lora_A." in name for name in found)
    assert sum(name.endswith(".lora_magnitude_vector") for name in found) == modules
    assert {family.tower_of(name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight")
            for name in found if "magnitude" in name} == {"vision", "merger", "language"}  # fmt: skip

    alone = stock(base, family)
    before = logits(alone, stock_of, family)
    theirs = PeftModel.from_pretrained(alone, run)
    adapted = logits(theirs, stock_of, family)
    span = float(adapted.max() - adapted.min())
    with theirs.disable_adapter():
        assert torch.equal(logits(theirs, stock_of, family), before)
    assert float((adapted - before).abs().max()) > 0.01 * span  # it was trained

    towers = everywhere(use_rslora=True)
    towers = Towers(**{**towers.__dict__, "lora_alpha": 64})
    ours = apply_towers(load_base(base, family, dtype=torch.float32), family, towers, masters=True)
    fresh = logits(ours, stock_of, family)
    assert float((fresh - before).abs().max()) <= 1e-6 * span
    load_adapter_strict(ours, run)
    assert float((logits(ours, stock_of, family) - adapted).abs().max()) <= 1e-5 * span

    report = merge(run, tmp_path / "merged")
    assert report.max_logit_diff < 2e-5 * span
    wanted = theirs.merge_and_unload()
    merged = logits(stock(tmp_path / "merged", family), stock_of, family)
    assert float((merged - logits(wanted, stock_of, family)).abs().max()) <= 1e-5 * span


def test_a_run_is_resumed_bit_by_bit(run_of, base, mixed_json, media, tmp_path, capsys):
    """Both steps at once, or the second one from a checkpoint; another ratio is another run."""
    run, out = run_of(QWEN2_VL), tmp_path / "run"
    out.mkdir()
    shutil.copytree(run / "checkpoint-1", out / "checkpoint-1")
    record = json.loads((out / "checkpoint-1" / "vlft.json").read_text())
    (out / "vlft.json").write_text(json.dumps(record))
    argv = [*arguments(base, mixed_json, media, out, *VISION_LORA, *ALL, *SAVE), "--learning_rate", "2e-2"]
    assert main([*argv, "--loraplus_ratio", "16"]) == 1
    assert "its loraplus_ratio is 4.0, this run's is 16.0" in capsys.readouterr().err
    assert main([*argv, "--use_rslora", "false"]) == 1
    assert "its LoRA is rslora true, this run's is none" in capsys.readouterr().err
    assert main(argv) == 0
    found, wanted = weights(out), weights(run)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
