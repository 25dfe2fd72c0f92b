"""What only a CUDA device can show: every attention kernel, bf16 against float32, no waiting on the device.

Run: pytest -m gpu
"""

from __future__ import annotations

import pytest
import torch
from test_forward import build, flat_inputs, gradients

from vlft.model import attention, kernels, loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


def on_device(inputs: dict) -> dict:
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@pytest.mark.parametrize("shape", [(12, 2, 128, True), (28, 4, 128, True), (16, 16, 80, False)])
@pytest.mark.parametrize("backend", ["fa4", "flash_attn", "varlen"])
def test_kernels_pass_their_self_test_at_the_published_shapes(backend, shape):
    heads, kv_heads, head_dim, causal = shape
    try:
        kernel = attention._load_kernel(backend)
    except ImportError as error:
        pytest.skip(str(error))
    device = torch.device("cuda")
    worst = attention.self_test(kernel, heads=heads, kv_heads=kv_heads, head_dim=head_dim, causal=causal, device=device)
    assert worst < 0.03


def test_bf16_on_the_device_is_near_float32_on_the_host(base, encoded):
    rows = list(encoded.values())
    host = build(base, "full", flat=True)
    host(**flat_inputs(rows)).loss.backward()
    device = build(base, "full", flat=True).cuda()
    backends = attention.install(device, "auto", dtype=torch.bfloat16)
    with torch.autocast("cuda", torch.bfloat16):
        loss = device(**on_device(flat_inputs(rows))).loss
    loss.backward()
    print(backends)
    theirs, mine = gradients(host), gradients(device)
    for name, gradient in theirs.items():
        error = (mine[name].cpu() - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 0.1, (name, float(error))


def test_a_step_does_not_wait_for_the_device(base, encoded):
    rows = list(encoded.values())
    model = build(base, "full", flat=True).cuda()
    attention.install(model, "auto", dtype=torch.bfloat16)
    inputs = on_device(flat_inputs(rows))
    for mode in ("default", "error"):  # the first step compiles and tunes; the second must not read anything back
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = model(**inputs).loss
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", list(kernels.TOLERANCE), ids=str)
@pytest.mark.parametrize(("width", "inner"), [(1536, 8960), (3584, 18944)], ids=["2b", "7b"])
def test_liger_kernels_equal_torch_at_the_published_sizes(width, inner, dtype):
    functions, device = kernels.liger_functions(), torch.device("cuda")
    found = kernels.self_test(functions, width=width, inner=inner, eps=1e-6, dtype=dtype, device=device)
    print(dtype, found)
    assert max(found.values()) < kernels.TOLERANCE[dtype]


def test_liger_kernels_in_a_model_are_near_torch(base, encoded):
    inputs = on_device(flat_inputs(list(encoded.values())))
    results = []
    for choice in ("false", "true"):
        model = build(base, "full", flat=True).cuda()
        attention.install(model, "auto", dtype=torch.bfloat16)
        line = kernels.install(model, choice, dtype=torch.bfloat16)
        assert line == ("off" if choice == "false" else "RMSNorm on 5 modules, SwiGLU on 2")
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**inputs).loss
        loss.backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        error = (results[1][name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 0.1, (name, float(error))


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_heads_loss_at_the_size_of_the_2b_holds_one_chunk(trained):
    """2,048 supervised rows under bf16 autocast: value and gradient of plain cross-entropy, at a chunk's memory."""
    words, channels, count = 151_936, 1536, 2048
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, channels, device="cuda", generator=generator) for n in (count, words))
    hidden, weight = (hidden.bfloat16().requires_grad_(), (0.02 * weight).requires_grad_(trained))
    weight = weight if trained else weight.bfloat16()
    targets = torch.randint(words, (count,), device="cuda", generator=generator)
    results = []
    for chunked in (True, False):
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            if chunked:
                value = loss.linear_cross_entropy(hidden, weight, targets)
            else:
                logits = torch.nn.functional.linear(hidden, weight).float()
                value = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        (value / count).backward()
        results.append((value.detach(), hidden.grad, weight.grad, torch.cuda.max_memory_allocated() - before))
    print("peak bytes:", [result[-1] for result in results])
    (ours, *mine, peak), (exact, *theirs, _) = results
    assert abs(ours / exact - 1) < 1e-5
    for gradient, stock in list(zip(mine, theirs, strict=True))[: 1 + trained]:
        assert (gradient - stock).norm() < 0.01 * stock.norm()
    # bf16 logits and slopes, float32 softmax, a slice of the weight's gradient; trained: its gradient, its bf16 copy.
    assert peak < 12 * loss.CHUNK_ELEMENTS + (8 * words * channels if trained else 0)
