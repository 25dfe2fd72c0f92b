"""Self-tests of fused functions: the largest difference between a module with one and the module's own forward.

A test gets what a step passes on: dtypes, autocast and strides. The module's own forward runs in float32 on the same
values. All rows of the result, and of the gradient of every input, are compared. So a test finds modules that have the
right attributes and compute something else, such as an MLP that limits its gate. `vlft.model.kernels` decides.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from vlft.families import Norm
from vlft.model import adapt, recurrent, tracing

ROWS = 67  # not a power of two
ATTENTION = "vlft_flash_selftest"  # transformers calls a ViT's attention once only if the name contains "flash"


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """The dtypes that reach a module.

    Attributes:
        given: of what linear layers or the embedding return.
        weights: of the module's own weights, or of cosines and sines.
        autocast: the dtype that linear layers compute in; None without autocast.
    """

    given: torch.dtype
    weights: torch.dtype
    autocast: torch.dtype | None = None

    @property
    def narrowest(self) -> torch.dtype:
        """The dtype that decides how exact a result can be."""
        return min((self.given, self.weights, self.autocast or self.given), key=lambda dtype: dtype.itemsize)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Inputs of a test.

    Attributes:
        leaves: tensors whose gradients are compared.
        call: called with a copy of the module, its forward and the leaves; returns the result.
    """

    leaves: tuple[torch.Tensor, ...]
    call: Callable[..., torch.Tensor]


#: Makes the inputs for a module; its second argument draws normal random numbers of a shape in a dtype.
Inputs = Callable[[torch.nn.Module, Callable[..., torch.Tensor], Dtypes], Case]


def worst(
    modules: Iterable[torch.nn.Module],
    fuse: Callable[[torch.nn.Module], None],
    inputs: Inputs,
    dtypes: Dtypes,
    device: torch.device,
) -> float:
    """Test one module of each kind and size.

    Returns:
        the largest difference, as a share of its row's largest value; NaN if any value is NaN.
    """
    found: list[float] = []
    for module in kinds(modules):
        generator = torch.Generator().manual_seed(0)

        def draw(*size: int, dtype: torch.dtype, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(size, generator=generator).to(device, dtype)

        case = inputs(module, draw, dtypes)
        found.append(_difference(module, fuse, case, functools.partial(draw, dtype=torch.float32), dtypes))
    return max(found, key=lambda share: (share != share, share))  # Python's max ignores a NaN that is not first


def kinds(modules: Iterable[torch.nn.Module]) -> list[torch.nn.Module]:
    """One module for each combination of class, sizes and settings."""
    found: dict[Any, torch.nn.Module] = {}
    for module in modules:
        sizes = tuple((name, tuple(tensor.shape)) for name, tensor in module.named_parameters())
        settings = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, int | float | str))
        settings = tuple((k, v) for k, v in settings if k != "layer_idx")
        found.setdefault((type(module), sizes, settings, repr(getattr(module, "act_fn", None))), module)
    return list(found.values())


def _difference(
    module: torch.nn.Module,
    fuse: Callable[[torch.nn.Module], None],
    case: Case,
    draw: Callable[..., torch.Tensor],
    dtypes: Dtypes,
) -> float:
    """The largest difference between a fused copy of a module and the module's own forward in float32."""
    results = []
    upstream: torch.Tensor | None = None
    for exact in (True, False):
        twin = _shallow(module)
        if not exact:
            fuse(twin)
        leaves = [(x.float() if exact else x.clone()).detach().requires_grad_() for x in case.leaves]
        forward = functools.partial(type(module).forward, twin) if exact else twin.forward
        with tracing.autocast(leaves[0].device.type, None if exact else dtypes.autocast):
            result = case.call(twin, forward, *leaves)
        upstream = draw(*result.shape).to(dtypes.autocast or dtypes.given) if upstream is None else upstream
        # The result is copied before the backward pass, which may overwrite it.
        kept, gradient = result.detach().clone(), upstream.to(result.dtype, copy=True)
        results.append([kept, *torch.autograd.grad(result, leaves, gradient)])
    shares = [
        (found.float() - wanted).abs().amax(-1) / wanted.abs().amax(-1) for wanted, found in zip(*results, strict=True)
    ]
    return float(torch.cat([share.flatten() for share in shares]).max())  # NaN if any is NaN


