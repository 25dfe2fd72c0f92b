"""Run by `test_kernels.py` with TRITON_INTERPRET=1: our Triton kernels against torch, on a CPU.

Sizes are odd, inputs are strided views as a model has them, in float32, bf16 and mixed. It imports torch and triton,
and nothing larger.
"""

from __future__ import annotations

import itertools

import torch
import torch_kernels

from vlft.model import fused, triton_activations, triton_kernels

FLOAT32, BF16 = torch.float32, torch.bfloat16
OURS, THEIRS = fused.functions(fused.triton_operations()), torch_kernels.TORCH
ROWS = 3


def draw(*size, dtype=FLOAT32):
    return torch.randn(size).to(dtype)


def compare(what, call, leaves, name) -> None:
    """Results and gradients of one function by both, each as a share of the largest value."""
    found = []
    for functions in (OURS, THEIRS):
        mine = [x.detach().clone().requires_grad_() for x in leaves]
        results = call(getattr(functions, name), *mine)
        results = results if isinstance(results, tuple) else (results,)
        kept = [x.detach().clone() for x in results]
        torch.manual_seed(1)
        slopes = [draw(*x.shape, dtype=x.dtype) for x in results]
        found.append([*kept, *torch.autograd.grad(results, mine, slopes)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.shape == theirs.shape
        # Both round once, so in 16 bits they differ by one unit in the last place at most.
        allowed = 2e-6 if ours.dtype == FLOAT32 else 2**-7
        error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert error < allowed, (what, float(error))


def norms() -> None:
    dtypes = ((FLOAT32,) * 3, (FLOAT32, FLOAT32, BF16), (BF16, FLOAT32, BF16))
    for channels, (given, weights, wanted) in zip((80, 300, 72), dtypes, strict=True):
        x, weight, bias = draw(ROWS, 2, channels + 4, dtype=given), draw(channels, dtype=weights), draw(channels)
        what = f"norm {channels} {given} {weights} {wanted}"

        def layer(function, x, weight, bias, channels=channels, wanted=wanted):
            return function(x[..., 4:], weight, bias, 1e-6, wanted)

        compare(what, layer, (x, weight, bias.to(weights)), "layer_norm")
        for offset in (0.0, 1.0):

            def rms(function, x, weight, offset=offset, wanted=wanted):
                return function(x[..., 4:], weight, 1e-6, offset, wanted)

            compare(what, rms, (x, weight), "rms_norm")
    frozen = draw(80)
    compare("frozen weight", lambda function, x: function(x, frozen, 1e-6, 0.0, BF16), (draw(3, 80),), "rms_norm")


def rotary() -> None:
    for heads, keys, channels, turned in ((3, 1, 80, 80), (4, 2, 64, 16), (2, 2, 72, 72)):
        cos, sin = draw(1, ROWS, turned), draw(1, ROWS, turned)  # their halves differ, unlike in a model
        for given, wanted in ((FLOAT32, FLOAT32), (BF16, BF16), (FLOAT32, BF16)):
            leaves = [draw(1, ROWS, n, 2 * channels, dtype=given) for n in (heads, keys)]

            def turn(function, q, k, cos=cos, sin=sin, channels=channels, wanted=wanted):
                return function(*(x[..., :channels].transpose(1, 2) for x in (q, k)), cos, sin, wanted)

            compare(f"rotary {channels} {given} {wanted}", turn, leaves, "rotary")
    for heads, channels, dtype in ((3, 80, FLOAT32), (2, 72, BF16)):
        cos, sin = draw(ROWS, channels), draw(ROWS, channels)

        def join(function, x, cos=cos, sin=sin, heads=heads):
            return function(x * 1, cos, sin, heads)

        compare(f"joined {channels}", join, (draw(ROWS, 3 * heads * channels, dtype=dtype),), "joined_rotary")


def activations() -> None:
    for dtype, channels in itertools.product((FLOAT32, BF16), (96, 2500)):
        compare("quick GELU", lambda f, x: f(x[..., :-4]), (4 * draw(2, 2, channels, dtype=dtype),), "quick_gelu")
        two = [draw(2, channels, dtype=dtype) for _ in range(2)]
        compare("SwiGLU", lambda f, gate, up: f(gate[:, 4:], up[:, :-4]), two, "swiglu")


def delta_nets() -> None:
    for given, weights in ((FLOAT32, FLOAT32), (BF16, FLOAT32)):
        x, gate, weight = draw(3, 2, 80, dtype=given), draw(3, 2, 96, dtype=given), draw(80, dtype=weights)

        def norm(function, x, weight, gate, given=given):
            return function(x, weight, gate[..., 8:88], 1e-6, given)

        compare(f"gated norm {given}", norm, (x, weight, gate), "gated_norm")
        lengths = (18, 1, 2)  # longer than a tile
        within = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])

        def mix(function, x, weight, within=within):
            return function(x, weight, within)

        leaves = (draw(len(within), 130, dtype=given), draw(130, 1, 4, dtype=weights))
        compare(f"convolution {given}", mix, leaves, "convolution")


def nothing() -> None:
    """No rows at all, as in a batch without pictures."""
    none, weight = draw(0, 8), draw(8)
    y, mean, scale = triton_kernels.norm(none, weight, weight, None, eps=1e-6, offset=0.0, dtype=BF16)
    assert y.shape == (0, 8)
    options = {"offset": 0.0, "centred": True, "for_weight": True}
    dx, dweight, dbias, _ = triton_kernels.norm_backward(y, none, weight, None, mean, scale, **options)
    assert dx.shape == (0, 8)
    assert not dweight.any()
    assert not dbias.any()
    assert triton_activations.quick_gelu(none).shape == (0, 8)
    triton_kernels.rotate((draw(0, 2, 8),) * 2, none, none, (draw(0, 2, 8),) * 2)


if __name__ == "__main__":
    torch.manual_seed(0)
    for test in (norms, rotary, activations, delta_nets, nothing):
        test()
