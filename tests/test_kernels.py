"""Fused kernels: when they are used or refused, and that they change one model only. Torch replaces the kernels."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import EVERYWHERE, FAMILY, PRESETS, assert_close, flat_inputs, gradients
from torch_kernels import OPERATIONS, TORCH, torch_rms_norm, torch_swiglu
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from vlft.errors import ConfigError
from vlft.model import attention, forward, fused, kernels, modules, selftest
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.load import load_base, load_processor
from vlft.model.scale import PixelScale

CPU = torch.device("cpu")
NAMES = tuple(field.name for field in dataclasses.fields(kernels.Functions))
IN_A_STEP = dict(zip(NAMES, (5, 2, 5, 2, 2, 2, 0, 0), strict=True))  # calls in the forward pass of the tiny model


class Counting:
    """Torch's own functions, counting their calls."""

    def __init__(self) -> None:
        self.calls = dict.fromkeys(NAMES, 0)
        self.functions = kernels.Functions(**{name: self._counted(name) for name in NAMES})

    def _counted(self, name):
        def function(*args):
            self.calls[name] += 1
            return getattr(TORCH, name)(*args)

        return function

    def reset(self) -> None:
        self.calls = dict.fromkeys(self.calls, 0)


def broken(**functions) -> kernels.Functions:
    return dataclasses.replace(TORCH, **functions)


def build(base, preset: str, functions: kernels.Functions | None) -> torch.nn.Module:
    """A model as a run prepares it, in float32."""
    torch.manual_seed(0)
    model = load_base(base, FAMILY, dtype=torch.float32)
    attention.install(model, "sdpa", dtype=torch.float32)
    if functions is not None:
        assert kernels.install(model, "true", dtype=torch.float32, functions=functions) == EVERYWHERE
    forward.bind(model, PixelScale.of(load_processor(base)))
    model = apply_towers(model, FAMILY, PRESETS[preset], masters=True)
    checkpoint_activations(model, ("vision", "language"))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.05, generator=generator)
    return model.train()


@pytest.mark.parametrize("preset", ["full", "vision-lora"])
def test_a_patched_model_gives_the_loss_and_gradients_of_the_stock_one(base, encoded, preset):
    counting = Counting()
    plain, patched = build(base, preset, None), build(base, preset, counting.functions)
    counting.reset()
    batch = flat_inputs(list(encoded.values()))
    losses = [model(**batch).loss for model in (plain, patched)]
    assert counting.calls == IN_A_STEP
    for value in losses:
        value.backward()
    assert_close(losses[1], losses[0], "loss")
    theirs, ours = gradients(plain), gradients(patched)
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, name)


def test_patching_one_model_leaks_to_no_other(base, encoded):
    def bound(model):
        return {name for name, module in model.named_modules() if "forward" in vars(module)}

    other = build(base, "full", None)
    before = bound(other)
    counting = Counting()
    assert bound(build(base, "full", counting.functions)) > before
    later = build(base, "full", None)
    counting.reset()
    for model in (other, later):
        model(**flat_inputs([encoded["text"]]))
        assert bound(model) == before
    assert not any(counting.calls.values())


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("factor", ["w", "1 + w"])
def test_a_norm_returns_torchs_dtype_and_under_autocast_that_of_linear_layers(given, weights, factor):
    norm = {"w": Qwen2VLRMSNorm, "1 + w": Qwen3_5RMSNorm}[factor](8).to(weights)
    x = torch.ones(2, 8, dtype=given)
    stock = norm(x).dtype
    modules.fuse_rms_norm(norm, TORCH.rms_norm, factor)
    assert norm(x).dtype == stock
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(x).dtype == torch.bfloat16
        modules.fuse_rms_norm(norm, TORCH.rms_norm, factor, keeps_dtype=True)
        assert norm(x).dtype == stock


def test_liger_computes_the_norms_whose_dtypes_it_knows():
    """It returns its input's dtype, so it is used where input, weight and result share one."""
    calls = []

    def ligers(x, weight, eps, offset):
        calls.append(x.dtype)
        return torch_rms_norm(x, weight, eps, offset)

    functions = fused.functions(OPERATIONS, rms_norm=ligers)
    for x, weight, dtype in (("bfloat16",) * 3, ("float32",) * 3, ("float32", "float32", "bfloat16")):
        x, weight = torch.ones(2, 8, dtype=getattr(torch, x)), torch.ones(8, dtype=getattr(torch, weight))
        assert functions.rms_norm(x, weight, 1e-6, 0.0, getattr(torch, dtype)).dtype == getattr(torch, dtype)
    assert calls == [torch.bfloat16, torch.float32]


