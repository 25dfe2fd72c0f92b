"""Quantised linear layers: bitsandbytes' formats and modules, computed by vlft. Imports torch.

Only the linear layers of the language model's blocks are quantised. Embedding, head, merger, vision tower and experts
keep their dtype. A layer makes its weight dense in the forward and again in the backward pass, and multiplies it as
torch's linear layers do. So what a layer multiplies by can be computed again from the base's files, and a merge is
exactly what was trained. (bitsandbytes' own layers of 8 bits also round the inputs, and on CPUs with bf16 its layers of
4 bits cannot train after an evaluation, 0.50.)

Neighbours: `vlft.model.quantise` describes the formats, `vlft.model.codes` chooses the codes, `vlft.model.lora` adds
adapters.
"""

from __future__ import annotations

import contextlib
import types
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from vlft.errors import ConfigError
from vlft.families import Family
from vlft.model.codes import packed_4bit, packed_int8
from vlft.model.load import load_base
from vlft.model.quantise import BLOCK, Quantisation, library, quantised_names
from vlft.model.quantised_files import is_stored_quantised, unpacked


def quantise(
    model: torch.nn.Module,
    family: Family,
    quantisation: Quantisation,
    *,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Replace the linear layers of the language model's blocks by quantised ones on a device, in place.

    Args:
        model: the stock top class.
        family: of the model.
        quantisation: the number format.
        device: where the quantised weights are, and where they are computed.
        say: receives a line from time to time.

    Returns:
        Tower -> number of quantised layers; only of towers that have one.

    Raises:
        ConfigError: bitsandbytes is missing, or the model has another number of such layers than its config says.
    """
    linears = {name: module for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    names = quantised_names(family, list(linears))
    text = family.sizes(model.config).text  # type: ignore[arg-type]
    wanted = sum(len(text.linears(layer)) for layer in text.layers)
    if len(names) != wanted:
        raise ConfigError(
            f"--bits {quantisation.bits}: found {len(names)} linear layers in the language model, expected {wanted}: "
            f"this base is not built as {family.label} is"
        )
    for place, name in enumerate(names, 1):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _quantised(linears.pop(name), quantisation, device))
        if place % 100 == 0:
            say(f"quantised {place} of {len(names)} linear layers")
    return dict(Counter(family.tower_of(name) for name in names))


def load_quantised(
    folder: str | Path,
    family: Family,
    quantisation: Quantisation,
    dtype: torch.dtype | None,
    *,
    device: torch.device | str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> torch.nn.Module:
    """A base with quantised layers on a device. Its other weights are on the CPU.

    Args:
        folder: of the base.
        family: of the base.
        quantisation: the number format.
        dtype: of the other weights; None: that of the files.
        device: where the quantised weights are.
        say: receives a line from time to time.
    """
    model = load_base(folder, family)  # in the dtype of the files: another one could give other codes
    if is_stored_quantised(Path(folder)):
        for module in model.modules():
            if is_quantised(module):
                module.forward = types.MethodType(_forward, module)  # type: ignore[method-assign]
    else:
        quantise(model, family, quantisation, device=device, say=say)
    for parameter in model.parameters():
        if dtype is not None and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model


def dequantised(
    weight_OD: torch.Tensor, quantisation: Quantisation, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The weight that a quantised layer multiplies by.

    Args:
        weight_OD: of the base.
        quantisation: the number format.
        dtype: in which the layer computes.

    Returns:
        [O, D], in `dtype`, on the CPU.
    """
    return dense(_packed(weight_OD.float(), quantisation, "cpu"), dtype)


@contextlib.contextmanager
def known_to_peft(model: torch.nn.Module) -> Iterator[None]:
    """Within this context PEFT finds the attributes that it takes the class of its layers from."""
    kinds = {type(module).__name__ for module in model.modules() if is_quantised(module)}
    names = {f"is_loaded_in_{bits}bit" for bits, kind in ((4, "Linear4bit"), (8, "Linear8bitLt")) if kind in kinds}
    vars(model).update(dict.fromkeys(names, True))
    try:
        yield
    finally:
        for name in names:  # accelerate would refuse to move such a model
            delattr(model, name)


def is_quantised(module: Any) -> bool:
    """Whether a module is a linear layer that `quantise` made, or that transformers loaded from a quantised base."""
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt") and hasattr(module, "weight")


def computing_in(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Let quantised layers round their dense weights to a dtype, as in a run that computes in it. Returns the model."""
    for module in model.modules():
        if is_quantised(module):
            weight: Any = module.weight
            weight.rounded_to = dtype
    return model


def dense(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    """The dense weight of a quantised one, [O, D]."""
    if (rounded_to := getattr(weight, "rounded_to", dtype)) is not dtype:
        return _dense(weight, rounded_to).to(dtype)
    return _dense(weight, dtype)


def _dense(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    if (scales_O := getattr(weight, "SCB", None)) is not None:
        return (weight.data.float() * (scales_O.float() / 127)[:, None]).to(dtype)
    with torch.no_grad():
        return unpacked(weight.data, weight.quant_state, dtype)


def shape_of(weight: Any) -> tuple[int, ...]:
    """The shape [O, D] of a weight, also of a packed one."""
    state = getattr(weight, "quant_state", None)
    return tuple(weight.shape if state is None else state.shape)


def stored_bytes(weight: Any) -> int:
    """Bytes of a quantised weight in memory, with its scales and code tables."""
    if (scales_O := getattr(weight, "SCB", None)) is not None:
        return weight.nbytes + scales_O.nbytes
    state, total = weight.quant_state, weight.nbytes
    total += state.absmax.nbytes + state.code.nbytes
    if state.nested:
        total += state.state2.absmax.nbytes + state.state2.code.nbytes + state.offset.nbytes
    return total


def _quantised(linear: torch.nn.Linear, quantisation: Quantisation, device: torch.device | str) -> torch.nn.Module:
    """bitsandbytes' module with the weight of a linear layer. Its forward is `_forward`."""
    bnb = library()
    with torch.device("meta"):  # the weight that it makes is replaced
        shape: dict[str, Any] = {"bias": linear.bias is not None}
        if quantisation.kind == "int8":
            made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, has_fp16_weights=False, **shape)
        else:
            made = bnb.nn.Linear4bit(
                linear.in_features,
                linear.out_features,
                compute_dtype=linear.weight.dtype,
                compress_statistics=quantisation.double,
                quant_type=quantisation.kind,
                **shape,
            )
    made.weight = _packed(linear.weight.data, quantisation, device)
    if linear.bias is not None:
        made.bias = torch.nn.Parameter(linear.bias.data.to(device), requires_grad=False)
    made.forward = types.MethodType(_forward, made)
    return made


def _packed(weight_OD: torch.Tensor, quantisation: Quantisation, device: torch.device | str) -> Any:
    """A parameter of bitsandbytes with a quantised weight."""
    bnb = library()
    weight_OD = weight_OD.detach().to(device)
    if quantisation.kind == "int8":
        places_OD, scales_O = packed_int8(weight_OD)
        return bnb.nn.Int8Params(places_OD, requires_grad=False, has_fp16_weights=False, CB=places_OD, SCB=scales_O)
    values, state = packed_4bit(weight_OD, quantisation)
    return bnb.nn.Params4bit(
        values,
        requires_grad=False,
        quant_state=state,
        blocksize=BLOCK,
        compress_statistics=quantisation.double,
        quant_type=quantisation.kind,
        bnb_quantized=True,
    )


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of matmuls under autocast on the device of a tensor; None without autocast."""
    kind = x.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of a quantised layer."""
    dtype = autocast_dtype(x) or x.dtype
    bias = None if self.bias is None else self.bias.to(dtype)
    y: torch.Tensor = _Linear.apply(x.to(dtype), self.weight, bias)
    return y


class _Linear(torch.autograd.Function):
    """torch's linear function with a quantised weight, which is dense only while it is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Any, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.weight = weight
        return linear(x, dense(weight, x.dtype), bias_O)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad @ dense(ctx.weight, grad.dtype), None, None
