"""Choose who computes the delta rule of gated delta nets: flash-linear-attention if it passes a self-test, else torch.

`vlft.model.recurrent` has the layer. Letters are explained there.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal

import torch

from vlft.errors import ConfigError
from vlft.families.sizes import Recurrent
from vlft.model import adapt, recurrent

Backend = Literal["fla", "torch"]
Choice = Literal["auto"] | Backend

INSTALL = "pip install 'vlft[linear]'"
#: Tokens of the self-test's segments: a few chunks, less than one, and one token more than a chunk.
LENGTHS = (200, 7, 161, 65)
#: Largest difference allowed in the self-test, as a share of its segment's largest value. With every intermediate
#: result rounded to bf16, as the kernels round theirs, it is up to 0.02. A kernel that mixes samples differs by more
#: than 0.1.
TOLERANCE = 0.05


def _load_kernel() -> Callable[..., Any]:
    """flash-linear-attention's function.

    Raises:
        ImportError: the package, or Triton, is not installed.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    return chunk_gated_delta_rule


def self_test(rule: recurrent.Rule, sizes: Recurrent, *, dtype: torch.dtype, device: torch.device) -> float:
    """Largest difference, forward and gradient, between a delta rule in 16 bits and torch's in float32.

    The rule gets the same inputs as in a layer, through `vlft.model.recurrent.mix`. Segments differ in length and some
    heads hardly forget, so a rule that mixes samples cannot pass.

    Args:
        rule: the rule to test.
        sizes: of a layer.
        dtype: the dtype that the run computes in, bfloat16 or float16.
        device: where the rule runs.

    Returns:
        the difference as a share of its segment's largest value; NaN if any value is NaN.
    """
    generator = torch.Generator().manual_seed(0)
    tokens, channels = sum(LENGTHS), 2 * sizes.keys + sizes.values

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    drawn = draw(tokens, channels), draw(tokens, sizes.value_heads), draw(tokens, sizes.value_heads)
    taps, upstream = draw(channels, 1, sizes.taps) / 2, draw(tokens, sizes.value_heads, sizes.value_dim)
    layer = SimpleNamespace(
        key_dim=sizes.keys,
        value_dim=sizes.values,
        head_k_dim=sizes.key_dim,
        head_v_dim=sizes.value_dim,
        A_log=torch.logspace(-3, 0.5, sizes.value_heads, device=device).log(),
        dt_bias=torch.ones(sizes.value_heads, device=device),
        conv1d=SimpleNamespace(weight=taps),
    )
    segments = recurrent.Segments(lengths=LENGTHS, device=device)
    results = []
    for exact in (False, True):
        leaves = [(x.float() if exact else x.clone()).requires_grad_() for x in drawn]
        projected, b, a = leaves
        out = recurrent.mix(layer, projected, b, a, recurrent.torch_rule if exact else rule, segments)
        gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
        results.append([x.detach().float().flatten(1) for x in (out, *gradients)])
    shares = [
        (a - b).abs().max() / b.abs().max()
        for found, wanted in zip(*results, strict=True)
        for a, b in zip(found.split(LENGTHS), wanted.split(LENGTHS), strict=True)
    ]
    return float(torch.stack(shares).max())  # not Python's max, which ignores a NaN that is not its first argument


def choose_rule(
    choice: Choice, sizes: Recurrent, *, device: torch.device, dtype: torch.dtype
) -> tuple[Backend, recurrent.Rule, str]:
    """The delta rule for layers of one size, and why not flash-linear-attention's.

    Args:
        choice: `--linear_attn`.
        sizes: of the layers.
        device: where they compute; the package needs CUDA.
        dtype: what they compute in; the package needs 16 bits.

    Returns:
        the name, the rule, and a remark if flash-linear-attention was rejected, else "".

    Raises:
        ConfigError: choice is "fla" and it cannot be used; the message says why and how to get it.
    """
    if choice == "torch":
        return "torch", recurrent.torch_rule, ""
    rule, problem = _tested(sizes, device=device, dtype=dtype)
    if rule is not None:
        return "fla", rule, ""
    if choice == "fla":
        raise ConfigError(
            f"--linear_attn fla: {problem}. To get it: {INSTALL}. Or use --linear_attn auto, which uses it where it "
            "works, and plain torch elsewhere."
        )
    return "torch", recurrent.torch_rule, f"fla: {problem}. Plain torch is exact, but slower. To get fla: {INSTALL}"


def _tested(sizes: Recurrent, *, device: torch.device, dtype: torch.dtype) -> tuple[recurrent.Rule | None, str]:
    """flash-linear-attention's rule; or None, and why it cannot be used."""
    if device.type != "cuda":
        return None, f"needs a CUDA device, this is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return None, f"needs bf16 or fp16, this run computes in {dtype}".replace("torch.", "")
    try:
        rule = recurrent.kernel_rule(_load_kernel())
        worst = self_test(rule, sizes, dtype=dtype, device=device)
    except Exception as error:  # noqa: BLE001 - kernels refuse by assert, and their compilers raise their own classes
        return None, f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    if worst < TOLERANCE:
        return rule, ""
    return None, f"its self-test differs from torch by {worst:.3g} of the largest value (allowed: {TOLERANCE:g})"


def install(
    model: torch.nn.Module,
    choice: Choice,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Backend | None:
    """Choose the delta rule and make the model use it.

    Args:
        model: a loaded base (the top class) with the flat forward bound.
        choice: `--linear_attn`.
        dtype: what the run computes in (bf16 under autocast).
        device: where the run computes, if the model is not there yet.
        say: called on a GPU with a line if flash-linear-attention was rejected, and why.

    Returns:
        what computes it; None: the model has no gated delta nets.

    Raises:
        ConfigError: the rule requested by name cannot be used.
    """
    sizes = next((layer.recurrent for layer in adapt.sizes_of(model).text.layers if layer.recurrent), None)
    if sizes is None:
        return None
    device = device or next(model.parameters()).device
    backend, rule, remark = choose_rule(choice, sizes, device=device, dtype=dtype)
    if remark and device.type == "cuda":
        say(f"gated delta nets: not {remark}")
    for layer in adapt.recurrent_layers(model):
        recurrent.bind(layer, rule)
    return backend