def test_without_cuda_auto_is_off_and_true_is_refused(base):
    model = load_base(base, FAMILY, dtype=torch.float32)
    assert kernels.install(model, "auto", dtype=torch.float32) == "off (needs CUDA)"
    assert kernels.install(model, "false", dtype=torch.float32) == "off"
    for choice in ("auto", "false"):
        kernels.check(choice, CPU)
    for refuse in (lambda: kernels.check("true", CPU), lambda: kernels.install(model, "true", dtype=torch.float32)):
        with pytest.raises(ConfigError, match=r"--use_liger_kernel true: needs CUDA.*pip install 'liger-kernel"):
            refuse()


def test_false_is_off_even_where_they_would_work(base):
    model = load_base(base, FAMILY, dtype=torch.float32)
    assert kernels.install(model, "false", dtype=torch.float32, functions=TORCH) == "off"


def _fails(*_):
    raise RuntimeError("no kernel image\nfor this device")


def _refuses(*_):
    raise AssertionError


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


class _Doubled(torch.autograd.Function):
    """The right result with a wrong gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def _turned_back(q, k, cos, sin, dtype):
    return TORCH.rotary(q, k, cos, -sin, dtype)


def _value_turned_too(joined, cos, sin, heads):
    q, k, v = TORCH.joined_rotary(joined, cos, sin, heads)
    return q, k, v * cos[:, None]


@pytest.mark.parametrize(
    ("functions", "reason"),
    [
        (broken(rms_norm=lambda x, w, *a: torch_rms_norm(x, w + 0.01, *a)), "not RMSNorm: the self-test of RMSNorm"),
        (broken(rms_norm=lambda x, w, *a: torch_rms_norm(x, w.detach() + 0 * w, *a)), "not RMSNorm: the self-test"),
        (broken(swiglu=lambda gate, up: torch.nn.functional.gelu(gate) * up), "not SwiGLU: the self-test of SwiGLU in"),
        (broken(swiglu=lambda gate, up: gate * up * float("nan")), "differs from the model's own by nan"),
        (broken(swiglu=lambda gate, up: _NanGradient.apply(torch_swiglu(gate, up))), "own by nan"),
        (broken(rms_norm=_fails), "not RMSNorm: RuntimeError: no kernel image)"),
        (broken(rms_norm=_refuses), "not RMSNorm: AssertionError)"),
        (broken(layer_norm=lambda x, w, b, *a: TORCH.layer_norm(x, w, 0 * b, *a)), "not LayerNorm: the self-test"),
        (broken(quick_gelu=torch.nn.functional.gelu), "not quick GELU: the self-test"),
        (broken(quick_gelu=lambda x: _Doubled.apply(TORCH.quick_gelu(x))), "not quick GELU: the self-test"),
        (broken(rotary=_turned_back), "not rotary embedding of language: the self-test"),
        (broken(joined_rotary=_value_turned_too), "not rotary embedding of vision: the self-test"),
    ],
    ids=[
        "wrong", "wrong-gradient", "another", "nan", "nan-gradient", "raises", "refuses", "no-bias", "another-gelu",
        "doubled-gradient", "turned-back", "value-turned",
    ],
)  # fmt: skip
def test_what_fails_its_self_test_is_left_to_torch_and_the_others_are_used(base, functions, reason):
    model = load_base(base, FAMILY, dtype=torch.float32)
    said = kernels.install(model, "auto", dtype=torch.float32, functions=functions)
    active, _, why = said.partition(" (not ")
    failed = why.partition(":")[0]
    assert reason in said
    assert "\n" not in said
    assert failed not in active
    assert len(active.split(", ")) == len(EVERYWHERE.split(", ")) - 1
    for kernel in kernels.kernels_of(model, functions):
        assert {"forward" in vars(module) for module in kernel.modules} == {kernel.name != failed}
    with pytest.raises(ConfigError, match="--use_liger_kernel true: "):
        kernels.install(load_base(base, FAMILY, dtype=torch.float32), "true", dtype=torch.float32, functions=functions)


def test_ours_is_used_where_ligers_fails_its_self_test(base, monkeypatch):
    model = load_base(base, FAMILY, dtype=torch.float32)
    monkeypatch.setattr(kernels, "_functions", lambda choice, device: (broken(rms_norm=_fails), TORCH))
    said = kernels.install(model, "true", dtype=torch.float32)
    assert said == f"{EVERYWHERE} (not Liger's RMSNorm: RuntimeError: no kernel image)"
    (norms,) = (kernel for kernel in kernels.kernels_of(model, TORCH) if kernel.name == "RMSNorm")
    assert all("forward" in vars(norm) for norm in norms.modules)


def test_it_is_off_if_no_kernel_passes(base):
    model = load_base(base, FAMILY, dtype=torch.float32)
    functions = kernels.Functions(rms_norm=_fails, swiglu=_fails)
    said = kernels.install(model, "auto", dtype=torch.float32, functions=functions)
    reason = "RuntimeError: no kernel image"
    assert said == f"off (not RMSNorm: {reason}, not SwiGLU: {reason})"
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]


def _one_plus():
    """A real RMSNorm that multiplies by 1 + w (from Qwen3.5), with the attributes that a kernel needs."""
    norm = Qwen3_5RMSNorm(64, eps=1e-6)
    norm.variance_epsilon = norm.eps
    return norm


def _other_names():
    norm = _one_plus()
    del norm.variance_epsilon
    return norm


def _of_another_class(module, forward):
    module.__class__ = type("Another", (type(module),), {"forward": forward})


def _weighs_by_one_plus(self, x):
    return (1 + self.weight) * torch_rms_norm(x, torch.ones_like(self.weight), self.variance_epsilon)


def _limits_the_gate(self, x):
    return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=1)) * self.up_proj(x))


def apply_rotary_pos_emb(q, k, cos, sin):
    """Not transformers' function of this name: it turns backwards."""
    turned = [x * cos - torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k)]
    return turned[0], turned[1]


