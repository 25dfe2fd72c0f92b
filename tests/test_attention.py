"""The choice of an attention kernel: what passes the self-test, and what happens where one cannot run. No GPU."""

from __future__ import annotations

import pytest
import torch

from vlft.errors import ConfigError
from vlft.model import attention
from vlft.model.segments import Heads, attend_segments, run_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOWERS = {
    "language": Heads(heads=4, kv_heads=2, head_dim=16, causal=True, joined=False),
    "partial rotary": Heads(heads=4, kv_heads=2, head_dim=16, causal=True, joined=False, partial_rotary=True),
    "vision of 72": Heads(heads=2, kv_heads=2, head_dim=72, causal=False, joined=True),
    "vision": Heads(heads=2, kv_heads=2, head_dim=16, causal=False, joined=True),
}


def right(q, k, v, cu, longest, *, scale, causal):
    """A kernel that takes one 16-bit dtype and computes in it."""
    if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"only fp16 and bf16, not {q.dtype}, {k.dtype}, {v.dtype}")
    assert longest == int(cu.diff().max())
    return segments(q, k, v, cu.diff().tolist(), scale, causal)


def segments(q, k, v, lengths, scale, causal):
    q_1HTD, k_1GTD, v_1GTD = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attend_segments(q_1HTD, k_1GTD, v_1GTD, lengths, scale=scale, causal=causal)[0]


def mixes_samples(q, k, v, cu, longest, *, scale, causal):
    return segments(q, k, v, [len(q)], scale, causal)


def forgets_what_is_far(q, k, v, cu, longest, *, scale, causal):
    """Correct for segments of up to 128 tokens."""
    lengths = [part for length in cu.diff().tolist() for part in (min(length, 128), max(length - 128, 0)) if part]
    return segments(q, k, v, lengths, scale, causal)


def _dense(x):
    return torch.as_strided(x, x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1))


def takes_values_for_dense(q, k, v, cu, longest, *, scale, causal):
    return right(q, k, _dense(v), cu, longest, scale=scale, causal=causal)


def takes_queries_for_dense(q, k, v, cu, longest, *, scale, causal):
    return right(_dense(q), k, v, cu, longest, scale=scale, causal=causal)


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def nan_gradient(*args, **kwargs):
    return NanGradient.apply(right(*args, **kwargs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_right_kernel_passes_its_self_test(tower, dtype):
    worst = attention.self_test(right, TOWERS[tower], dtype=dtype, device=CPU)
    assert 1e-4 < worst < attention.TOLERANCE  # a smaller difference would mean that it does not run in 16 bits


@pytest.mark.parametrize("kernel", [mixes_samples, forgets_what_is_far, nan_gradient])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_wrong_one_does_not(tower, kernel):
    assert not attention.self_test(kernel, TOWERS[tower], dtype=torch.bfloat16, device=CPU) < attention.TOLERANCE


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [(takes_values_for_dense, {"vision", "vision of 72"}), (takes_queries_for_dense, {"partial rotary"})],
)
def test_nor_does_one_that_takes_for_dense_what_is_not(kernel, wrong):
    """The ViT's value is a slice of one projection; a partial rotary embedding stores queries head after head."""
    worst = {t: attention.self_test(kernel, TOWERS[t], dtype=torch.bfloat16, device=CPU) for t in TOWERS}
    assert {tower for tower, found in worst.items() if not found < attention.TOLERANCE} == wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_kernel_gets_one_dtype_whatever_the_rotary_embedding_returns(dtype):
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)
    v = torch.randn(1, 2, 40, 16).to(dtype)
    cu = torch.tensor([0, 30, 40], dtype=torch.int32)
    out = run_kernel(right, q, k, v, cu, 30, scale=0.25, causal=True)
    exact = attend_segments(q, k, v.float(), (30, 10), scale=0.25, causal=True)
    assert out.dtype == dtype
    assert (out - exact).abs().max() < 0.02 * exact.abs().max()


class CompilerError(Exception):
    """An exception class like those of kernels' own compilers."""


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("only SM90 and SM100"),
        AssertionError(),
        CompilerError("ptxas failed\nwith a long log"),
        ImportError("No module named 'flash_attn'"),
        OSError("libcudart.so.12: cannot open shared object file"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_kernel_that_cannot_run_is_passed_over_or_refused_by_name(monkeypatch, error):
    def self_test(kernel, *args, **kwargs):
        if kernel == "varlen":
            return 0.001
        raise error

    monkeypatch.setattr(attention, "_load_kernel", lambda backend: backend)
    monkeypatch.setattr(attention, "self_test", self_test)
    where = {"device": CUDA, "dtype": torch.bfloat16}
    said = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    backend, remarks = attention.choose_backend("auto", TOWERS["language"], **where)
    assert (backend, remarks) == ("varlen", [f"fa4: {said}", f"flash_attn: {said}"])
    with pytest.raises(ConfigError) as refused:
        attention.choose_backend("fa4", TOWERS["language"], **where)
    assert str(refused.value).startswith(f"--attn fa4: {said}. To get it: pip install flash-attn-4.")


@pytest.mark.parametrize(
    ("device", "dtype", "why"),
    [(CPU, torch.bfloat16, "needs a CUDA device, this is cpu"), (CUDA, torch.float32, "this run computes in float32")],
)
def test_without_a_gpu_or_16_bits_it_is_sdpa(device, dtype, why):
    backend, remarks = attention.choose_backend("auto", TOWERS["vision"], device=device, dtype=dtype)
    assert backend == "sdpa"
    assert len(remarks) == 1
    assert remarks[0].startswith("fa4, flash_attn, varlen: ")
    assert why in remarks[0]
    with pytest.raises(ConfigError, match=why):
        attention.choose_backend("varlen", TOWERS["vision"], device=device, dtype=dtype)


def test_torchs_varlen_runs_flash_and_leaves_other_attention_as_it_was(monkeypatch):
    """torch 2.15 would choose cuDNN on Hopper, which builds a plan for each new set of lengths."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    seen = []

    def varlen_attn(q, *args, **kwargs):
        seen.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        return q

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    q = torch.zeros(4, 2, 8)
    attention._load_kernel("varlen")(q, q, q, torch.tensor([0, 4]), 4, scale=1.0, causal=True)
    assert seen == [(True, False)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
