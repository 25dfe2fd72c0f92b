"""One function for a frozen linear layer with LoRA, in place of the forward of PEFT's layers.

PEFT (0.21) converts the input of each adapter to float32, applies dropout to it, converts it back under autocast, and
multiplies and adds the result in two more operations: an activation is read and written about twelve times. Here
everything runs in the dtype of the matmuls, and one matmul scales the update and adds it to the base's result.

`vlft.model.apply` binds it when it adds adapters. A layer in any other state than training or evaluating one plain
adapter computes as PEFT does. PEFT still owns the weights: saving, loading and merging do not change.

Letters: N rows of the input (tokens or patches), D its width, O the width of the output, R the rank.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

#: Of weights that a matmul takes as they are. Quantised weights have other dtypes.
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def bind(model: torch.nn.Module) -> int:
    """Let every LoRA layer over a linear layer compute with `adapted_linear`, where that is possible.

    Args:
        model: with PEFT's layers; changed in place.

    Returns:
        the number of such layers.
    """
    from peft.tuners.lora.layer import Linear

    layers = [module for module in model.modules() if type(module) is Linear]
    for layer in layers:
        layer.forward = types.MethodType(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def adapted_linear(
    x: torch.Tensor,
    a_RD: torch.Tensor,
    b_OR: torch.Tensor,
    weight_OD: torch.Tensor,
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
        weight_OD: of the base, likewise.
        bias_O: of the base, likewise.
        dropout: the probability with which an element of the adapter's input is zero; 0 in evaluation.
        scaling: factor of the update.

    Returns:
        [..., O], in the dtype in which it is computed.
    """
    dtype = _autocast(x) or x.dtype
    # Autograd converts the gradients back: those of float32 masters arrive in float32.
    return _AdaptedLinear.apply(x.to(dtype), a_RD.to(dtype), b_OR.to(dtype), weight_OD, bias_O, dropout, scaling)


def _autocast(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of matmuls under autocast on the device of a tensor; None without autocast."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


class _AdaptedLinear(torch.autograd.Function):
    """The computation of `adapted_linear`, on an input and matrices of one dtype.

    For the backward pass it saves the adapter's input after dropout, its mask, and the first matmul's result. A frozen
    weight of another dtype is converted again instead of saved, since the copies of all layers would be a second model.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a_RD: torch.Tensor,
        b_OR: torch.Tensor,
        weight_OD: torch.Tensor,
        bias_O: torch.Tensor | None,
        dropout: float,
        scaling: float,
    ) -> torch.Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        y_NO = linear(x_ND, weight_OD.to(x.dtype), None if bias_O is None else bias_O.to(x.dtype))
        kept_ND, mask_ND = torch.native_dropout(x_ND, dropout, True) if dropout else (x_ND, None)
        h_NR = kept_ND @ a_RD.T
        _add_product(y_NO, h_NR, b_OR.T, scaling)

        of_x, of_a, of_b = ctx.needs_input_grad[:3]
        ctx.save_for_backward(
            kept_ND if of_a else None,
            h_NR if of_b else None,
            b_OR if of_x or of_a else None,
            *((a_RD, weight_OD, mask_ND) if of_x else (None, None, None)),
        )
        ctx.dropout, ctx.scaling, ctx.shape = dropout, scaling, x.shape
        return y_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        kept_ND, h_NR, b_OR, a_RD, weight_OD, mask_ND = ctx.saved_tensors
        of_x, of_a, of_b = ctx.needs_input_grad[:3]
        grad_NO = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_a = grad_b = None
        if of_b:
            grad_b = _scaled_product(grad_NO.T, h_NR, ctx.scaling)
        if of_x or of_a:
            grad_h_NR = _scaled_product(grad_NO, b_OR, ctx.scaling)
        if of_a:
            grad_a = grad_h_NR.T @ kept_ND
        if of_x:
            grad_x = grad_NO @ weight_OD.to(grad.dtype)
            if mask_ND is None:
                _add_product(grad_x, grad_h_NR, a_RD, 1.0)
            else:
                share = 1 - ctx.dropout
                grad_x.addcmul_(grad_h_NR @ a_RD, mask_ND, value=1 / share if share else 0.0)
            grad_x = grad_x.view(ctx.shape)
        return grad_x, grad_a, grad_b, None, None, None, None


# Both matmuls write to `out`: with torch.addmm's own result, cuBLAS would first copy what is added. FlopCounterMode
# does not count `addmm_` (torch 2.15).


def _add_product(out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> None:
    """Add `scaling * left @ right` in place, with one rounding."""
    torch.addmm(out, left, right, alpha=scaling, out=out)


def _scaled_product(left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """`scaling * left @ right`, with one rounding."""
    out = left.new_empty(left.shape[0], right.shape[1])
    return torch.addmm(out, left, right, beta=0, alpha=scaling, out=out)


def _forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The forward of one of PEFT's layers. Whatever `adapted_linear` does not compute is left to the layer's class."""
    name = None if args or kwargs else _adapter_of(self, x)
    if name is None:
        return type(self).forward(self, x, *args, **kwargs)
    base, dropout = self.base_layer, self.lora_dropout[name]
    return adapted_linear(
        x,
        self.lora_A[name].weight,
        self.lora_B[name].weight,
        base.weight,
        base.bias,
        dropout=dropout.p if isinstance(dropout, torch.nn.Dropout) and dropout.training else 0.0,
        scaling=self.scaling[name],
    )


def _adapter_of(layer: Any, x: torch.Tensor) -> str | None:
    """The one adapter that a layer applies, if `adapted_linear` can compute it; otherwise None."""
    if layer.disable_adapters or layer.merged:
        return None
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(names) != 1 or names[0] in layer.lora_variant:
        return None
    name = names[0]
    base, a, b, dropout = layer.base_layer, layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if not all(type(part) is torch.nn.Linear and _bare(part) for part in (base, a, b)) or b.bias is not None:
        return None
    if type(dropout) not in (torch.nn.Dropout, torch.nn.Identity) or not _bare(dropout):
        return None
    weight, bias = base.weight, base.bias
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        return None
    if any(_is_special(part.weight) for part in (base, a, b)):
        return None
    # Without autocast a linear layer refuses two dtypes, and autocast does not convert float64.
    dtypes = {tensor.dtype for tensor in (x, weight, bias) if tensor is not None}
    fits = len(dtypes) == 1 if _autocast(x) is None else torch.float64 not in dtypes
    return name if fits else None


def _bare(module: torch.nn.Module) -> bool:
    """Whether calling a module does no more than its class: no hook would be missed."""
    own = vars(module)
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in own and not any(own[kind] for kind in hooks)


def _is_special(weight: torch.Tensor) -> bool:
    """Whether a weight is quantised, or distributed over processes."""
    partitioned = hasattr(weight, "ds_id")  # by DeepSpeed's ZeRO-3: the weight is empty outside its module's forward
    return weight.dtype not in _PLAIN or partitioned or hasattr(type(weight), "__tensor_flatten__")