def _turns_the_value(self, x, position_embeddings, attention_mask=None, **kwargs):
    def heads(projected):
        return projected.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    q, k = apply_rotary_pos_emb(heads(self.q_proj(x)), heads(self.k_proj(x)), *position_embeddings)
    out, _ = selftest._sum(self, q, k, heads(self.v_proj(x)))
    return self.o_proj(out.flatten(2)), None


def _without_rotary(self, x, position_embeddings, attention_mask=None, **kwargs):
    return self.o_proj(self.q_proj(x)), None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: setattr(text, "norm", _one_plus()), "the self-test of RMSNorm in float32 differs"),
        (lambda text: setattr(text, "norm", _other_names()), "no attribute 'variance_epsilon'"),
        (
            lambda text: _of_another_class(text.layers[1].input_layernorm, _weighs_by_one_plus),
            "the self-test of RMSNorm in float32 differs",
        ),
        (lambda text: _of_another_class(text.layers[1].mlp, _limits_the_gate), "the self-test of SwiGLU"),
        (lambda text: setattr(text.layers[0].mlp, "act_fn", torch.nn.GELU()), "the self-test of SwiGLU"),
        (lambda text: setattr(text.layers[1], "mlp", torch.nn.Identity()), "gate_proj"),
        (
            lambda text: _of_another_class(text.layers[1].self_attn, _turns_the_value),
            "not rotary embedding of language: the self-test",
        ),
        (
            lambda text: _of_another_class(text.layers[1].self_attn, _without_rotary),
            "not rotary embedding of language: TypeError: Another does not call apply_rotary_pos_emb",
        ),
    ],
    ids=[
        "one-plus", "other-names", "one-of-five", "another-mlp", "another-activation", "no-mlp", "another-attention",
        "no-rotary",
    ],
)  # fmt: skip
def test_a_module_that_computes_something_else_keeps_its_own_forward(base, change, reason):
    """The kernels are correct, but wrong for one module of this model."""
    model = load_base(base, FAMILY, dtype=torch.float32)
    change(model.model.language_model)
    said = kernels.install(model, "auto", dtype=torch.float32, functions=TORCH)
    failed = said.partition(" (not ")[2].partition(":")[0]
    assert reason in said
    for kernel in kernels.kernels_of(model, TORCH):
        assert {"forward" in vars(module) for module in kernel.modules} == {kernel.name != failed}
    with pytest.raises(ConfigError, match="--use_liger_kernel true: "):
        kernels.install(model, "true", dtype=torch.float32, functions=TORCH)


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_5"])
@pytest.mark.parametrize("dtype", list(kernels.TOLERANCE))
def test_torch_in_16_bits_passes_the_self_tests(stock_of, model_type, dtype):
    """Also where hidden states or weights are float32 under autocast."""
    model = stock_of(model_type).model
    for kernel in kernels.kernels_of(model, TORCH):
        found = kernels.self_test(kernel, dtype=dtype, device=CPU)
        assert len(found) == (1 if dtype == torch.float32 else 4 if kernel.mixed else 2)
        for dtypes, worst in found.items():
            assert worst < kernels.TOLERANCE[dtypes.narrowest], (kernel.name, dtypes)
            if torch.float32 not in (dtypes.given, dtypes.weights):
                assert worst > 1e-4  # a smaller difference would mean that it does not run in 16 bits


