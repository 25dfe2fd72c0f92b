"""Liger's fused kernels on one model: RMSNorm and SwiGLU of the language model, where they prove equal to its modules.

Only Liger's functions are used. Its `apply_*` patch classes, so every other model of the process too, and fail on
transformers 5.23 (liger-kernel 0.8.5). Rotary embedding stays as it is: transformers calls it as a function of the
module, which has no instance to change. So does the ViT's LayerNorm: torch's is one kernel already.
"""

from __future__ import annotations

import copy
import functools
import subprocess
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlft.errors import ConfigError
from vlft.model import adapt

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
        model: a loaded base (the top class), not yet wrapped by PEFT.
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
    device = device or next(model.parameters()).device
    problem = "" if functions else _problem(device)
    if not problem:
        try:
            functions = functions or liger_functions()
            problem = _differs(functions, model, dtype, device)
        except _failures() as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
    if problem or functions is None:
        if choice == "true":
            raise _refusal(problem)
        return f"off ({problem})"
    return fuse(model, functions)


def fuse(model: torch.nn.Module, functions: Functions) -> str:
    """Use functions in the language model, without asking whether they are right; says where."""
    norms, mlps = adapt.fused_norms(model), adapt.fused_mlps(model)
    for norm in norms:
        fuse_rms_norm(norm, functions.rms_norm)
    for mlp in mlps:
        fuse_swiglu(mlp, functions.swiglu)
    return f"RMSNorm on {len(norms)} modules, SwiGLU on {len(mlps)}"


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
    functions: Functions,
    norms: Iterable[torch.nn.Module],
    mlps: Iterable[torch.nn.Module],
    *,
    dtype: torch.dtype,
    device: Any,
) -> dict[str, float]:
    """Kernel -> largest difference to the modules it replaces, as a share of its row's largest value.

    Over all rows of the result and of the gradient of every input. A module that merely has the right attributes and
    computes something else (an RMSNorm that weighs by 1 + w) differs.

    Args:
        norms, mlps: modules of a model, on any device; those of one kind and size are tried once. Their own forward is
            run in float32, on random weights and inputs, and so is the kernel in `dtype`.
        dtype, device: of the kernel's inputs.
    """  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    worst: dict[str, float] = {}
    for norm in _kinds(norms):
        width = norm.get_parameter("weight").shape[0]
        # An RMSNorm must be as exact on large activations as on small ones, and its weights lie around 1.
        x_RC = draw(ROWS, width) * torch.logspace(-1, 2, ROWS, device=device)[:, None].to(dtype)
        fuse = functools.partial(fuse_rms_norm, function=functions.rms_norm)
        found = _difference(norm, fuse, (x_RC, 1 + 0.3 * draw(width)), draw(ROWS, width), _with_weight)
        worst["RMSNorm"] = _larger(worst.get("RMSNorm"), found)
    for mlp in _kinds(mlps):
        inner = mlp.get_parameter("gate_proj.weight").shape[0]
        fuse = functools.partial(fuse_swiglu, function=functions.swiglu)
        inputs = (draw(ROWS, inner), draw(ROWS, inner))
        found = _difference(mlp, fuse, inputs, draw(ROWS, inner), _without_linears)
        worst["SwiGLU"] = _larger(worst.get("SwiGLU"), found)
    return worst


def _kinds(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """One module of each class, size and setting."""
    found: dict[Any, torch.nn.Module] = {}
    for module in modules:
        sizes = tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters())
        settings = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, int | float | str))
        found.setdefault((type(module), sizes, settings, repr(getattr(module, "act_fn", None))), module)
    return list(found.values())


def _difference(
    module: torch.nn.Module,
    fuse: Callable[[torch.nn.Module], None],
    inputs: tuple[torch.Tensor, ...],
    upstream: torch.Tensor,
    call: Callable[..., torch.Tensor],
) -> float:
    """The largest difference of a fused copy of a module to the module's own forward in float32.

    Args:
        call: (copy of the module, its own or the fused forward) and the inputs -> the result.
    """
    results = []
    for exact in (False, True):
        copy_ = _shallow(module)
        if not exact:
            fuse(copy_)
        leaves = [(x.float() if exact else x.clone()).detach().requires_grad_() for x in inputs]
        forward = functools.partial(type(module).forward, copy_) if exact else copy_.forward
        result = call(copy_, forward, *leaves)
        # Of the result before the backward pass, which may write over it.
        kept, gradient = result.detach().clone(), upstream.to(result.dtype, copy=True)
        results.append([kept, *torch.autograd.grad(result, leaves, gradient)])
    shares = [
        (found.float() - wanted).abs().amax(-1) / wanted.abs().amax(-1) for found, wanted in zip(*results, strict=True)
    ]
    return float(torch.cat([share.flatten() for share in shares]).max())  # NaN where any is


def _shallow(module: torch.nn.Module) -> Any:
    """A copy of a module whose parameters and children can be exchanged."""
    twin: Any = copy.copy(module)
    twin.__dict__ = {
        **{name: value for name, value in vars(module).items() if name != "forward"},
        "_parameters": dict(module._parameters),
        "_modules": dict(module._modules),
    }
    return twin


def _with_weight(norm: Any, forward: Callable, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The result of a norm on a weight of ours, which may be a leaf of a graph."""
    norm._parameters = {"weight": weight}
    return forward(x)


class _Share(torch.nn.Module):
    """In place of a linear layer: one of the halves of its input. A kernel's work lies between linear layers, and those
    of a large model would take hundreds of megabytes."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.chunk(2, dim=-1)[self.place]


def _without_linears(mlp: Any, forward: Callable, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """The result of a gated MLP between its linear layers."""
    mlp._modules |= {"gate_proj": _Share(0), "up_proj": _Share(1), "down_proj": torch.nn.Identity()}
    return forward(torch.cat([gate, up], dim=-1))


def _larger(one: float | None, other: float) -> float:
    """The larger of two, NaN where one is: Python's max passes over a NaN that is not its first argument."""
    return other if one is None or other > one or other != other else one


def _differs(functions: Functions, model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    """What fails the self-test on a model's modules, in its computing dtype and in float32 (full training's norms)."""
    norms, mlps = adapt.fused_norms(model), adapt.fused_mlps(model)
    if not norms or not mlps:
        return "the language model has no RMSNorm or gated MLP for them"
    for kind in dict.fromkeys((dtype, torch.float32)):
        for name, worst in self_test(functions, norms, mlps, dtype=kind, device=device).items():
            if not worst < TOLERANCE[kind]:  # also where it is NaN
                return (
                    f"the self-test of {name} in {kind} differs from the model's own by {worst:.3g} of a row's largest "
                    f"value (allowed: {TOLERANCE[kind]:g})"
                ).replace("torch.", "")
    return ""
