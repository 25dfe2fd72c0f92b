"""The function of a linear layer with LoRA, against PEFT's own forward of the same layer, and when it is not used."""

from __future__ import annotations

import copy
import types

import pytest
import torch
from models import FAMILY, PRESETS, assert_close, build, flat_inputs, gradients, tiny_sizes
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from vlft.demo.tiny import tiny_config, tiny_processor
from vlft.families import FAMILIES
from vlft.model import activations, apply, lora, traced, tracing
from vlft.model.towers import Towers

BF16 = torch.bfloat16
WIDTH, OUT, RANK = 48, 40, 4


class One(torch.nn.Module):
    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(WIDTH, OUT, bias=bias)

    def forward(self, x, **more):
        return self.proj(x, **more)


def pair(*, bias: bool = True, **settings):
    """One adapted linear layer by PEFT, with a B that is not zero, and a copy of it that is bound."""
    torch.manual_seed(0)
    config = {"r": RANK, "lora_alpha": 6, "target_modules": ["proj"], **settings}
    theirs = get_peft_model(One(bias), LoraConfig(**config)).train()
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    ours = copy.deepcopy(theirs)
    assert lora.bind(ours) == 1
    return theirs, ours


def layer(model):
    return model.get_base_model().proj


def run(model, x, upstream, *, autocast=None, seed=5):
    """The result and all gradients of one pass, with masks drawn from a seed."""
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    torch.manual_seed(seed)
    with tracing.autocast("cpu", autocast):
        y = model(leaf)
    y.backward(upstream.to(y.dtype))
    return {"y": y.detach(), "x": leaf.grad, **{k[-23:]: v.clone() for k, v in gradients(model).items()}}


@pytest.fixture
def unused(monkeypatch):
    """The function must not be used."""
    monkeypatch.setattr(lora, "adapted_linear", lambda *args, **kwargs: pytest.fail("the function was used"))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 30, WIDTH), (30, WIDTH), (2, 3, 5, WIDTH), (0, WIDTH)], ids=str)
def test_result_and_gradients_are_those_of_peft(dropout, bias, shape):
    theirs, ours = pair(bias=bias, lora_dropout=dropout)
    x, upstream = torch.randn(shape), torch.randn(*shape[:-1], OUT)
    found, wanted = run(ours, x, upstream), run(theirs, x, upstream)
    assert found.keys() == wanted.keys()
    assert len(found) == 4
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_inputs_and_gradients_need_not_be_contiguous():
    theirs, ours = pair(lora_dropout=0.3)
    x, upstream = torch.randn(WIDTH, 30).T, torch.ones(1, 1).expand(30, OUT)
    found, wanted = run(ours, x, upstream), run(theirs, x, upstream)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("given", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("stored", [torch.float32, BF16], ids=str)
def test_under_autocast_it_is_no_further_from_float64_than_peft(dropout, given, stored):
    """Mean errors over 2,000 rows. PEFT rounds the update twice more before it adds it.

    With dropout, it rounds an input in float32 once, and ours twice: to bf16, which the base needs, and after dropout.
    """
    theirs, ours = pair(lora_dropout=dropout)
    for model in (theirs, ours):
        base = layer(model).base_layer
        base.to(stored)
    x, upstream = torch.randn(1, 2000, WIDTH).to(given), torch.randn(1, 2000, OUT).to(BF16)
    exact = copy.deepcopy(theirs).double()
    wanted = run(exact, x.double(), upstream.double())
    errors = []
    for model in (ours, theirs):
        found = run(model, x, upstream, autocast=BF16)
        assert found["y"].dtype is BF16
        assert found["x"].dtype is given
        assert {v.dtype for k, v in found.items() if "lora" in k} == {torch.float32}
        errors.append({k: float((v.double() - wanted[k]).square().mean().sqrt()) for k, v in found.items()})
    for name, error in errors[0].items():
        assert 0 < error <= errors[1][name] * (1.08 if dropout and given is torch.float32 else 1), name


@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_dropout_keeps_its_share_and_its_mean(p):
    ones, eye = torch.ones(1000, 64), torch.eye(64)
    torch.manual_seed(0)
    x = ones.clone().requires_grad_()
    y = lora.adapted_linear(x, eye, eye, torch.zeros(64, 64), None, dropout=p, scaling=1.0)
    kept = y != 0
    assert float(kept.float().mean()) == pytest.approx(1 - p, abs=0.01)
    if p < 1:
        torch.testing.assert_close(y, kept / (1 - p))
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())  # the same mask


