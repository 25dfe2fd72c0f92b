"""Trained rows of a frozen embedding, and of the head (`--train_tokens`): PEFT holds them, this module computes them.

PEFT copies the whole embedding in every step and needs a gradient of its size. Here the rows replace results: those of
the embedding at places with such a token, and those of the logits. PEFT still owns the weights, saves and loads them.

A tied head uses the rows of the embedding. A head of its own gets rows of its own, so that a new token can be predicted
too. Neighbour: `vlft.model.loss` computes the loss of a head with rows.

Letters: T tokens, n trained tokens, C channels.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from vlft.errors import ConfigError
from vlft.families import Family
from vlft.model.loss import Rows


def setting(family: Family, config: Any, tokens: Sequence[int]) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices`; None without tokens.

    Args:
        family: of the model.
        config: transformers' config of the top class.
        tokens: ids.
    """
    names = family.ends[:1] if family.sizes(config).text.tied else family.ends
    return {name.removesuffix(".weight"): list(tokens) for name in names} if tokens else None


def bind(model: torch.nn.Module, tokens: Sequence[int]) -> None:
    """Let embedding and head of a model with PEFT's modules for these tokens compute as described above.

    Raises:
        ConfigError: PEFT has not wrapped both embedding and head.
    """
    from peft.utils.other import TrainableTokensWrapper

    found = [module for module in model.modules() if isinstance(module, TrainableTokensWrapper)]
    if len(found) != (2 if tokens else 0):
        raise ConfigError(
            f"--train_tokens: this version of peft wraps {len(found)} modules of this base, expected embedding and "
            "head. Update peft, or drop the flag."
        )
    for module in found:
        base: Any = module.token_adapter.base_layer
        ids = torch.tensor(list(tokens), device=base.weight.device)
        module.register_buffer("token_ids", ids, persistent=False)
        forward = _embed if isinstance(base, torch.nn.Embedding) else _head
        module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]


def _values(module: Any) -> torch.Tensor | None:
    """The trained rows of a module; None where the base's own rows apply: adapter switched off, or merged."""
    layer = module.token_adapter
    names = [name for name in module.active_adapters if name in layer.trainable_tokens_delta]
    if module.disable_adapters or layer.merged or len(names) != 1:
        return None
    return layer.trainable_tokens_delta[names[0]]


def _embed(self: Any, input_ids: torch.Tensor) -> torch.Tensor:
    base, values_nC = self.token_adapter.base_layer, _values(self)
    result = base(input_ids)
    if values_nC is None:
        return result
    found_Tn = input_ids[..., None] == self.token_ids
    rows_TC = functional.embedding(found_Tn.int().argmax(-1), values_nC)
    return torch.where(found_Tn.any(-1)[..., None], rows_TC.to(result.dtype), result)


def _head(self: Any, hidden: torch.Tensor, targets: torch.Tensor | None = None, *, summed: bool = True) -> torch.Tensor:
    base, values_nC = self.token_adapter.base_layer, _values(self)
    if targets is not None:
        rows = None if values_nC is None else Rows(self.token_ids, values_nC)
        return base(hidden, targets, summed=summed, rows=rows)
    logits = base(hidden)
    if values_nC is None:
        return logits
    of_rows = functional.linear(hidden, values_nC.to(base.weight.dtype))
    return logits.index_copy(-1, self.token_ids, of_rows.to(logits.dtype))
