"""Fused kernels in one model: each is used if a self-test finds it equal to the modules that it replaces.

RMSNorm and SwiGLU are Liger's where it is installed and its dtypes fit. The others, and these without Liger, are our
own Triton kernels (`vlft.model.fused`). Experts are not fused: transformers computes them in one call for all experts
(`vlft.families` says which MLPs are).
"""

from __future__ import annotations

import subprocess
import types
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlft.errors import ConfigError
from vlft.families import Norm
from vlft.model import adapt, fused, recurrent, rotary, selftest
from vlft.model.fused import Function, Functions
from vlft.model.selftest import Dtypes

Choice = Literal["auto", "true", "false"]

INSTALL = "pip install 'liger-kernel>=0.8.5'"
#: Largest difference allowed in a self-test, as a share of its row's largest value. A kernel rounds to 16 bits at most
#: three times between its inputs and its result, by 2**-9 each in bf16. In float32 the order of sums differs, and a
#: GPU's fast exp differs in the last digits.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.01, torch.float16: 0.01}


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A fused function for modules of one kind.

    Attributes:
        name: for the log.
        modules: those of a model that it may replace.
        fuse: puts it into one of them.
        inputs: of its self-test.
        mixed: whether a step may pass other dtypes than that of the module's weights.
    """

    name: str
    modules: Sequence[torch.nn.Module]
    fuse: Callable[[torch.nn.Module], None]
    inputs: selftest.Inputs
    mixed: bool = False


def check(choice: Choice, device: torch.device) -> None:
    """Refuse `--use_liger_kernel true` early if the kernels cannot run on a device, before anything is loaded.

    Raises:
        ConfigError: the kernels cannot run; the message says why, and what to do.
    """
    if choice == "true":
        try:
            _functions(choice, device)
        except _Unavailable as error:
            raise _refusal(str(error)) from None


def install(
    model: torch.nn.Module,
    choice: Choice,
    *,
    dtype: torch.dtype,
    device: torch.device | None = None,
    functions: Functions | None = None,
) -> str:
    """Use the kernels in a loaded model, if the choice allows it and they pass their self-tests on its device.

    Args:
        model: a loaded base (the top class), not yet wrapped by PEFT.
        choice: `--use_liger_kernel`.
        dtype: what the run computes in (bf16 under autocast).
        device: where the run computes, if the model is not there yet.
        functions: used instead of Liger's and ours, on any device (for tests).

    Returns:
        which kernels are active on how many modules, and why others are not; "off" and why if none is.

    Raises:
        ConfigError: choice is "true" and one of them cannot be used.
    """
    if choice == "false":
        return "off"
    device = device or next(model.parameters()).device
    try:
        functions = functions or _functions(choice, device)
    except _Unavailable as error:
        if choice == "true":
            raise _refusal(str(error)) from None
        return f"off ({error})"
    known = kernels_of(model, functions)
    problems = {kernel.name: _problem(kernel, dtype, device) for kernel in known}
    problems = {name: problem for name, problem in problems.items() if problem}
    if problems and choice == "true":
        raise _refusal(next(iter(problems.values())))
    return _fuse([kernel for kernel in known if kernel.name not in problems], problems)


def fuse(model: torch.nn.Module, functions: Functions) -> str:
    """Use fused functions in a model, without self-tests.

    Returns:
        which kernels are active on how many modules.
    """
    return _fuse(kernels_of(model, functions), {})


def _fuse(known: Iterable[Kernel], problems: dict[str, str]) -> str:
    active = []
    for kernel in known:
        for module in kernel.modules:
            kernel.fuse(module)
        active.append(f"{kernel.name} on {len(kernel.modules)}{'' if active else ' modules'}")
    without = ", ".join(f"not {name}: {problem}" for name, problem in problems.items())
    if not active:
        return f"off ({without or 'the model has no module for them'})"
    return ", ".join(active) + (f" ({without})" if without else "")


def kernels_of(model: torch.nn.Module, functions: Functions) -> list[Kernel]:
    """The kernels that a model has modules for.

    Args:
        model: a loaded base (the top class).
        functions: kernels without a function are left out.
    """
    factor = adapt.family_of(model).norm
    kept = {id(norm) for norm in adapt.before_experts(model)}
    normed, multiplied, centred, quick = (
        functions.rms_norm, functions.swiglu, functions.layer_norm, functions.quick_gelu,
    )  # fmt: skip
    gated, convolution = functions.gated_norm, functions.convolution
    turned: dict[adapt.Part, tuple[Function | None, Callable[..., None]]] = {
        "language": (functions.rotary, rotary.fuse_language),
        "vision": (functions.joined_rotary, rotary.fuse_vision),
    }
    found = []
    if normed is not None:
        found.append(
            Kernel(
                name="RMSNorm",
                modules=adapt.fused_norms(model),
                fuse=lambda norm: fuse_rms_norm(norm, normed, factor, keeps_dtype=id(norm) in kept),
                inputs=selftest.rms_norm(factor),
                mixed=True,
            )
        )
    if multiplied is not None:
        found.append(
            Kernel(
                name="SwiGLU",
                modules=adapt.fused_mlps(model),
                fuse=lambda mlp: fuse_swiglu(mlp, multiplied),
                inputs=selftest.swiglu,
            )
        )
    if centred is not None:
        found.append(
            Kernel(
                name="LayerNorm",
                modules=adapt.layer_norms(model),
                fuse=lambda norm: fuse_layer_norm(norm, centred),
                inputs=selftest.layer_norm,
                mixed=True,
            )
        )
    if quick is not None:
        found.append(
            Kernel(
                name="quick GELU",
                modules=adapt.quick_gelus(model),
                fuse=lambda module: fuse_activation(module, quick),
                inputs=selftest.activation,
            )
        )
    if gated is not None:
        found.append(
            Kernel(
                name="gated RMSNorm",
                modules=adapt.gated_norms(model),
                fuse=lambda norm: fuse_gated_norm(norm, gated),
                inputs=selftest.gated_norm,
                mixed=True,
            )
        )
    if convolution is not None:
        found.append(
            Kernel(
                name="convolution",
                modules=adapt.recurrent_layers(model),
                fuse=lambda layer: recurrent.fuse_convolution(layer, convolution),
                inputs=selftest.convolution,
                mixed=True,
            )
        )
    for part, (function, place) in turned.items():
        if function is not None:
            found.append(
                Kernel(
                    name=f"rotary embedding of {part}",
                    modules=adapt.attentions(model, part),
                    fuse=lambda module, place=place, function=function: place(module, function),
                    inputs=selftest.rotary(adapt.rotary_channels(model, part), vision=part == "vision"),
                    mixed=True,
                )
            )
    return [kernel for kernel in found if kernel.modules]


def _functions(choice: Choice, device: torch.device) -> Functions:
    """The functions for a device.

    Raises:
        _Unavailable: kernels cannot run there, triton is not installed, or with the choice "true" Liger is not.
    """
    if device.type != "cuda":
        raise _Unavailable("needs CUDA")
    try:
        ligers = fused.liger_functions()
    except ImportError as error:
        if choice == "true":
            raise _Unavailable(str(error)) from None
        ligers = {}
    try:
        return fused.functions(fused.triton_operations(), **ligers)
    except ImportError as error:
        raise _Unavailable(str(error)) from None


class _Unavailable(Exception):
    """Why no kernel can run."""


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
        "--use_liger_kernel auto, which uses those that work."
    )


# ---- put functions into modules


def fuse_rms_norm(norm: torch.nn.Module, function: Function, factor: Norm = "w", *, keeps_dtype: bool = False) -> None:
    """Make one RMSNorm compute with a function. Under autocast it returns the dtype that linear layers compute in.

    Args:
        norm: with `weight`, and an attribute for epsilon that transformers spells differently for each factor.
        function: as in `Functions`.
        factor: what the norm multiplies by.
        keeps_dtype: return transformers' dtype also under autocast.
    """
    epsilon, offset = {"w": ("variance_epsilon", 0.0), "1 + w": ("eps", 1.0)}[factor]

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        dtype = x.dtype if offset else torch.promote_types(x.dtype, self.weight.dtype)
        if not keeps_dtype:
            dtype = fused.computing(x.device, dtype)
        return function(x, self.weight, getattr(self, epsilon), offset, dtype)

    norm.forward = types.MethodType(forward, norm)


def fuse_layer_norm(norm: torch.nn.Module, function: Function) -> None:
    """Make one LayerNorm compute with a function. Under autocast it returns the dtype that linear layers compute in.

    Autocast on a GPU computes LayerNorm in float32, also of 16-bit tensors. Each linear layer then casts the result.

    Args:
        norm: with weight and bias.
        function: as in `Functions`.
    """

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return function(x, self.weight, self.bias, self.eps, fused.computing(x.device, x.dtype))

    norm.forward = types.MethodType(forward, norm)


def fuse_gated_norm(norm: torch.nn.Module, function: Function) -> None:
    """Make the norm of one gated delta net compute with a function.

    Args:
        norm: with `weight`, called with a tensor and a gate.
        function: as in `Functions`.
    """

    def forward(self: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return function(x, self.weight, gate, self.variance_epsilon, fused.computing(x.device, x.dtype))

    norm.forward = types.MethodType(forward, norm)


def fuse_activation(activation: torch.nn.Module, function: Function) -> None:
    """Make one activation compute with a function of one tensor."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return function(x)

    activation.forward = types.MethodType(forward, activation)


