"""Liger's fused kernels on one model: RMSNorm and SwiGLU of the language model, where they prove equal to torch.

Only Liger's functions are used. Its `apply_*` patch classes, so every other model of the process too, and fail on
transformers 5.23 (liger-kernel 0.8.5). Rotary embedding stays as it is: transformers calls it as a function of the
module, which has no instance to change. So does the ViT's LayerNorm: torch's is one kernel already.
"""

from __future__ import annotations

import subprocess
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F

from vlft.errors import ConfigError

Choice = Literal["auto", "true", "false"]
Function = Callable[..., torch.Tensor]

INSTALL = "pip install 'liger-kernel>=0.8.5'"
#: Largest difference allowed in the self-test, as a share of its row's largest value. A kernel rounds to 16 bits at
#: most three times between its inputs and its result, by 2**-9 each in bf16. In float32 sums run in another order, and
#: a GPU's quick exp is off in the last places.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.01, torch.float16: 0.01}
ROWS = 67  # of the self-test: no power of two


@dataclass(frozen=True, kw_only=True)
class Functions:
    """What is fused. `rms_norm(x, weight, eps)` and `swiglu(gate, up)`, x, gate and up [..., C]."""

    rms_norm: Function
    swiglu: Function


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As Qwen2-VL does it: normalised in float32, weighted in x's dtype."""
    exact = x.float()
    return weight * (exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def torch_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


#: What Liger's functions must equal.
TORCH = Functions(rms_norm=torch_rms_norm, swiglu=torch_swiglu)


def liger_functions() -> Functions:
    """Liger's functions.

    Raises:
        ImportError: the package is not installed, or another version without them.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rms_norm(x, weight, eps):
        # Not in place: that would overwrite the gradient it is handed, which others may still read.
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)

    return Functions(rms_norm=rms_norm, swiglu=LigerSiLUMulFunction.apply)


def check(choice: Choice, device: torch.device) -> None:
    """Refuse `--use_liger_kernel true` where it is plain that it cannot be; asked before anything is loaded.

    Raises:
        ConfigError: says why, and what to do.
    """
    problem = _problem(device) if choice == "true" else ""
    if problem:
        raise _refusal(problem)


def install(
    model: torch.nn.Module,
    choice: Choice,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    functions: Functions | None = None,
) -> str:
    """Use the kernels in a loaded model, if they may be and pass their self-test on its device.

    Args:
        model: a loaded Qwen2-VL (the top class), not yet wrapped by PEFT.
        choice: `--use_liger_kernel`.
        dtype: of the computation (bf16 under autocast).
        device: of the computation, where the model is not on it yet.
        functions: instead of Liger's and on any device (tests).

    Returns:
        what is active on how many modules, or "off" and why.

    Raises:
        ConfigError: choice is "true" and they cannot be used.
    """
    if choice == "false":
        return "off"
    live: Any = model
    text = live.config.text_config
    device = device or next(model.parameters()).device
    problem = "" if functions else _problem(device)
    if not problem and text.hidden_act != "silu":
        problem = f"the language model's activation is {text.hidden_act}, not silu"
    if not problem:
        try:
            functions = functions or liger_functions()
            problem = _differs(functions, text, dtype, device)
        except _failures() as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem or functions is None:
        if choice == "true":
            raise _refusal(problem)
        return f"off ({problem})"
    return fuse(model, functions)


def fuse(model: torch.nn.Module, functions: Functions) -> str:
    """Use functions in the language model, without asking whether they are right; says where."""
    live: Any = model
    language = live.model.language_model
    norms = [norm for layer in language.layers for norm in (layer.input_layernorm, layer.post_attention_layernorm)]
    norms.append(language.norm)
    for norm in norms:
        fuse_rms_norm(norm, functions.rms_norm)
    for layer in language.layers:
        fuse_swiglu(layer.mlp, functions.swiglu)
    return f"RMSNorm on {len(norms)} modules, SwiGLU on {len(language.layers)}"


def _problem(device: torch.device) -> str:
    """Why Liger cannot run on a device, or nothing."""
    if device.type != "cuda":
        return "needs CUDA"
    try:
        liger_functions()
    except ImportError as error:
        return str(error)
    return ""


def _failures() -> tuple[type[Exception], ...]:
    """What a kernel that does not compile or run here raises."""
    plain = (ImportError, RuntimeError, TypeError, ValueError, AttributeError, OSError, subprocess.SubprocessError)
    try:
        from triton import TritonError
    except ImportError:
        return plain
    return (*plain, TritonError)


def _refusal(problem: str) -> ConfigError:
    return ConfigError(
        f"--use_liger_kernel true: {problem}. To get the kernels: {INSTALL}, on a machine with a CUDA device. Or use "
        "--use_liger_kernel auto, which takes them where they work."
    )


def fuse_rms_norm(norm: torch.nn.Module, function: Function) -> None:
    """Let one RMSNorm (with `weight` and `variance_epsilon`) compute by a function."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != self.weight.dtype:  # torch then answers in the wider dtype, a kernel in the input's
            return type(self).forward(self, hidden_states)
        return function(hidden_states, self.weight, self.variance_epsilon)

    norm.forward = types.MethodType(forward, norm)


def fuse_swiglu(mlp: torch.nn.Module, function: Function) -> None:
    """Let one gated MLP multiply by a function; its linears are called as they are, with LoRA or without."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(function(self.gate_proj(x), self.up_proj(x)))

    mlp.forward = types.MethodType(forward, mlp)


def self_test(
    functions: Functions, *, width: int, inner: int, eps: float, dtype: torch.dtype, device: Any
) -> dict[str, float]:
    """Kernel -> largest difference to torch in float32 on the same inputs, as a share of its row's largest value.

    Over all rows of the result and of the gradient of every input.

    Args:
        width, inner: channels of the norm and of the MLP. eps: of the norm.
        dtype, device: of the inputs.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    # An RMSNorm must be as exact on large activations as on small ones, and its weights lie around 1.
    x_RC = draw(ROWS, width) * torch.logspace(-1, 2, ROWS, device=device)[:, None].to(dtype)
    cases = {
        "RMSNorm": (functions.rms_norm, TORCH.rms_norm, (x_RC, 1 + 0.3 * draw(width)), (eps,), draw(ROWS, width)),
        "SwiGLU": (functions.swiglu, TORCH.swiglu, (draw(ROWS, inner), draw(ROWS, inner)), (), draw(ROWS, inner)),
    }
    worst = {}
    for name, (ours, theirs, inputs, rest, upstream) in cases.items():
        found = _results(ours, inputs, rest, upstream)
        exact = _results(theirs, [x.float() for x in inputs], rest, upstream.float())
        shares = [(a.float() - b).abs().amax(-1) / b.abs().amax(-1) for a, b in zip(found, exact, strict=True)]
        worst[name] = float(torch.cat([share.flatten() for share in shares]).max())  # NaN where any is
    return worst


def _results(function: Function, inputs: Any, rest: tuple[Any, ...], upstream: torch.Tensor) -> list[torch.Tensor]:
    """A function's result, and the gradient of each input."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = function(*leaves, *rest)
    kept = result.detach().clone()
    return [kept, *torch.autograd.grad(result, leaves, upstream.clone())]


def _differs(functions: Functions, text: Any, dtype: torch.dtype, device: torch.device) -> str:
    """What fails the self-test at a model's sizes, in its computing dtype and in float32 (full training's norms)."""
    for kind in dict.fromkeys((dtype, torch.float32)):
        found = self_test(
            functions, width=text.hidden_size, inner=text.intermediate_size, eps=text.rms_norm_eps,
            dtype=kind, device=device,
        )  # fmt: skip
        for name, worst in found.items():
            if not worst < TOLERANCE[kind]:  # also where it is NaN
                return (
                    f"the self-test of {name} in {kind} differs from torch by {worst:.3g} of a row's largest value "
                    f"(allowed: {TOLERANCE[kind]:g})"
                ).replace("torch.", "")
    return ""
