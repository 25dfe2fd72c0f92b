"""Build the optimizer of a run from its parameter groups.

Neighbours: `vlft.config.table` refuses the names of `--optim` that cannot be built this way, `vlft.plan.optimizers`
counts the bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vlft.errors import ConfigError
from vlft.model.groups import Group


def build(
    cls: Any, options: Mapping[str, Any], groups: Sequence[Group], model: torch.nn.Module, *, optim: str
) -> torch.optim.Optimizer:
    """Return an optimizer with one parameter group for each group.

    Args:
        cls: the class of the optimizer, as transformers' Trainer finds it.
        options: its arguments besides the parameters.
        groups: trained groups, with their rate and weight decay.
        model: whose parameters they are.
        optim: `--optim`, for messages.

    Raises:
        ConfigError: the optimizer brings its own parameter groups.
    """
    if {"params", "model", "optimizer_dict"} & set(options) or not isinstance(cls, type):
        raise ConfigError(
            f"--optim {optim}: brings its own parameter groups, which would drop --vision_lr, --merger_lr and "
            "--weight_decay. Use an AdamW variant, Adafactor or SGD."
        )
    on_cpu = all(tensor.device.type == "cpu" for group in groups for tensor in group.tensors)
    if on_cpu and "triton" in inspect.signature(cls).parameters:
        options = {**options, "triton": False}  # torch-optimi 0.3.3 would start its GPU kernels on a CPU
    optimizer = cls(
        [{"params": list(g.tensors), "lr": g.lr, "weight_decay": g.weight_decay, "name": g.name} for g in groups],
        **options,
    )
    if options.get("optim_bits") == 8:
        _keep_embeddings_in_32_bits(optimizer, model)
    return optimizer


def _keep_embeddings_in_32_bits(optimizer: Any, model: torch.nn.Module) -> None:
    """Set 32-bit moments for embeddings in an 8-bit optimizer of bitsandbytes, as transformers' Trainer does.

    transformers registers them in a manager of the whole process. It would keep the model in memory after the run, and
    find later tensors by the id of one that is gone. So this optimizer has a manager of its own.
    """
    manager_class: Any = type(optimizer.mng)
    optimizer.mng = manager_class.__new__(manager_class)  # its constructor only refuses to make a second one
    optimizer.mng.initialize()
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            optimizer.mng.override_config(module.weight, "optim_bits", 32)
