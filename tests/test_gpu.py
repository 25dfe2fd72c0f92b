"""What only a CUDA device can show: every attention kernel, bf16 against float32, no waiting on the device.

Run: pytest -m gpu
"""

from __future__ import annotations

import pytest
import torch
from test_forward import build, flat_inputs, gradients

from vlft.model import attention, kernels

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
