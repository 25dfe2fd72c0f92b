"""Stand-ins for GPU kernels from outside torch, for tensors without contents (`vlft.model.tracing`).

Each is one operation with the inputs and outputs of the real kernel. It refuses the inputs that the real kernel
refuses, and saves the same tensors for the backward pass.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlft.model import fused

HALF = (torch.bfloat16, torch.float16)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu: torch.Tensor,
    longest: int,
    *,
    scale: float,
    causal: bool,
    cu_k: torch.Tensor | None = None,
    longest_k: int | None = None,
) -> torch.Tensor:
    """Stand-in for a flash kernel, a `vlft.model.segments.Kernel`.

    It refuses the inputs that flash kernels refuse, and saves the same tensors for the backward pass: query, key,
    value, result, and one number for each head and token.

    Raises:
        RuntimeError: the three do not share one 16-bit dtype and one device, or their last dimension is not contiguous.
            Or keys and queries differ in number and share their lengths.
        TypeError: lengths are not int32, or the longest is not a Python int.
    """
    given = {"query": q, "key": k, "value": v}
    if len({x.dtype for x in given.values()}) > 1 or q.dtype not in HALF:
        dtypes = {name: str(x.dtype).removeprefix("torch.") for name, x in given.items()}
        raise RuntimeError(f"a flash kernel takes one 16-bit dtype, not {dtypes}")
    return _operations().attend(q, k, v, cu, longest, cu_k, longest_k)[0]


def attend_in_float32(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu: torch.Tensor,
    longest: int,
    *,
    scale: float,
    causal: bool,
    cu_k: torch.Tensor | None = None,
    longest_k: int | None = None,
) -> torch.Tensor:
    """Stand-in for torch's memory-efficient attention, which a GPU uses in float32. It saves as much as `attend`."""
    return _operations().attend(q, k, v, cu, longest, cu_k, longest_k)[0]


def fused_functions() -> fused.Functions:
    """The fused functions of a GPU, on stand-ins for its kernels."""
    known = _operations()
    return fused.functions(
        fused.Operations(
            norm=lambda x, weight, bias, gate, *, eps, offset, dtype: known.norm(x, weight, bias, gate, dtype),
            norm_backward=_norm_gradients,
            rotate=lambda given, cos, sin, results, backward=False: known.rotate(given, cos, sin, results[0].dtype),
            quick_gelu=known.quick_gelu,
            quick_gelu_backward=known.quick_gelu_backward,
            swiglu=known.swiglu,
            swiglu_backward=known.swiglu_backward,
            convolve=known.convolve,
            convolve_backward=_convolution_gradients,
        )
    )


