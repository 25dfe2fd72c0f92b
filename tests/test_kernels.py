"""Fused kernels: when they are used or refused, and that they change one model only. Torch replaces Liger."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from models import FAMILY, PRESETS, TORCH, assert_close, flat_inputs, gradients, modules, torch_rms_norm, torch_swiglu
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm

from vlft.errors import ConfigError
from vlft.model import attention, forward, kernels
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.load import load_base, load_processor
from vlft.model.scale import PixelScale

CPU = torch.device("cpu")
EVERYWHERE = "RMSNorm on 5 modules, SwiGLU on 2"


class Counting:
    """Torch's own functions, counting their calls."""

    def __init__(self) -> None:
        self.calls = {"rms_norm": 0, "swiglu": 0}
        self.functions = kernels.Functions(rms_norm=self._counted("rms_norm"), swiglu=self._counted("swiglu"))

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
    assert counting.calls == {"rms_norm": 5, "swiglu": 2}
    for value in losses:
        value.backward()
    assert_close(losses[1], losses[0], "loss")
    theirs, ours = gradients(plain), gradients(patched)
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, name)


def test_patching_one_model_leaks_to_no_other(base, encoded):
    other = build(base, "full", None)
    counting = Counting()
    build(base, "full", counting.functions)
    later = build(base, "full", None)
    counting.reset()
    for model in (other, later):
        model(**flat_inputs([encoded["text"]]))
        assert not [name for name, module in model.named_modules() if "norm" in name and "forward" in vars(module)]
    assert counting.calls == {"rms_norm": 0, "swiglu": 0}


def test_another_dtype_than_the_weights_goes_torchs_way():
    """Torch returns the wider of the two dtypes, and a kernel would not."""
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRMSNorm

    counting, norm = Counting(), Qwen2VLRMSNorm(8)
    kernels.fuse_rms_norm(norm, counting.functions.rms_norm)
    assert norm(torch.ones(2, 8, dtype=torch.bfloat16)).dtype == torch.float32
    assert counting.calls["rms_norm"] == 0
    assert norm(torch.ones(2, 8)).dtype == torch.float32
    assert counting.calls["rms_norm"] == 1


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


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


@pytest.mark.parametrize(
    ("functions", "reason"),
    [
        (broken(rms_norm=lambda x, w, eps, _: torch_rms_norm(x, w + 0.01, eps)), "the self-test of RMSNorm"),
        (broken(rms_norm=lambda x, w, eps, _: torch_rms_norm(x, w.detach() + 0 * w, eps)), "RMSNorm"),
        (broken(swiglu=lambda gate, up: torch.nn.functional.gelu(gate) * up), "the self-test of SwiGLU in float32"),
        (broken(swiglu=lambda gate, up: gate * up * float("nan")), "differs from the model's own by nan"),
        (broken(swiglu=lambda gate, up: _NanGradient.apply(torch_swiglu(gate, up))), "own by nan"),
        (broken(rms_norm=_fails), "RuntimeError: no kernel image"),
    ],
    ids=["wrong", "wrong-gradient", "another", "nan", "nan-gradient", "raises"],
)
def test_what_fails_its_self_test_is_not_used(base, functions, reason):
    model = load_base(base, FAMILY, dtype=torch.float32)
    said = kernels.install(model, "auto", dtype=torch.float32, functions=functions)
    assert said.startswith("off (")
    assert reason in said
    assert "\n" not in said
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    with pytest.raises(ConfigError, match="--use_liger_kernel true: "):
        kernels.install(model, "true", dtype=torch.float32, functions=functions)


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
    ],
    ids=["one-plus", "other-names", "one-of-five", "another-mlp", "another-activation", "no-mlp"],
)
def test_a_module_that_computes_something_else_keeps_its_own_forward(base, change, reason):
    """The kernels are correct, but wrong for one module of this model."""
    model = load_base(base, FAMILY, dtype=torch.float32)
    change(model.model.language_model)
    said = kernels.install(model, "auto", dtype=torch.float32, functions=TORCH)
    assert said.startswith("off (")
    assert reason in said
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
    with pytest.raises(ConfigError, match="--use_liger_kernel true: "):
        kernels.install(model, "true", dtype=torch.float32, functions=TORCH)


@pytest.mark.parametrize("factor", ["w", "1 + w"])
@pytest.mark.parametrize("dtype", list(kernels.TOLERANCE))
def test_torch_in_16_bits_passes_the_self_test(dtype, factor):
    norms, mlps = modules(96, 160)
    if factor != "w":
        norms = [Qwen3_5RMSNorm(96)]
    found = kernels.self_test(TORCH, norms, mlps, dtype=dtype, device=CPU, factor=factor)
    assert set(found) == {"RMSNorm", "SwiGLU"}
    assert max(found.values()) < kernels.TOLERANCE[dtype]
    if dtype != torch.float32:
        assert min(found.values()) > 1e-4  # a smaller difference would mean that it does not run in 16 bits


def test_a_kernel_without_its_package_says_so(monkeypatch):
    def missing():
        raise ImportError("No module named 'liger_kernel'")

    monkeypatch.setattr(kernels, "liger_functions", missing)
    with pytest.raises(ConfigError, match=r"No module named 'liger_kernel'\. To get the kernels: pip install"):
        kernels.check("true", torch.device("cuda"))


def test_ligers_functions_are_where_we_look_for_them():
    """Module paths and arguments of liger-kernel 0.8.5; the functions run only on CUDA."""
    pytest.importorskip("liger_kernel")
    functions = kernels.liger_functions()
    assert callable(functions.rms_norm)
    assert callable(functions.swiglu)
