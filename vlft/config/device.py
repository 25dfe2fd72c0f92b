"""Whether this machine has a GPU, and whether the GPU of this process supports bf16. torch is imported where used."""

from __future__ import annotations

import os
import sys

#: Files of the drivers for `torch.cuda`: NVIDIA (also under Windows' Linux) and AMD.
_CUDA = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd")
#: Files of other drivers. Most desktops have them for their display alone.
_OTHERS = ("/dev/dri",)


def may_have_gpu() -> bool:
    """Whether there may be a GPU of any kind, without asking torch. False means that there is none."""
    return not sys.platform.startswith("linux") or any(map(os.path.exists, (*_CUDA, *_OTHERS)))


def may_have_cuda() -> bool:
    """Whether there may be a GPU for `torch.cuda`, without asking torch. False means that there is none."""
    if sys.platform.startswith("linux"):
        return any(map(os.path.exists, _CUDA))
    return sys.platform != "darwin"


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