def test_without_autocast_it_computes_in_the_dtype_of_the_input():
    """As under DeepSpeed with bf16, where all weights are bf16, and with adapters that stay float32."""
    for masters in (BF16, torch.float32):
        _, ours = pair(lora_dropout=0.1)
        ours.to(BF16)
        layer(ours).lora_A.to(masters), layer(ours).lora_B.to(masters)
        found = run(ours, torch.randn(9, WIDTH, dtype=BF16), torch.randn(9, OUT))
        assert (found["y"].dtype, found["x"].dtype) == (BF16, BF16)
        assert {v.dtype for k, v in found.items() if "lora" in k} == {masters}


# ---- when PEFT computes


def hooked(model):
    layer(model).base_layer.register_forward_hook(lambda module, args, out: out + 1)


def partitioned(model):
    layer(model).base_layer.weight.ds_id = 3


def replaced(model):
    base = layer(model).base_layer
    base.forward = types.MethodType(lambda self, x: torch.nn.functional.linear(x, self.weight) * 2, base)


def quantised(model):
    """A linear layer of another class, whose weight is no floating number."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 100, self.bias)

    base = layer(model).base_layer
    base.weight = torch.nn.Parameter((base.weight * 100).to(torch.int8), requires_grad=False)
    base.__class__ = type("Quantised", (torch.nn.Linear,), {"forward": forward})


def merged(model):
    model.merge_adapter()


def second(model):
    model.add_adapter("other", LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])


def training_base(model):
    layer(model).base_layer.weight.requires_grad_()


STATES = [merged, second, training_base, hooked, partitioned, replaced, quantised]


@pytest.mark.parametrize("change", STATES, ids=lambda one: one.__name__)
def test_any_other_state_is_left_to_peft(unused, change):
    theirs, ours = pair(lora_dropout=0.2)
    for model in (theirs, ours):
        torch.manual_seed(1)
        change(model)
    x, upstream = torch.randn(9, WIDTH), torch.randn(9, OUT)
    found, wanted = run(ours, x, upstream), run(theirs, x, upstream)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_other_kinds_of_lora_are_left_to_peft(unused):
    theirs, ours = pair(lora_bias=True)
    x = torch.randn(9, WIDTH)
    assert torch.equal(ours(x), theirs(x))


def test_adapters_by_name_are_left_to_peft(unused):
    theirs, ours = pair()
    x, names = torch.randn(2, 3, WIDTH), ["default", "__base__"]
    assert torch.equal(ours.eval()(x, adapter_names=names), theirs.eval()(x, adapter_names=names))


def test_a_disabled_adapter_changes_nothing(monkeypatch):
    _, ours = pair()
    x = torch.randn(9, WIDTH)
    with_adapter = ours(x)
    with ours.disable_adapter():
        assert torch.equal(ours(x), layer(ours).base_layer(x))
    assert torch.equal(ours(x), with_adapter)
    assert not torch.equal(with_adapter, layer(ours).base_layer(x))


def test_peft_still_owns_the_weights(tmp_path):
    """State dicts, saved adapters, copies and merging are those of a model that is not bound."""
    theirs, ours = pair(lora_dropout=0.2)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, model in (("theirs", theirs), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("theirs", "ours")]
    assert files[0] == files[1]
    x, twin = torch.randn(9, WIDTH), copy.deepcopy(ours).eval()
    with torch.no_grad():
        layer(twin).lora_B["default"].weight.zero_()
    assert torch.equal(twin(x), layer(ours).base_layer(x))  # a copy is bound to itself
    wanted = theirs.eval()(x)
    torch.testing.assert_close(ours.eval()(x), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.merge_and_unload()(x), wanted, rtol=1e-5, atol=1e-5)


# ---- what it costs


def test_an_input_without_a_gradient_costs_none():
    _, ours = pair(lora_dropout=0.2)
    rows, counts = 30, []
    for needed in (False, True):
        y = ours(torch.randn(rows, WIDTH, requires_grad=needed))
        with FlopCounterMode(display=False) as counter:
            y.sum().backward()
        counts.append(counter.get_total_flops())
    adapter = 2 * rows * RANK * (2 * OUT + WIDTH)  # the gradients of B, of what enters it, and of A
    assert counts == [adapter, adapter + 2 * rows * WIDTH * (OUT + RANK)]


@pytest.mark.parametrize("dropout", [0.05, 0.0])
def test_a_layer_on_a_gpu_runs_these_operations_and_no_others(dropout):
    """No float32 tensor has as many rows as the input, and what an operation reads and writes is counted once."""
    _, ours = pair(lora_dropout=dropout)
    rows, seen = 100, []
    with tracing.without_contents(), torch.device("cuda"):
        tracing.fill(ours.to("meta"), tracing.Numbers(stored=BF16, trained=torch.float32, autocast=BF16))
        x = torch.empty(1, rows, WIDTH, dtype=BF16, requires_grad=True)
        with tracing.Watch(seen.append):
            with tracing.autocast("cuda", BF16):
                y = ours(x)
            tracing.backward(y.sum())
    large = [op for op in seen if any(rows in t.shape for t in (*op.inputs, *op.outputs))]
    assert not [op.name for op in large if any(t.dtype is torch.float32 for t in op.outputs if t.dim())]
    moved = [op.name.removeprefix("aten.") for op in large if not op.function.is_view]
    drop, add = (["native_dropout"], ["mm", "addcmul_"]) if dropout else ([], ["addmm"])
    forward = [*drop, "mm", "addmm", "addmm"]
    backward = ["mm", "addmm", "addmm", "mm", *add]
    leaf = ["copy_"]  # torch copies the gradient into x.grad
    ignored = {"prim.device", "new_empty", "new_empty_strided", "sum"}
    assert [name for name in moved if name not in ignored] == forward + backward + leaf


def kept_bytes(monkeypatch, dropout, device, *, bound):
    """What a tiny model with LoRA everywhere saves for the backward pass, without weights."""
    if not bound:
        monkeypatch.setattr(apply.lora, "bind", lambda model: 0)
    towers = Towers(vision="lora", merger="lora", lora_dropout=dropout)
    numbers = tracing.numbers_of(BF16, BF16, deepspeed=False)
    load = tracing.Load(lengths=(100, 24), vision_lengths=(400,), supervised=20)
    with traced.step(
        tiny_config(tiny_processor()), FAMILY, towers, numbers=numbers, device=device, fused=device == "cuda"
    ) as model:
        batch = tracing.batch_of(tiny_sizes().vision, load)
        with tracing.autocast(device, BF16), activations.Ledger(model, batch.values()) as ledger:
            model(**batch)
    monkeypatch.undo()
    return ledger.kept


@pytest.mark.parametrize(
    ("dropout", "device"),
    [
        (0.05, "cuda"),
        pytest.param(0.0, "cpu", marks=pytest.mark.grid),
        pytest.param(0.05, "cpu", marks=pytest.mark.grid),
        pytest.param(0.0, "cuda", marks=pytest.mark.grid),
    ],
)
def test_it_saves_no_more_than_peft(monkeypatch, dropout, device):
    """With dropout, each adapter's input and mask; without it, q, k and v share their input."""
    ours, theirs = (kept_bytes(monkeypatch, dropout, device, bound=bound) for bound in (True, False))
    for part in ("vision", "merger", "language"):
        assert ours[part] <= theirs[part], part
    if not dropout:
        assert ours["language"] < 0.95 * theirs["language"]


