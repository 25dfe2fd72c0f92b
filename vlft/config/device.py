"""What the GPU of this process can compute in, asked before anything is loaded."""

from __future__ import annotations


def has_bf16() -> bool:
    """Whether there is a GPU with bf16 of its own.

    Those of compute capability below 8 (V100, T4, RTX 20) emulate it, slower than float32, and torch says by default
    that they have it.
    """
    import torch

    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def without_bf16() -> str | None:
    """The name of the GPU of this process where it has no bf16; None where it has, and where there is no GPU."""
    import torch

    if not torch.cuda.is_available() or has_bf16():
        return None
    return torch.cuda.get_device_name()
