"""DoRA, rsLoRA and LoRA+: trained runs against plain peft, their groups, plans and refusals."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from plans import plan, plan_and_text
from runs import FULL, VISION_LORA, arguments, lines, losses, weights
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from vlft.checkpoint import load_adapter_strict
from vlft.cli.main import main
from vlft.families import FAMILIES, QWEN2_VL
from vlft.merge import merge
from vlft.model import dora, flops, lora, tracing
from vlft.model.apply import apply_towers
from vlft.model.groups import groups_of_shapes, parameter_groups
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


def test_in_bf16_lengths_of_rows_are_those_of_float64():
    """peft rounds them to bf16, which changes all results of a row alike. Other errors differ from input to input."""
    theirs, ours = layers(bias=False)
    for model in (theirs, ours):
        model.get_base_model().proj.base_layer.to(BF16)
    layer = ours.get_base_model().proj
    weight, a, b = (one["default"].weight.data if isinstance(one, torch.nn.ModuleDict) else one.weight.data
                    for one in (layer.base_layer, layer.lora_A, layer.lora_B))  # fmt: skip
    with torch.autocast("cpu", BF16):
        found = dora.adapted_lengths(weight, a.to(BF16), b.to(BF16), scaling=1.5)
        peft = layer.lora_magnitude_vector["default"].get_weight_norm(weight, (b @ a).to(BF16), 1.5)
    exact = (weight.double() + 1.5 * b.to(BF16).double() @ a.to(BF16).double()).norm(dim=1)
    assert float((found / exact - 1).abs().max()) < 4e-4 < 2e-3 < float((peft / exact - 1).abs().max())

    x, upstream = torch.randn(500, 48), torch.randn(500, 40)
    wanted = one_pass(copy.deepcopy(theirs).double(), x.double(), upstream.double())
    results = one_pass(ours, x, upstream, autocast=BF16)
    assert results["y"].dtype is BF16
    assert {v.dtype for name, v in results.items() if "lora" in name} == {torch.float32}
    for name, value in results.items():
        error = (value.double() - wanted[name]).square().mean().sqrt() / wanted[name].square().mean().sqrt()
        assert error < 0.01, name


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


# ---- groups and plans


@pytest.mark.parametrize("family", [pytest.param(family, id=name) for name, family in FAMILIES.items()])
def test_groups_of_shapes_are_those_of_the_model(family, base_of, stock_of):
    rates = {"vision": 1e-5, "merger": 2e-5, "language": 1e-4}
    how = {"learning_rates": rates, "weight_decay": 0.1, "loraplus_ratio": 16.0}
    model = apply_towers(copy.deepcopy(stock_of(family.model_type).model), family, everywhere(), masters=True)
    live = parameter_groups(model, family, **how)
    sizes = family.sizes(stock_of(family.model_type).model.config)
    planned = groups_of_shapes(family, sizes, everywhere(), **how)
    assert [(g.name, g.parameters, g.lr, g.weight_decay) for g in live] == [
        (g.name, g.parameters, g.lr, g.weight_decay) for g in planned
    ]
    shown = {g.name: (g.lr, g.weight_decay) for g in live if g.trainable}
    assert shown["vision"] == (1e-5, 0.1)
    assert shown["vision_B"] == (pytest.approx(1.6e-4), 0.1)
    assert shown["merger_no_decay"] == (2e-5, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in live:
        of = {names[id(p)].rpartition(".lora_")[2].partition(".")[0] for p in group.tensors if group.trainable}
        assert of == {"B": {"B"}, "decay": {"magnitude_vector"}, "frozen": set()}.get(group.name.split("_")[-1], {"A"})


def test_plan_and_metrics_have_both_rates_and_the_scale(run_of, base, mixed_json, media, capsys):
    run = run_of(QWEN2_VL)
    capsys.readouterr()
    argv = ["--model_id", base, "--data_path", mixed_json, "--image_folder", media, *VISION_LORA, "--lora_rank", "16"]
    planned, text = plan_and_text(capsys, *argv, *ALL, "--vision_lr", "1e-5")
    rates = {group["name"]: group["lr"] for group in planned["groups"] if group["trainable"]}
    assert rates["vision_B"] == pytest.approx(4e-5)
    assert rates["language_B"] == pytest.approx(4e-4)
    assert planned["lora_scaling"] == 16
    assert "DoRA with rsLoRA rank 16, alpha 64: updates scaled by 16, 4 times the 4 without --use_rslora" in text
    assert "LoRA rank 16, alpha 64: updates scaled by 4\n" in plan_and_text(capsys, *argv)[1]
    logged = lines(run)[0]["lr"]
    assert logged["language_B"] == pytest.approx(4 * logged["language"])
    assert logged["language_no_decay"] == logged["language"]


def test_a_ratio_of_one_trains_as_no_ratio(train):
    one, none = train(*SAVE, "--loraplus_ratio", "1", name="one"), train(*SAVE, name="none")
    assert losses(one) == losses(none)
    assert all(torch.equal(weights(one)[name], value) for name, value in weights(none).items())
    assert set(lines(one)[0]["lr"]) == {"language", "language_B"}


def test_flops_are_those_that_torch_counts(stock_of):
    towers = everywhere()
    model = apply_towers(copy.deepcopy(stock_of("qwen2_vl").model), QWEN2_VL, towers, masters=True)
    linear = model.get_base_model().get_submodule("model.language_model.layers.0.mlp.down_proj")
    x = torch.randn(7, linear.in_features)
    with FlopCounterMode(display=False) as counter:
        linear(x).sum().backward()
    wanted = flops._linear(7, linear.in_features, linear.out_features, trained=False, rank=4, gradient=False, dora=True)
    assert counter.get_total_flops() == wanted.forward + wanted.backward


# ---- starting from an adapter


def test_a_run_starts_from_the_adapter(run_of, base, mixed_json, media, tmp_path, capsys):
    parent = run_of(QWEN2_VL)
    argv = arguments(base, mixed_json, media, tmp_path / "run", "--adapter", str(parent), "--max_steps", "1")
    at = argv.index("--lora_dropout")
    argv = argv[:at] + argv[at + 4 :]
    assert main([*argv, "--use_rslora", "false"]) == 1
    assert "--use_rslora is false, but the adapter" in capsys.readouterr().err
    assert main([*argv, "--lora_dropout", "0.1"]) == 1
    assert "--lora_dropout 0.1 with --use_dora true" in capsys.readouterr().err
    assert main([*argv, "--deepspeed", "zero3"]) == 1
    assert "--use_dora true with --deepspeed zero3" in capsys.readouterr().err
    assert main([*argv, "--learning_rate", "0"]) == 0
    printed = capsys.readouterr().out
    assert "use_dora true, use_rslora true; it decides" in printed
    assert "DoRA with rsLoRA rank 4, alpha 64" in printed
    found, wanted = weights(tmp_path / "run"), weights(parent)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((tmp_path / "run" / "vlft.json").read_text())["lora"]["dropout"] == 0


@pytest.mark.parametrize("verb", ["merge", "train"])
def test_an_adapter_without_all_its_vectors_is_refused(verb, run_of, base, mixed_json, media, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(run_of(QWEN2_VL), broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = next(name for name in sorted(tensors) if "magnitude" in name)
    del tensors[name]
    save_file(tensors, broken / "adapter_model.safetensors")
    argv = ["--adapter", str(broken), "--model_id", str(base), "--data_path", str(mixed_json)]
    words = ["merge", str(broken), str(tmp_path / "out")] if verb == "merge" else ["train", *argv,
             "--image_folder", str(media), "--output_dir", str(tmp_path / "out")]  # fmt: skip
    assert main(words) == 1
    assert "needs a lora_magnitude_vector" in capsys.readouterr().err


# ---- refusals


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (("--use_dora", "true", "--lora_dropout", "0.05"), 1, "--lora_dropout 0.05 with --use_dora true"),
        (("--use_dora", "true", "--deepspeed", "zero3_offload"), 1, "Use --deepspeed zero2, or drop --use_dora"),
        ((*FULL, "--use_dora", "true"), 1, "--use_dora true has no effect: no tower is lora (vision full"),
        ((*FULL, "--use_rslora"), 1, "--use_rslora true has no effect: no tower is lora (vision full"),
        ((*FULL, "--loraplus_ratio", "16"), 1, "--loraplus_ratio 16 has no effect: no tower is lora (vision full"),
        (("--loraplus_ratio", "0"), 1, "--loraplus_ratio is 0, must be more than 0"),
        (("--use_pissa", "true"), 2, "PiSSA"),
        (("--pissa_init", "true"), 2, "PiSSA"),
        (("--init_lora_weights", "olora"), 2, "OLoRA"),
        (("--init_lora_weights", "pissa_niter_16"), 2, "PiSSA"),
        (("--init_lora_weights", "eva"), 2, "EVA"),
        (("--init_lora_weights", "loftq"), 2, "LoftQ"),
        (("--init_lora_weights", "corda"), 2, "CorDA"),
        (("--init_lora_weights", "lora_ga"), 2, "LoRA-GA"),
        (("--lora_bias", "lora_only"), 2, "switching the adapter off"),
        (("--layers_to_transform", "0,1"), 2, "--language_blocks"),
        (("--trainable_token_indices", "7"), 2, "--train_tokens"),
        (("--use_qalora", "true"), 2, "not supported"),
        (("--num_virtual_tokens", "20"), 2, "prompt"),
        (("--peft_type", "PROMPT_TUNING"), 2, "prompt"),
        (("--rank_pattern", "x"), 2, "one rank"),
    ],
    ids=lambda value: "_".join(value)[2:] if isinstance(value, tuple) else "",
)
def test_what_cannot_be_trained_is_refused_by_name(flags, status, message, base, mixed_json, media, tmp_path, capsys):
    argv = ["--model_id", str(base), "--data_path", str(mixed_json), "--image_folder", str(media)]
    assert main(["train", *argv, "--output_dir", str(tmp_path / "run"), *flags]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_values_that_change_nothing_are_taken(base, mixed_json, media, capsys):
    argv = ["--model_id", base, "--data_path", mixed_json, "--image_folder", media]
    same = ("--init_lora_weights", "true", "--lora_bias", "none", "--use_pissa", "false", "--peft_type", "LORA")
    assert plan(capsys, *argv, *same)["lora_scaling"] == 2