# ---- in a model


@pytest.mark.parametrize(
    "model_type", [pytest.param(t, marks=() if t == "qwen2_vl" else pytest.mark.grid) for t in FAMILIES]
)
def test_a_model_with_dropout_everywhere_takes_the_step_that_it_takes_with_peft(monkeypatch, stock_of, model_type):
    """By the flat forward, with and without recomputation. `test_flat_families` has it without dropout."""
    monkeypatch.setitem(PRESETS, "here", Towers(vision="lora", merger="lora", lora_rank=4, lora_dropout=0.1))
    stock = stock_of(model_type)
    inputs = flat_inputs([stock.rows[kind].flat for kind in ("pictures", "mixed")], stock.family)
    found = []
    for bound, recomputed in ((False, False), (True, False), (True, True)):
        with monkeypatch.context() as patch:
            if not bound:
                patch.setattr(apply.lora, "bind", lambda model: 0)
            model = build(
                stock.base, "here", flat=True, family=stock.family, loaded=stock.model, checkpointing=recomputed
            )
        torch.manual_seed(7)
        loss = model(**inputs).loss
        loss.backward()
        found.append((loss, gradients(model)))
    (loss, theirs), *rest = found
    for our_loss, ours in rest:
        assert_close(our_loss, loss, "loss")
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            assert_close(ours[name], gradient, name, tolerance=1e-4 if "recurrent" in stock.family.features else 1e-5)