def _norm_gradients(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    mean: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: float,
    centred: bool,
    for_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    dx, dweight, dbias, dgate = _operations().norm_backward(dy, x, weight, gate, mean, scale, centred, for_weight)
    return (
        dx,
        dweight if for_weight else None,
        dbias if for_weight and centred else None,
        None if gate is None else dgate,
    )


def _convolution_gradients(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, within: torch.Tensor, *, for_weight: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dx, dweight = _operations().convolve_backward(dy, x, weight, within, for_weight)
    return dx, dweight if for_weight else None


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool,
    cu_seqlens: torch.Tensor,
    chunk_indices: torch.Tensor,
) -> tuple[torch.Tensor, None]:
    """Stand-in for flash-linear-attention's `chunk_gated_delta_rule`.

    It saves the same tensors for the backward pass (fla-core 0.6.0): normalised queries and keys with one number for
    each head and token, a dense copy of the values, summed decays, beta, and 64 numbers for each value head and token,
    of the solved triangular systems. It computes the states again in the backward pass.

    Raises:
        RuntimeError: query, key and value do not share one 16-bit dtype, or a tensor is on another device.
        TypeError: decays are not float32, or samples or chunks are not int64.
    """
    if len({x.dtype for x in (q, k, v)}) > 1 or q.dtype not in HALF or not use_qk_l2norm_in_kernel:
        raise RuntimeError(f"the delta rule takes one 16-bit dtype, not {q.dtype}, {k.dtype}, {v.dtype}")
    return _operations().delta_rule(q, k, v, g, beta, cu_seqlens, chunk_indices)[0], None


@dataclass(frozen=True, kw_only=True)
class _Operations:
    attend: Any
    delta_rule: Any
    norm: Any
    norm_backward: Any
    rotate: Any
    quick_gelu: Any
    quick_gelu_backward: Any
    swiglu: Any
    swiglu_backward: Any
    convolve: Any
    convolve_backward: Any


@functools.cache
def _operations() -> _Operations:
    """Register the operations with torch, once, at the first use."""
    attend = _operation("attend", _attend, _attend_backward, keep=lambda inputs, out: (*inputs[:3], *out, inputs[3]))
    delta_rule = _operation(
        "delta_rule",
        _delta_rule,
        _delta_rule_backward,
        keep=lambda inputs, out: (*out[1:], *inputs[4:]),
    )
    alone = (
        *(_norm, _norm_backward, _rotate, _quick_gelu, _quick_gelu_backward, _swiglu, _swiglu_backward),
        *(_convolve, _convolve_backward),
    )
    return _Operations(
        attend=attend,
        delta_rule=delta_rule,
        **{function.__name__.removeprefix("_"): _registered(function.__name__[1:], function) for function in alone},
    )


def _registered(name: str, function: Callable) -> Any:
    """Register a torch operation on tensors without contents: a function of inputs that returns empty results."""
    made = torch.library.custom_op(f"vlft_traced::{name}", _refuse, mutates_args=(), schema=_schema(function))
    made.register_fake(function)
    return made


def _operation(name: str, forward: Callable, backward: Callable, keep: Callable) -> Any:
    """Register a torch operation on tensors without contents, and another one for its backward pass.

    Args:
        name: of the operation.
        forward: inputs -> empty results.
        backward: the gradient of the (first) result and the saved tensors -> empty gradients.
        keep: inputs and outputs -> the tensors to save.
    """
    made, back = _registered(name, forward), _registered(f"{name}_backward", backward)
    arguments = len(inspect.signature(forward).parameters)

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*keep(inputs, output))

    def gradients(ctx: Any, grad: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        found = back(grad, *ctx.saved_tensors)
        return (*found, *[None] * (arguments - len(found)))

    made.register_autograd(gradients, setup_context=setup_context)
    return made


def _schema(function: Callable) -> str:
    return torch.library.infer_schema(function, mutates_args=())


def _refuse(*_: Any) -> Any:
    raise RuntimeError("a stand-in of a kernel computes nothing; it accepts only tensors without contents")


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu: torch.Tensor,
    longest: int,
    cu_k: torch.Tensor | None = None,
    longest_k: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if any(x.device != cu.device or x.stride(-1) != 1 for x in (q, k, v)):
        raise RuntimeError("a flash kernel takes tensors of one device, without gaps in their last dimension")
    for one in (cu,) if cu_k is None else (cu, cu_k):
        if one.dtype != torch.int32 or one.shape != cu.shape or one.device != cu.device:
            raise TypeError(f"a flash kernel takes int32 lengths, not {one.dtype} {tuple(one.shape)} on {one.device}")
    if (cu_k is None) != (longest_k is None) or (cu_k is None and len(k) != len(q)):
        raise RuntimeError(f"{len(q)} queries and {len(k)} keys need lengths of their own, and the longest of each")
    sums = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
    return torch.empty_like(q, memory_format=torch.contiguous_format), sums


def _attend_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    cu: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if grad.dtype != q.dtype:
        raise RuntimeError(f"a flash kernel's backward takes a gradient in {q.dtype}, not {grad.dtype}")
    return _like(q), _like(k), _like(v)


def _delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    cu: torch.Tensor,
    chunks: torch.Tensor,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:
    if any(x.device != q.device for x in (k, v, decay, beta, cu, chunks)):
        raise RuntimeError("the delta rule takes tensors of one device")
    if decay.dtype != torch.float32 or cu.dtype != torch.int64 or chunks.dtype != torch.int64:
        raise TypeError(f"decays are {decay.dtype}, samples {cu.dtype} and chunks {chunks.dtype}")
    sums = q.new_empty(q.shape[:-1], dtype=torch.float32)
    solved = k.new_empty(*v.shape[:-1], 64)
    return _like(v), _like(q), sums, _like(k), torch.empty_like(sums), _like(v), _like(decay), solved


def _delta_rule_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    q_sums: torch.Tensor,
    k: torch.Tensor,
    k_sums: torch.Tensor,
    v: torch.Tensor,
    decay: torch.Tensor,
    solved: torch.Tensor,
    beta: torch.Tensor,
    cu: torch.Tensor,
    chunks: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return _like(q), _like(k), _like(v), _like(decay), _like(beta)


def _norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, gate: torch.Tensor | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows = len(x)
    scale = x.new_empty(rows, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scale.new_empty(0 if bias is None else rows), scale


def _norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    gate: torch.Tensor | None,
    mean: torch.Tensor,
    scale: torch.Tensor,
    centred: bool,
    for_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    channels = len(weight) if for_weight else 0
    dgate = x.new_empty(0) if gate is None else _like(gate)
    return _like(x), weight.new_empty(channels), weight.new_empty(channels if centred else 0), dgate


def _convolve(x: torch.Tensor, weight: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
    if within.device != x.device or within.dtype.is_floating_point:
        raise RuntimeError(f"places within samples are {within.dtype} on {within.device}")
    return torch.empty_like(x)


def _convolve_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, within: torch.Tensor, for_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), torch.empty_like(weight if for_weight else weight[:0])


def _rotate(
    given: Sequence[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype
) -> list[torch.Tensor]:
    if any(x.device != cos.device or x.stride(-1) != 1 for x in given):
        raise RuntimeError("rotary embedding takes tensors of one device, without gaps in their last dimension")
    return [x.new_empty(x.shape, dtype=dtype) for x in given]


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _quick_gelu_backward(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(gate)


def _swiglu_backward(grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(gate), torch.empty_like(up)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
