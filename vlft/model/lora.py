"""One function for a frozen linear layer with LoRA, in place of the forward of PEFT's layers.

PEFT (0.21) converts the input of each adapter to float32, applies dropout to it, converts it back under autocast, and
multiplies and adds the result in two more operations: an activation is read and written about twelve times. Here
everything runs in the dtype of the matmuls, and one matmul scales the update and adds it to the base's result.

`vlft.model.apply` binds it when it adds adapters, and `vlft.model.dora` adds what DoRA does. A layer in any other state
than training or evaluating one adapter, plain or of DoRA without dropout, computes as PEFT does. PEFT still owns the
weights: saving, loading and merging do not change.

Letters: N rows of the input (tokens or patches), D its width, O the width of the output, R the rank.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from vlft.model import dora
from vlft.model.packed import autocast_dtype, dense, is_quantised

#: Of weights that a matmul takes as they are.
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def bind(model: torch.nn.Module) -> int:
    """Let every LoRA layer over a linear layer compute with `adapted_linear`, where that is possible.

    Args:
        model: with PEFT's layers; changed in place.

    Returns:
        the number of such layers.
    """
    from peft.tuners.lora.layer import Linear, LoraLayer

    layers = [
        module
        for module in model.modules()
        if type(module) is Linear or (isinstance(module, LoraLayer) and is_quantised(module.base_layer))
    ]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def adapted_linear(
    x: torch.Tensor,
    a_RD: torch.Tensor,
    b_OR: torch.Tensor,
    weight_OD: Any,
    bias_O: torch.Tensor | None,
    *,
    dropout: float,
    scaling: float,
) -> torch.Tensor:
    """`linear(x, weight, bias) + scaling * linear(linear(dropout(x), a), b)`, without temporaries between them.

    Gradients reach `x`, `a` and `b`. Weight and bias are frozen. Under autocast everything is computed in its dtype,
    as in torch's own linear layers, otherwise in that of `x`.

    Args:
        x: [..., D].
        a_RD: the first matrix of the adapter, in any floating dtype.
        b_OR: the second matrix, likewise.
        weight_OD: of the base, likewise, or quantised.
        bias_O: of the base, in any floating dtype.
        dropout: the probability with which an element of the adapter's input is zero; 0 in evaluation.
        scaling: factor of the update.

    Returns:
        [..., O], in the dtype in which it is computed.
    """
    dtype = autocast_dtype(x) or x.dtype
    # Autograd converts the gradients back: those of float32 masters arrive in float32.
    x, a, b = x.to(dtype), a_RD.to(dtype), b_OR.to(dtype)
    same, h_NR, update_NO = _Update.apply(x, a, b, dropout, scaling)
    # An input without a gradient stays itself: `same` would ask for one.
    return _Sum.apply(same if x.requires_grad else x, update_NO, weight_OD, h_NR, b, bias_O, scaling)


# Two functions, because recomputation of a block stops once it has everything that the block saved. What an adapter
# saves is there before the base's matmul, so the last matmul of a block does not run again.


class _Update(torch.autograd.Function):
    """The adapter up to its second matmul, and the whole backward pass except for the base's matmul.

    It returns its input, the input of the second matmul, and a tensor without contents. The last stands for the
    adapter's result, so that its gradient is that of the layer's result.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a_RD: torch.Tensor, b_OR: torch.Tensor, dropout: float, scaling: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_ND = x.reshape(-1, x.shape[-1])
        kept_ND, mask_ND = torch.native_dropout(x_ND, dropout, True) if dropout else (x_ND, None)
        h_NR = kept_ND @ a_RD.T
        of_x, of_a, of_b = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            kept_ND if of_a else None,
            h_NR if of_b else None,
            b_OR if of_x or of_a else None,
            a_RD if of_x else None,
            mask_ND if of_x else None,
        )
        ctx.mark_non_differentiable(h_NR)
        ctx.set_materialize_grads(False)
        ctx.dropout, ctx.scaling = dropout, scaling
        return x, h_NR, x.new_empty(1).expand(len(x_ND), len(b_OR))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_x: torch.Tensor | None, _: None, grad_NO: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        kept_ND, h_NR, b_OR, a_RD, mask_ND = ctx.saved_tensors
        _, of_a, of_b = ctx.needs_input_grad[:3]
        grad_a = grad_b = None
        if of_b:
            grad_b = _scaled_product(grad_NO.T, h_NR, ctx.scaling)
        if of_a or grad_x is not None:
            grad_h_NR = _scaled_product(grad_NO, b_OR, ctx.scaling)
        if of_a:
            grad_a = grad_h_NR.T @ kept_ND
        if grad_x is not None:  # `_Sum` has just made it, and nothing else uses it
            grad_x_ND = grad_x.view(-1, grad_x.shape[-1])
            if mask_ND is None:
                _add_product(grad_x_ND, grad_h_NR, a_RD, 1.0)
            else:
                share = 1 - ctx.dropout
                grad_x_ND.addcmul_(grad_h_NR @ a_RD, mask_ND, value=1 / share if share else 0.0)
        return grad_x, grad_a, grad_b, None, None