def fuse_swiglu(mlp: torch.nn.Module, function: Function) -> None:
    """Make one gated MLP multiply with a function. Its linear layers do not change, with or without LoRA."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(function(self.gate_proj(x), self.up_proj(x)))

    mlp.forward = types.MethodType(forward, mlp)


# ---- self-tests


def self_test(kernel: Kernel, *, dtype: torch.dtype, device: torch.device) -> dict[Dtypes, float]:
    """Compare a kernel with the modules that it replaces, in each combination of dtypes that a step may pass.

    Args:
        kernel: the kernel; one module of each kind and size is tested.
        dtype: what the run computes in.
        device: where the kernel runs.

    Returns:
        dtypes -> largest difference, as a share of its row's largest value.
    """
    wide = torch.float32
    known = [Dtypes(given=dtype, weights=dtype)]
    if dtype != wide:
        known.append(Dtypes(given=wide, weights=wide))  # shows small differences, such as another epsilon
        if kernel.mixed:
            known += [Dtypes(given=given, weights=wide, autocast=dtype) for given in (wide, dtype)]
    return {dtypes: selftest.worst(kernel.modules, kernel.fuse, kernel.inputs, dtypes, device) for dtypes in known}


def _problem(kernel: Kernel, dtype: torch.dtype, device: torch.device) -> str:
    """Run a self-test: why a kernel cannot be used; empty if it can."""
    try:
        found = self_test(kernel, dtype=dtype, device=device)
    except _failures() as error:
        return f"{type(error).__name__}: {error}".split("\n", 1)[0]
    for dtypes, worst in found.items():
        allowed = TOLERANCE[dtypes.narrowest]
        if not worst < allowed:  # also if it is NaN
            return (
                f"the self-test of {kernel.name} in {dtypes.narrowest} differs from the model's own by {worst:.3g} of "
                f"a row's largest value (allowed: {allowed:g})"
            ).replace("torch.", "")
    return ""
