"""Liger's fused kernels in one model: RMSNorm and SwiGLU of the language model, if a self-test finds them equal.

Experts are not fused: transformers computes them in one call for all experts (`vlft.families` says which MLPs are).

Only Liger's functions are used. Its `apply_*` functions patch classes, so they would change every other model of
the process, and they fail on transformers 5.23 (liger-kernel 0.8.5). Rotary embedding is not replaced: transformers
calls it as a function of the Python module, so there is no instance to change. Nor is the ViT's LayerNorm: it is
already one kernel in torch.
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
from vlft.families import Norm
from vlft.model import adapt

Choice = Literal["auto", "true", "false"]
Function = Callable[..., torch.Tensor]

INSTALL = "pip install 'liger-kernel>=0.8.5'"
#: Largest difference allowed in the self-test, as a share of its row's largest value. A kernel rounds to 16 bits at
#: most three times between its inputs and its result, by 2**-9 each in bf16. In float32 the order of sums differs, and
#: a GPU's fast exp differs in the last digits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.01, torch.float16: 0.01}
ROWS = 67  # rows in the self-test; not a power of two


@dataclass(frozen=True, kw_only=True)
class Functions:
    """The fused functions.

    Attributes:
        rms_norm: `rms_norm(x, weight, eps, offset)`, with x [..., C]; multiplies by offset + weight. With an offset the
            product is rounded to x's dtype, without one the normalised x, as transformers does it.
        swiglu: `swiglu(gate, up)`, with gate and up [..., C].
    """

    rms_norm: Function
    swiglu: Function


def liger_functions() -> Functions:
    """Import Liger's functions.

    Raises:
        ImportError: the package is not installed, or its version does not have them.
    """
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def rms_norm(x, weight, eps, offset):
        # Not in place: that would overwrite the incoming gradient, which other functions may still read.
        return LigerRMSNormFunction.apply(x, weight, eps, offset, "gemma" if offset else "llama", False)

    return Functions(rms_norm=rms_norm, swiglu=LigerSiLUMulFunction.apply)


def check(choice: Choice, device: torch.device) -> None:
    """Refuse `--use_liger_kernel true` early if the kernels cannot run on a device, before anything is loaded.

    Raises:
        ConfigError: the kernels cannot run; the message says why, and what to do.
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
    """Use the kernels in a loaded model, if the choice allows it and they pass their self-test on its device.

    Args:
        model: a loaded base (the top class), not yet wrapped by PEFT.
        choice: `--use_liger_kernel`.
        dtype: what the run computes in (bf16 under autocast).
        device: where the run computes, if the model is not there yet.
        functions: used instead of Liger's, on any device (for tests).

    Returns:
        which kernels are active on how many modules, or "off" and why.

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
    """Use fused functions in the language model, without a self-test.

    Returns:
        which kernels are active on how many modules.
    """
    norms, mlps = adapt.fused_norms(model), adapt.fused_mlps(model)
    for norm in norms:
        fuse_rms_norm(norm, functions.rms_norm, adapt.family_of(model).norm)
    for mlp in mlps:
        fuse_swiglu(mlp, functions.swiglu)
    return f"RMSNorm on {len(norms)} modules" + (f", SwiGLU on {len(mlps)}" if mlps else "")


def _problem(device: torch.device) -> str:
    """Why Liger cannot run on a device; empty if it can."""
    if device.type != "cuda":
        return "needs CUDA"
    try:
        liger_functions()
    except ImportError as error:
        return str(error)
    return ""


def _failures() -> tuple[type[Exception], ...]:
    """Exceptions of a kernel that does not compile or run here."""
    plain = (ImportError, RuntimeError, TypeError, ValueError, AttributeError, OSError, subprocess.SubprocessError)
    try:
        from triton import TritonError
    except ImportError:
        return plain
    return (*plain, TritonError)


def _refusal(problem: str) -> ConfigError:
    return ConfigError(
        f"--use_liger_kernel true: {problem}. To get the kernels: {INSTALL}, on a machine with a CUDA device. Or use "
        "--use_liger_kernel auto, which uses them where they work."
    )


def fuse_rms_norm(norm: torch.nn.Module, function: Function, factor: Norm = "w") -> None:
    """Make one RMSNorm compute with a function.

    Args:
        norm: with `weight`, and an attribute for epsilon that transformers spells differently for each factor.
        function: as in `Functions`.
        factor: what the norm multiplies by.
    """
    epsilon, offset = {"w": ("variance_epsilon", 0.0), "1 + w": ("eps", 1.0)}[factor]

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype != self.weight.dtype:  # torch returns the wider dtype, a kernel that of its input
            return type(self).forward(self, hidden_states)
        return function(hidden_states, self.weight, getattr(self, epsilon), offset)

    norm.forward = types.MethodType(forward, norm)


def fuse_swiglu(mlp: torch.nn.Module, function: Function) -> None:
    """Make one gated MLP multiply with a function. Its linear layers do not change, with or without LoRA."""

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
    factor: Norm = "w",
) -> dict[str, float]:
    """Compare fused functions with the modules that they replace.

    The modules' own forward runs in float32 and the functions run in `dtype`, both on random weights and inputs. All
    rows of the result and of the gradient of every input are compared. This finds modules that have the right
    attributes and compute something else, such as an MLP that limits its gate.

    Args:
        functions: the functions to test.
        norms: RMSNorms of a model, on any device. One of each kind and size is tested.
        mlps: gated MLPs of a model, likewise.
        dtype: of the functions' inputs.
        device: of the functions' inputs.
        factor: what the norms multiply by.

    Returns:
        kernel -> largest difference, as a share of its row's largest value.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    worst: dict[str, float] = {}
    for norm in _kinds(norms):
        width = norm.get_parameter("weight").shape[0]
        # An RMSNorm must be as exact on large activations as on small ones. What it multiplies by is around 1.
        x_RC = draw(ROWS, width) * torch.logspace(-1, 2, ROWS, device=device)[:, None].to(dtype)
        fuse = functools.partial(fuse_rms_norm, function=functions.rms_norm, factor=factor)
        weight = 0.3 * draw(width) + (1 if factor == "w" else 0)
        found = _difference(norm, fuse, (x_RC, weight), draw(ROWS, width), _with_weight)
        worst["RMSNorm"] = _larger(worst.get("RMSNorm"), found)
    for mlp in _kinds(mlps):
        inner = mlp.get_parameter("gate_proj.weight").shape[0]
        fuse = functools.partial(fuse_swiglu, function=functions.swiglu)
        inputs = (draw(ROWS, inner), draw(ROWS, inner))
        found = _difference(mlp, fuse, inputs, draw(ROWS, inner), _without_linears)
        worst["SwiGLU"] = _larger(worst.get("SwiGLU"), found)
    return worst


