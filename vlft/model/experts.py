"""How a model computes its experts, for the log of a run. vlft leaves the choice to transformers.

`grouped_mm`, the default of transformers 5.17 to 5.23, sorts tokens by expert on the device and reads nothing back. But
torch has that kernel only for bf16 on GPUs of generation 9 and 10 (torch 2.10 to 2.15). Elsewhere it reads the number
of tokens of each expert and computes one expert after the other.
"""

from __future__ import annotations

import torch

from vlft.model import adapt


def described(model: torch.nn.Module, device: torch.device) -> str:
    """Which function computes the experts, and whether the host waits for the device in each layer.

    Args:
        model: with experts, with or without PEFT.
        device: where the run computes.
    """
    name, dtype = adapt.experts(model)
    if device.type != "cuda":
        return name
    generation, _ = torch.cuda.get_device_capability(device)
    if name != "grouped_mm":
        reason = "it reads which experts are used"
    elif dtype is not torch.bfloat16:
        reason = f"its weights are in {dtype}, and torch has a kernel only for bf16".replace("torch.", "")
    elif generation not in (9, 10):
        reason = f"torch has no kernel for GPUs of generation {generation}"
    else:
        return name
    return f"{name}, which waits for the device in each layer: {reason}"
