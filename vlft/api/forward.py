"""The forward of the model that `load_model` returns: it takes the batches of `data_loader`, and stock inputs."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from typing import Any

import torch

from vlft.config.training import TrainFlags
from vlft.data.ipc import moved
from vlft.model.forward import FORWARD_KEYS, OPTIONAL_KEYS


def take_batches(model: torch.nn.Module, args: TrainFlags) -> None:
    """Bind a forward that takes the batches of `data_loader` and weights their loss."""
    inner, half, world = model.forward, args.half, args.world_size

    @functools.wraps(inner)  # generate() reads the signature of `forward`
    def forward(self: torch.nn.Module, *args: Any, **batch: Any) -> Any:
        if not batch and (not args or isinstance(args[0], Mapping)):
            raise TypeError("the model takes keywords: call model(**batch) with a batch of data_loader()")
        if batch.get("cu_seqlens") is None:
            return inner(*args, **batch)
        device = next(self.parameters()).device
        more = {key: batch[key] for key in OPTIONAL_KEYS if key in batch}
        taken = moved({key: batch[key] for key in FORWARD_KEYS} | more, device)
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            outputs = inner(**taken, return_logits=batch.get("return_logits", False))
        tokens = batch.get("num_items_in_batch") or max(1, len(batch["targets"]))
        outputs.loss = outputs.loss * (world / tokens)  # DDP averages gradients over processes
        return outputs

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