def _kinds(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """One module for each combination of class, sizes and settings."""
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
    """The largest difference between a fused copy of a module and the module's own forward in float32.

    Args:
        module: the module to test.
        fuse: installs the fused function in a copy of the module.
        inputs: tensors whose gradients are compared.
        upstream: the gradient of the result.
        call: called with a copy of the module, its own or the fused forward, and the inputs; returns the result.
    """
    results = []
    for exact in (False, True):
        copy_ = _shallow(module)
        if not exact:
            fuse(copy_)
        leaves = [(x.float() if exact else x.clone()).detach().requires_grad_() for x in inputs]
        forward = functools.partial(type(module).forward, copy_) if exact else copy_.forward
        result = call(copy_, forward, *leaves)
        # The result is copied before the backward pass, which may overwrite it.
        kept, gradient = result.detach().clone(), upstream.to(result.dtype, copy=True)
        results.append([kept, *torch.autograd.grad(result, leaves, gradient)])
    shares = [
        (found.float() - wanted).abs().amax(-1) / wanted.abs().amax(-1) for found, wanted in zip(*results, strict=True)
    ]
    return float(torch.cat([share.flatten() for share in shares]).max())  # NaN if any is NaN


def _shallow(module: torch.nn.Module) -> Any:
    """A copy of a module whose parameters and children can be replaced."""
    twin: Any = copy.copy(module)
    twin.__dict__ = {
        **{name: value for name, value in vars(module).items() if name != "forward"},
        "_parameters": dict(module._parameters),
        "_modules": dict(module._modules),
    }
    return twin


def _with_weight(norm: Any, forward: Callable, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The result of a norm with a given weight, which may be a leaf of the graph."""
    norm._parameters = {"weight": weight}
    return forward(x)


class _Share(torch.nn.Module):
    """Replaces a linear layer by one half of its input.

    A kernel computes between the linear layers, and those of a large model would need hundreds of megabytes.
    """

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
    """The larger of two, NaN if one is NaN: Python's max ignores a NaN that is not its first argument."""
    return other if one is None or other > one or other != other else one


def _differs(functions: Functions, model: torch.nn.Module, dtype: torch.dtype, device: torch.device) -> str:
    """Run the self-test on a model's modules, in the computing dtype and in float32 (used by norms in full training).

    Returns:
        what differs; empty if nothing does.
    """
    norms, mlps, factor = adapt.fused_norms(model), adapt.fused_mlps(model), adapt.family_of(model).norm
    if not norms:
        return "the language model has no RMSNorm for them"
    for kind in dict.fromkeys((dtype, torch.float32)):
        for name, worst in self_test(functions, norms, mlps, dtype=kind, device=device, factor=factor).items():
            if not worst < TOLERANCE[kind]:  # also if it is NaN
                return (
                    f"the self-test of {name} in {kind} differs from the model's own by {worst:.3g} of a row's largest "
                    f"value (allowed: {TOLERANCE[kind]:g})"
                ).replace("torch.", "")
    return ""