def test_the_self_test_of_rotary_embedding_sees_what_a_step_passes_on(monkeypatch, base, encoded):
    """Dtypes and strides in both towers, under autocast, with float32 and with bf16 weights."""
    functions, seen = {}, set()

    def spy(name):
        def function(first, *rest):
            tensors = [x for x in (first, *rest) if isinstance(x, torch.Tensor)]
            # Strides of all but the sizes that differ: batch and tokens.
            seen.add((name, tuple((x.dtype, x.stride()[-2:] if x.dim() < 4 else x.stride()[1::2]) for x in tensors)))
            return getattr(TORCH, name)(first, *rest)

        return function

    for name in ("rotary", "joined_rotary"):
        functions[name] = spy(name)
    in_a_step = set()
    for dtype in (torch.float32, torch.bfloat16):
        model = load_base(base, FAMILY, dtype=dtype)
        attention.install(model, "sdpa", dtype=dtype)
        kernels.fuse(model, kernels.Functions(**functions))
        forward.bind(model, PixelScale.of(load_processor(base)))
        with torch.autocast("cpu", torch.bfloat16):
            model(**flat_inputs(list(encoded.values())))
        in_a_step |= seen
        seen.clear()
    for kernel in kernels.kernels_of(model, kernels.Functions(**functions)):
        kernels.self_test(kernel, dtype=torch.bfloat16, device=CPU)
    assert in_a_step <= seen


def test_generation_and_padded_rows_run_transformers_own_attention(base):
    """With a cache, other numbers of tokens and several rows."""
    ids = torch.arange(20).view(2, 10)
    plain = load_base(base, FAMILY, dtype=torch.float32).eval()
    wanted = plain.generate(ids, max_new_tokens=5, do_sample=False)
    counting = Counting()
    kernels.fuse(plain, counting.functions)
    assert torch.equal(plain.generate(ids, max_new_tokens=5, do_sample=False), wanted)
    assert counting.calls["rms_norm"]
    assert not counting.calls["rotary"]


def test_a_kernel_without_its_package_says_so(monkeypatch):
    def missing():
        raise ImportError("No module named 'liger_kernel'")

    monkeypatch.setattr(fused, "liger_functions", missing)
    with pytest.raises(ConfigError, match=r"No module named 'liger_kernel'\. To get the kernels: pip install"):
        kernels.check("true", torch.device("cuda"))


@pytest.mark.parametrize("error", [ImportError("no liger_kernel"), AttributeError("no such thing in triton")], ids=repr)
def test_without_liger_auto_uses_the_kernels_that_are_ours(monkeypatch, base, error):
    """Also if it is installed and does not fit the installed triton."""

    def missing():
        raise error

    monkeypatch.setattr(fused, "liger_functions", missing)
    monkeypatch.setattr(fused, "triton_operations", lambda: OPERATIONS)
    monkeypatch.setattr(kernels, "_problem", lambda *args: "")
    model = load_base(base, FAMILY, dtype=torch.float32)
    assert kernels.install(model, "auto", dtype=torch.float32, device=torch.device("cuda")) == EVERYWHERE


def test_ligers_functions_are_where_we_look_for_them():
    """Module paths and arguments of liger-kernel 0.8.5; the functions run only on CUDA."""
    pytest.importorskip("liger_kernel")
    functions = fused.functions(OPERATIONS, **fused.liger_functions())
    assert callable(functions.rms_norm)
    assert callable(functions.swiglu)


def test_our_triton_kernels_equal_torch():
    """In triton's interpreter, which a process must choose before it imports triton."""
    pytest.importorskip("triton")
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, str(root / "tests" / "triton_interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