def _shallow(module: torch.nn.Module) -> Any:
    """A copy of a module whose parameters and children can be replaced."""
    twin: Any = copy.copy(module)
    twin.__dict__ = {
        **{name: value for name, value in vars(module).items() if name not in ("forward", "fused_convolution")},
        "_parameters": dict(module._parameters),
        "_modules": dict(module._modules),
    }
    return twin


# ---- inputs for each kind of module


def rms_norm(factor: Norm) -> Inputs:
    """Inputs for an RMSNorm that multiplies by a factor."""

    def inputs(norm: torch.nn.Module, draw: Callable[..., torch.Tensor], dtypes: Dtypes) -> Case:
        width = norm.get_parameter("weight").shape[0]
        # What it multiplies by is around 1.
        weight = 0.3 * draw(width, dtype=dtypes.weights) + (1 if factor == "w" else 0)
        return Case(leaves=(_large_and_small(draw(ROWS, width, dtype=dtypes.given)), weight), call=_with_weights)

    return inputs


def layer_norm(norm: torch.nn.Module, draw: Callable[..., torch.Tensor], dtypes: Dtypes) -> Case:
    """Inputs for a LayerNorm."""
    width = norm.get_parameter("weight").shape[0]
    weight, bias = (0.3 * draw(width, dtype=dtypes.weights) + constant for constant in (1, 0))
    return Case(leaves=(_large_and_small(draw(ROWS, width, dtype=dtypes.given)), weight, bias), call=_with_weights)


def _large_and_small(x_RC: torch.Tensor) -> torch.Tensor:
    """A norm must be as exact on large activations as on small ones."""
    return x_RC * torch.logspace(-1, 2, len(x_RC), device=x_RC.device)[:, None].to(x_RC.dtype)


