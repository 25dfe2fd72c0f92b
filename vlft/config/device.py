"""Whether the GPU of this process supports bf16. Needs torch, loads no model."""

from __future__ import annotations


def has_bf16() -> bool:
    """Whether there is a GPU with native bf16.

    GPUs of compute capability below 8 (V100, T4, RTX 20) emulate bf16, slower than float32, and torch by default
    reports that they support it.
    """
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def without_bf16() -> str | None:
    """Return the name of this process's GPU if it has no native bf16; None if it has, or if there is no GPU."""
    import torch

    if not torch.cuda.is_available() or has_bf16():
        return None
    return torch.cuda.get_device_name()
