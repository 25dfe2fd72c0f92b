"""Fused kernels in one model: each is used if a self-test finds it equal to the modules that it replaces.

RMSNorm and SwiGLU are Liger's where it is installed and its dtypes fit. The others, and these without Liger, are our
own Triton kernels (`vlft.model.fused`). Experts are not fused: transformers computes them in one call for all experts
(`vlft.families` says which MLPs are).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from vlft.errors import ConfigError
from vlft.model import adapt, fused, modules, recurrent, rotary, selftest
from vlft.model.fused import Function, Functions
from vlft.model.selftest import Dtypes

Choice = Literal["auto", "true", "false"]
Place = Callable[[torch.nn.Module, Function], None]

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
        function: the function; None where there is none.
        modules: those of a model that it may replace.
        place: puts a function into one of them.
        inputs: of its self-test.
        mixed: whether a step may pass other dtypes than that of the module's weights.
    """

    name: str
    function: Function | None
    modules: Sequence[torch.nn.Module]
    place: Place
    inputs: selftest.Inputs
    mixed: bool = False

    def fuse(self, module: torch.nn.Module) -> None:
        """Make a module compute with the function."""
        if self.function is not None:
            self.place(module, self.function)


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
        candidates = _functions(choice, device) if functions is None else (functions,)
    except _Unavailable as error:
        if choice == "true":
            raise _refusal(str(error)) from None
        return f"off ({error})"
    known: dict[str, list[Kernel]] = {}
    for kernel in itertools.chain.from_iterable(kernels_of(model, candidate) for candidate in candidates):
        known.setdefault(kernel.name, []).append(kernel)
    passed: dict[str, Kernel] = {}
    problems: dict[str, str] = {}
    for name, versions in known.items():
        for kernel in versions:
            if not (problem := _problem(kernel, dtype, device)):
                passed[name] = kernel
                break
            problems.setdefault(name, problem)
    if choice == "true" and (without := [name for name in problems if name not in passed]):
        raise _refusal(problems[without[0]])
    named = {f"Liger's {name}" if name in passed else name: problem for name, problem in problems.items()}
    return _fuse(passed.values(), named)


def fuse(model: torch.nn.Module, functions: Functions) -> str:
    """Use fused functions in a model, without self-tests.

    Returns:
        which kernels are active on how many modules.
    """
    return _fuse(kernels_of(model, functions), {})


def _fuse(known: Iterable[Kernel], problems: dict[str, str]) -> str:
    active: list[str] = []
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

    def rms_norm(norm: torch.nn.Module, function: Function) -> None:
        modules.fuse_rms_norm(norm, function, factor, keeps_dtype=id(norm) in kept)

    def rotary_of(part: adapt.Part, function: Function | None, place: Place) -> Kernel:
        return Kernel(
            name=f"rotary embedding of {part}",
            function=function,
            modules=adapt.attentions(model, part),
            place=place,
            inputs=selftest.rotary(adapt.rotary_channels(model, part), vision=part == "vision"),
            mixed=True,
        )

    known = [
        Kernel(
            name="RMSNorm",
            function=functions.rms_norm,
            modules=adapt.fused_norms(model),
            place=rms_norm,
            inputs=selftest.rms_norm(factor),
            mixed=True,
        ),
        Kernel(
            name="SwiGLU",
            function=functions.swiglu,
            modules=adapt.fused_mlps(model),
            place=modules.fuse_swiglu,
            inputs=selftest.swiglu,
        ),
        Kernel(
            name="LayerNorm",
            function=functions.layer_norm,
            modules=adapt.layer_norms(model),
            place=modules.fuse_layer_norm,
            inputs=selftest.layer_norm,
            mixed=True,
        ),
        Kernel(
            name="quick GELU",
            function=functions.quick_gelu,
            modules=adapt.quick_gelus(model),
            place=modules.fuse_activation,
            inputs=selftest.activation,
        ),
        Kernel(
            name="gated RMSNorm",
            function=functions.gated_norm,
            modules=adapt.gated_norms(model),
            place=modules.fuse_gated_norm,
            inputs=selftest.gated_norm,
            mixed=True,
        ),
        Kernel(
            name="convolution",
            function=functions.convolution,
            modules=adapt.recurrent_layers(model),
            place=recurrent.fuse_convolution,
            inputs=selftest.convolution,
            mixed=True,
        ),
        rotary_of("language", functions.rotary, rotary.fuse_language),
        rotary_of("vision", functions.joined_rotary, rotary.fuse_vision),
    ]
    return [kernel for kernel in known if kernel.function is not None and kernel.modules]


def _functions(choice: Choice, device: torch.device) -> tuple[Functions, ...]:
    """The functions for a device: with Liger's where it is installed, then ours alone, for what fails with Liger's.

    Raises:
        _Unavailable: kernels cannot run there, triton is not installed, or with the choice "true" Liger is not.
    """
    if device.type != "cuda":
        raise _Unavailable("needs CUDA")
    try:
        ligers = fused.liger_functions()
    except Exception as error:  # noqa: BLE001 - beside another version of triton, its modules raise other errors
        if choice == "true":
            raise _Unavailable(str(error)) from None
        ligers = {}
    try:
        ours = fused.triton_operations()
    except Exception as error:  # noqa: BLE001 - likewise
        raise _Unavailable(str(error)) from None
    alone = fused.functions(ours)
    return (fused.functions(ours, **ligers), alone) if ligers else (alone,)


class _Unavailable(Exception):
    """Why no kernel can run."""


def _refusal(problem: str) -> ConfigError:
    return ConfigError(
        f"--use_liger_kernel true: {problem}. To get the kernels: {INSTALL}, on a machine with a CUDA device. Or use "
        "--use_liger_kernel auto, which uses the kernels that work."
    )


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
    except Exception as error:  # noqa: BLE001 - kernels refuse by assert, and their compilers raise their own classes
        return f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
    for dtypes, worst in found.items():
        allowed = TOLERANCE[dtypes.narrowest]
        if not worst < allowed:  # also if it is NaN
            return (
                f"the self-test of {kernel.name} in {dtypes.narrowest} differs from the model's own by {worst:.3g} of "
                f"a row's largest value (allowed: {allowed:g})"
            ).replace("torch.", "")
    return ""