class _Sum(torch.autograd.Function):
    """The base's result plus the adapter's, which `_Update` has prepared. It saves nothing but the frozen weight.

    A weight of another dtype is converted again in the backward pass: the converted weights of all layers would be a
    second model in memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        update_NO: torch.Tensor,
        weight_OD: Any,
        h_NR: torch.Tensor,
        b_OR: torch.Tensor,
        bias_O: torch.Tensor | None,
        scaling: float,
    ) -> torch.Tensor:
        bias_O = None if bias_O is None else bias_O.to(x.dtype)
        y_NO = linear(x.reshape(-1, x.shape[-1]), _dense(weight_OD, x.dtype), bias_O)
        _add_product(y_NO, h_NR, b_OR.T, scaling)
        ctx.weight_OD, ctx.shape = weight_OD, x.shape
        return y_NO.view(*x.shape[:-1], len(b_OR))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_NO, grad_x = grad.reshape(-1, grad.shape[-1]), None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_NO @ _dense(ctx.weight_OD, grad.dtype)).view(ctx.shape)
        return grad_x, grad_NO, None, None, None, None, None


# Both matmuls write to `out`: with torch.addmm's own result, cuBLAS would first copy what is added. FlopCounterMode
# does not count `addmm_` (torch 2.15).


def _dense(weight: Any, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if weight.dtype in _PLAIN else dense(weight, dtype)


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """Add `scaling * left @ right` in place, with one rounding."""
    torch.addmm(out, left, right, alpha=scaling, out=out)


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling * left @ right`, with one rounding."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of one of PEFT's layers. Where `adapted_linear` does not apply, that of the layer's class runs."""
    names = () if args or kwargs or self.disable_adapters or self.merged else _applied(self)
    if len(names) == 1:
        name = names[0]
        base, a, b, dropout = self.base_layer, self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        share = dropout.p if type(dropout) is torch.nn.Dropout and dropout.training else 0.0
        if _are_plain(base, a, b, dropout) and _takes(base, x):
            matrices, scaling = (a.weight, b.weight), self.scaling[name]
            if name not in self.lora_variant:
                return adapted_linear(x, *matrices, base.weight, base.bias, dropout=share, scaling=scaling)
            if not share and _has_lengths(self, name):
                y = adapted_linear(x, *matrices, base.weight, None, dropout=0.0, scaling=scaling)
                lengths, weight_OD = self.lora_magnitude_vector[name].weight, base.weight
                if is_quantised(base):
                    weight_OD = dense(weight_OD, y.dtype)
                return dora.scaled_linear(y, weight_OD, *matrices, lengths, base.bias, scaling=scaling)
    return type(self).forward(self, x, *args, **kwargs)


def _has_lengths(layer: Any, name: str) -> bool:
    """Whether a variant of LoRA is DoRA with a vector that this module can use."""
    if type(layer.lora_variant[name]) is not _dora_variant():
        return False
    vector = layer.lora_magnitude_vector[name]
    return _bare(vector) and _simple(vector.weight)


@functools.cache
def _dora_variant() -> type:
    from peft.tuners.lora.variants import DoraLinearVariant

    return DoraLinearVariant


def _applied(layer: Any) -> list[str]:
    """The active adapters that a layer has."""
    return [name for name in layer.active_adapters if name in layer.lora_A]


def _are_plain(base: Any, a: Any, b: Any, dropout: Any) -> bool:
    """Whether the parts of a layer are torch's own modules, of weights that a matmul takes, with a frozen base.

    The base may be quantised.
    """
    if not type(a) is type(b) is torch.nn.Linear or b.bias is not None:
        return False
    packed = is_quantised(base)
    if not packed and type(base) is not torch.nn.Linear:
        return False
    if type(dropout) is not torch.nn.Dropout and type(dropout) is not torch.nn.Identity:
        return False
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return False
    of_base = packed or (_bare(base) and _simple(base.weight))
    return of_base and _bare(a) and _bare(b) and _bare(dropout) and _simple(a.weight)


def _takes(base: Any, x: torch.Tensor) -> bool:
    """Whether a linear layer takes an input: without autocast it refuses two dtypes, and autocast leaves float64."""
    if is_quantised(base):
        return x.is_floating_point()
    weight, bias = base.weight.dtype, base.weight.dtype if base.bias is None else base.bias.dtype
    if autocast_dtype(x) is None:
        return x.dtype is weight is bias
    return torch.float64 not in (x.dtype, weight, bias)


def _bare(module: Any) -> bool:
    """Whether calling a module does no more than its class: a hook would be missed, such as those of DeepSpeed."""
    return "forward" not in module.__dict__ and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _simple(weight: torch.Tensor) -> bool:
    """Whether a weight is neither quantised nor distributed over processes."""
    # Under ZeRO-3 a weight is empty outside its module's forward.
    return weight.dtype in _PLAIN and not hasattr(type(weight), "__tensor_flatten__") and not hasattr(weight, "ds_id")
