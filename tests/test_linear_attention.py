"""Who computes the delta rule: what flash-linear-attention gets, when it is used, what a GPU would wait for. No GPU."""

from __future__ import annotations

import importlib
import itertools
import sys
import types

import pytest
import torch
from models import assert_close
from recurrent_models import EXPERTS, FAMILY, LENGTHS, build, config_of, flat_batch, text_rows

from vlft.config.flags import DataFlags, ModelFlags
from vlft.errors import ConfigError
from vlft.model import adapt, forward, linear_attention, recurrent, segments, standins, tracing
from vlft.model.apply import apply_towers, checkpoint_activations
from vlft.model.features import Features
from vlft.model.load import empty_model
from vlft.model.scale import PixelScale
from vlft.model.towers import Towers
from vlft.setup import open_base

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
BF16, FLOAT32 = torch.bfloat16, torch.float32
SIZES = FAMILY.sizes(config_of(FAMILY)).text.layers[0].recurrent


# ---- kernels that run on a CPU


def right(q, k, v, *, g, beta, use_qk_l2norm_in_kernel, cu_seqlens, chunk_indices):
    """As fla-core 0.6.0 checks its inputs; it computes on 16-bit queries, keys and values."""
    assert use_qk_l2norm_in_kernel
    assert {x.dtype for x in (q, k, v, beta)} == {BF16}
    assert (g.dtype, cu_seqlens.dtype, chunk_indices.dtype) == (FLOAT32, torch.int64, torch.int64)
    assert q.shape[0] == 1
    assert v.shape[2] % q.shape[2] == 0
    assert cu_seqlens[-1] == q.shape[1]
    bounds = cu_seqlens.tolist()
    chunks = [[s, c] for s, (a, b) in enumerate(itertools.pairwise(bounds)) for c in range(-(-(b - a) // 64))]
    assert chunk_indices.tolist() == chunks
    return computed(q, k, v, g, beta, cu_seqlens.diff().tolist()), None


def computed(q, k, v, g, beta, lengths):
    of = recurrent.Segments(lengths=tuple(lengths), device=CPU)
    return recurrent.torch_rule(*(x[0] for x in (q, k, v, g, beta)), of)[None]


def mixes_samples(q, k, v, *, g, beta, **more):
    return computed(q, k, v, g, beta, [q.shape[1]]), None


def forgets_between_chunks(q, k, v, *, g, beta, cu_seqlens, **more):
    lengths = [min(64, n - at) for n in cu_seqlens.diff().tolist() for at in range(0, n, 64)]
    return computed(q, k, v, g, beta, lengths), None


def ignores_strides(q, k, v, *, cu_seqlens, g, beta, **more):
    dense = torch.as_strided(v, v.shape, (0, v.shape[2] * v.shape[3], v.shape[3], 1))
    return computed(q, k, dense, g, beta, cu_seqlens.diff().tolist()), None


def has_no_gradient_of_beta(q, k, v, *, cu_seqlens, g, beta, **more):
    return computed(q, k, v, g, beta.detach() + 0 * beta, cu_seqlens.diff().tolist()), None


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def nan_gradient(*args, **kwargs):
    return NanGradient.apply(right(*args, **kwargs)[0]), None


def difference_of(kernel):
    return linear_attention.self_test(recurrent.kernel_rule(kernel), SIZES, dtype=BF16, device=CPU)


def test_a_right_kernel_passes_its_self_test():
    assert 1e-4 < difference_of(right) < linear_attention.TOLERANCE  # less would mean that it does not run in 16 bits


@pytest.mark.parametrize(
    "kernel", [mixes_samples, forgets_between_chunks, ignores_strides, has_no_gradient_of_beta, nan_gradient]
)
def test_a_wrong_one_does_not(kernel):
    assert not difference_of(kernel) < 2 * linear_attention.TOLERANCE


# ---- the choice


@pytest.fixture
def fla(monkeypatch):
    """flash-linear-attention is installed; the fixture is the list of its calls' (cu_seqlens, chunk_indices)."""
    calls = []

    def chunk_gated_delta_rule(*args, **kwargs):
        calls.append((kwargs["cu_seqlens"].tolist(), kwargs["chunk_indices"].tolist()))
        return right(*args, **kwargs)

    for family in (FAMILY, EXPERTS):  # transformers' own layers would keep the package that they find when imported
        importlib.import_module(f"transformers.models.{family.model_type}.modeling_{family.model_type}")
    modules = {name: types.ModuleType(name) for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule")}
    modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = chunk_gated_delta_rule
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def on_a_gpu(monkeypatch, result=None):
    """The self-test runs on the CPU, or has a given result."""
    test = linear_attention.self_test
    monkeypatch.setattr(
        linear_attention,
        "self_test",
        lambda rule, sizes, *, dtype, device: test(rule, sizes, dtype=dtype, device=CPU) if result is None else result,
    )


def test_a_model_uses_fla_for_all_its_layers_with_the_bounds_of_rows(monkeypatch, fla):
    on_a_gpu(monkeypatch)
    rows = text_rows(LENGTHS)
    plain, model = (build(FAMILY, "full", flat=True) for _ in range(2))
    assert linear_attention.install(model, "auto", dtype=BF16, device=CUDA) == "fla"
    fla.clear()  # the calls of the self-test
    found = []
    for one in (plain, model):
        with torch.autocast("cpu", BF16), torch.no_grad():
            found.append(one(**flat_batch(FAMILY, one.config, rows), return_logits=True).logits)
    bounds = [0, 1, 3, 6, 11, 75, 140, 340]
    assert [cu for cu, _ in fla] == [bounds] * len(adapt.recurrent_layers(model))
    assert_close(*found, "logits")


def test_what_cannot_run_is_passed_over_with_a_remark_or_refused_by_name(monkeypatch, fla):
    model, said = build(FAMILY, "full", flat=True), []
    where = {"dtype": BF16, "device": CUDA, "say": said.append}
    for result, why in (
        (0.3, "its self-test differs from torch by 0.3"),
        (float("nan"), "its self-test differs from torch by nan"),
    ):
        on_a_gpu(monkeypatch, result)
        assert linear_attention.install(model, "auto", **where) == "torch"
        assert why in said.pop()
        with pytest.raises(ConfigError, match=f"--linear_attn fla: {why}"):
            linear_attention.install(model, "fla", **where)
    assert linear_attention.install(model, "torch", **where) == "torch"
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    assert linear_attention.install(model, "auto", **where) == "torch"
    assert "not fla: ModuleNotFoundError" in said[0]
    assert "pip install 'vlft[linear]'" in said[0]
    assert fla == []


@pytest.mark.parametrize(
    ("device", "dtype", "why"), [(CPU, BF16, "needs a CUDA device"), (CUDA, FLOAT32, "this run computes in float32")]
)
def test_without_a_gpu_or_16_bits_it_is_torch(fla, device, dtype, why):
    model, said = build(FAMILY, "full", flat=True), []
    assert linear_attention.install(model, "auto", dtype=dtype, device=device, say=said.append) == "torch"
    assert len(said) == (device is CUDA)  # on a CPU it is not expected
    with pytest.raises(ConfigError, match=why):
        linear_attention.install(model, "fla", dtype=dtype, device=device)


def test_the_flag_is_refused_for_a_base_without_such_layers(base):
    flags = ModelFlags(model_id=str(base), linear_attn="torch")
    with pytest.raises(ConfigError, match="--linear_attn torch has no effect: Qwen2-VL has no gated delta nets"):
        open_base(DataFlags(), flags, given=frozenset({"linear_attn"}))


# ---- a step on a GPU, on tensors without contents


def described(value):
    return value.dtype, tuple(value.shape), value.stride()


def recording(seen):
    def kernel(q, k, v, *, g, beta, **more):
        seen.append(tuple(map(described, (q, k, v, g, beta, more["cu_seqlens"], more["chunk_indices"]))))
        return standins.delta_rule(q, k, v, g=g, beta=beta, **more)

    return recurrent.kernel_rule(kernel)


def traced(rule, *, language, recompute=False):
    config = config_of(FAMILY)
    model = empty_model(config, FAMILY)
    segments.use_kernel(model, "language", "traced", standins.attend)
    forward.bind(model, PixelScale(mean=(0.0,) * 3, std=(1.0,) * 3))
    for layer in adapt.recurrent_layers(model):
        recurrent.bind(layer, rule)
    model = apply_towers(model, FAMILY, Towers(language=language), masters=False)
    checkpoint_activations(model, ("language",) if recompute else ())
    return model.train()


def language_step(model, lengths, *, stored=BF16):
    with tracing.without_contents(), torch.device("cuda"):
        tracing.fill(model, tracing.numbers_of(stored, BF16, deepspeed=False))
        _language_step(model, lengths)


def _language_step(model, lengths):
    tokens = sum(lengths)
    embeds = torch.zeros(tokens, adapt.sizes_of(model).text.width, dtype=BF16, requires_grad=True)
    with tracing.Watch(tracing.refuse_waits):
        with tracing.autocast("cuda", BF16):
            hidden = adapt.hidden_states(
                model,
                embeds,
                Features(embeds_NH=embeds[:0]),
                torch.zeros(0, dtype=torch.int64),
                position_ids=torch.zeros(4, 1, tokens, dtype=torch.int64),
                cu_seqlens=torch.zeros(len(lengths) + 1, dtype=torch.int32),
                lengths=lengths,
            )
        tracing.backward(hidden.float().sum())


@pytest.mark.parametrize(
    ("backend", "language", "recompute"),
    [("fla", "lora", True), ("fla", "full", False), ("torch", "full", True)],
)
def test_a_step_neither_waits_nor_mixes_devices(backend, language, recompute):
    seen = []
    rule = recording(seen) if backend == "fla" else recurrent.torch_rule
    model = traced(rule, language=language, recompute=recompute)
    language_step(model, (200, 7, 65))
    layers = len(adapt.recurrent_layers(model))
    assert len(seen) == (backend == "fla") * layers * (2 if recompute else 1)
    for name, weight in model.named_parameters():
        if weight.requires_grad and ".layers." in name:
            assert (weight.grad.dtype, weight.grad.device.type) == (FLOAT32, "cuda"), name


@pytest.mark.parametrize("stored", [BF16, FLOAT32], ids=str)
def test_the_self_test_feeds_a_kernel_as_a_step_does(stored):
    in_a_step, in_the_test = [], []
    language_step(traced(recording(in_a_step), language="full"), linear_attention.LENGTHS, stored=stored)

    def kernel(q, k, v, *, g, beta, **more):
        in_the_test.append(tuple(map(described, (q, k, v, g, beta, more["cu_seqlens"], more["chunk_indices"]))))
        return right(q, k, v, g=g, beta=beta, **more)

    assert difference_of(kernel) < linear_attention.TOLERANCE
    assert set(in_a_step) == set(in_the_test)


def test_the_stand_in_saves_what_fla_saves():
    """Read in fla-core 0.6.0: `ChunkGatedDeltaRuleFunction.forward`."""
    tokens, keys, values, width, saved = 130, 2, 4, 16, {}
    with tracing.without_contents(), torch.device("cuda"):
        q, k = (torch.zeros(tokens, keys, width, dtype=BF16, requires_grad=True) for _ in range(2))
        v = torch.zeros(tokens, values, width, dtype=BF16, requires_grad=True)
        g, beta = (torch.zeros(tokens, values, dtype=x, requires_grad=True) for x in (FLOAT32, BF16))
        rows = recurrent.Segments(lengths=(tokens,), device=q.device)

        def save(tensor):
            saved[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            out = recurrent.kernel_rule(standins.delta_rule)(q, k, v, g, beta, rows)
        tracing.backward(out.float().sum())
    per_token = 2 * keys * (width * 2 + 4) + values * (width * 2 + 4 + 2 + 64 * 2)
    assert sum(saved.values()) == tokens * per_token + 2 * 8 + 3 * 2 * 8
    assert [x.grad.dtype for x in (q, k, v, g, beta)] == [BF16, BF16, BF16, FLOAT32, BF16]