def _with_weights(norm: Any, forward: Callable, x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    """The result of a norm with given weights, which may be leaves of the graph."""
    norm._parameters = dict(zip(("weight", "bias"), weights, strict=False))  # an RMSNorm has no bias
    return forward(x)


def gated_norm(norm: torch.nn.Module, draw: Callable[..., torch.Tensor], dtypes: Dtypes) -> Case:
    """Inputs for an RMSNorm whose result is multiplied by a gate."""
    width = norm.get_parameter("weight").shape[0]
    x_RC, gate_RC = (draw(ROWS, width, dtype=dtypes.given) for _ in range(2))
    weight = 0.3 * draw(width, dtype=dtypes.weights) + 1

    def call(twin: Any, forward: Callable, x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        twin._parameters = {"weight": weight}
        return forward(x, gate)

    return Case(leaves=(_large_and_small(x_RC), gate_RC, weight), call=call)


def convolution(layer: torch.nn.Module, draw: Callable[..., torch.Tensor], dtypes: Dtypes) -> Case:
    """Inputs for the convolution of a gated delta net, on samples shorter and longer than its number of taps."""
    channels, _, taps = layer.get_parameter("conv1d.weight").shape
    leaves = (draw(ROWS, channels, dtype=dtypes.given), draw(channels, 1, taps, dtype=dtypes.weights))

    def call(twin: Any, forward: Callable, x_TZ: torch.Tensor, weight_Z1W: torch.Tensor) -> torch.Tensor:
        twin._modules = {**twin._modules, "conv1d": SimpleNamespace(weight=weight_Z1W)}
        lengths = (30, 1, 2, ROWS - 33)
        return recurrent.convolved(twin, x_TZ, recurrent.Segments(lengths=lengths, device=x_TZ.device))

    return Case(leaves=leaves, call=call)


def activation(module: torch.nn.Module, draw: Callable[..., torch.Tensor], dtypes: Dtypes) -> Case:
    """Inputs for an activation."""
    return Case(leaves=(3 * draw(ROWS, 96, dtype=dtypes.given),), call=lambda twin, forward, x: forward(x))


def swiglu(mlp: torch.nn.Module, draw: Callable[..., torch.Tensor], dtypes: Dtypes) -> Case:
    """Inputs for a gated MLP. Its linear layers are replaced: those of a large model need hundreds of megabytes."""
    inner = mlp.get_parameter("gate_proj.weight").shape[0]

    def call(twin: Any, forward: Callable, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        twin._modules |= _slices(gate_proj=inner, up_proj=inner) | {"down_proj": torch.nn.Identity()}
        return forward(torch.cat([gate, up], dim=-1))

    return Case(leaves=tuple(draw(ROWS, inner, dtype=dtypes.given) for _ in range(2)), call=call)


def rotary(channels: int, *, vision: bool) -> Inputs:
    """Inputs for softmax attention. Its linear layers are replaced, and its attention by a sum over a token alone.

    Args:
        channels: of a head that are turned.
        vision: whether it is the attention of a ViT.
    """

    def inputs(attention: torch.nn.Module, draw: Callable[..., torch.Tensor], dtypes: Dtypes) -> Case:
        names = ("qkv",) if vision else ("q_proj", "k_proj", "v_proj")
        linears: dict[str, Any] = {name: attention.get_submodule(name) for name in names}
        widths: dict[str, int] = {name: linear.out_features for name, linear in linears.items()}
        angles_TN = draw(ROWS, channels // 2, dtype=torch.float32).repeat(1, 2)
        turns = [turn.to(dtypes.weights) for turn in (angles_TN.cos(), angles_TN.sin())]
        flat = {"segment_lengths": (ROWS,)}

        def call(twin: Any, forward: Callable, x_TX: torch.Tensor) -> torch.Tensor:
            exact = x_TX.dtype == torch.float32 and dtypes.given != torch.float32
            cos, sin = (turn.float() if exact else turn for turn in turns)
            twin.config = copy.copy(twin.config)
            adapt.name_attention(twin.config, ATTENTION)
            replaced = _slices(**widths) | {"proj" if vision else "o_proj": torch.nn.Identity()}
            kept = {name: child for name, child in twin._modules.items() if name not in replaced}
            twin._modules = {name: _moved(child, x_TX.device) for name, child in kept.items()} | replaced
            if vision:
                cu_seqlens = torch.tensor([0, ROWS], dtype=torch.int32)
                return forward(x_TX, cu_seqlens, (cos, sin), ROWS, **flat)
            return forward(x_TX[None], position_embeddings=(cos[None], sin[None]), attention_mask=None, **flat)[0][0]

        _register()
        return Case(leaves=(draw(ROWS, sum(widths.values()), dtype=dtypes.given),), call=call)

    return inputs


@functools.cache
def _register() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _sum)


def _sum(
    module: Any, query_1HTD: torch.Tensor, key_1GTD: torch.Tensor, value_1GTD: torch.Tensor, *_: Any, **__: Any
) -> tuple[torch.Tensor, None]:
    """In place of attention: a sum in float32, which shows each of the three."""
    share = query_1HTD.shape[1] // key_1GTD.shape[1]
    key, value = (x.float().repeat_interleave(share, dim=1) for x in (key_1GTD, value_1GTD))
    return (query_1HTD.float() + 2 * key + 3 * value).transpose(1, 2).contiguous(), None


def _moved(child: Any, device: torch.device) -> Any:
    """A child module with its parameters on a device. Under ZeRO-3 the model stays on the host."""
    if child is None or not child._parameters:
        return child
    twin = _shallow(child)
    twin._parameters = {name: p if p is None else p.detach().to(device) for name, p in child._parameters.items()}
    return twin


class _Slice(torch.nn.Module):
    """Replaces a linear layer: a part of its input, in memory of its own as the result of a linear layer is."""

    def __init__(self, start: int, width: int) -> None:
        super().__init__()
        self.start, self.width = start, width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.narrow(-1, self.start, self.width).clone(memory_format=torch.contiguous_format)


def _slices(**widths: int) -> dict[str, torch.nn.Module]:
    """Linear layers, one after the other in the channels of their joined input."""
    starts: Sequence[int] = [sum(list(widths.values())[:place]) for place in range(len(widths))]
    return {name: _Slice(start, width) for (name, width), start in zip(widths.items(), starts, strict=True)}
