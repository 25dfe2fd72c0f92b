"""A fingerprint of a frozen vision tower: everything that decides the features that it computes from pixels.

The cache of features (`vlft.data.features`) keeps the features of each fingerprint apart.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from vlft import __version__
from vlft.model import adapt
from vlft.model.scale import PixelScale

THREADS = 4  # a published tower has 1.3 GB


def tower_print(
    model: torch.nn.Module,
    scale: PixelScale,
    *,
    dtype: torch.dtype,
    device: torch.device,
    choices: Mapping[str, str],
) -> str:
    """Return a fingerprint of the vision tower and its mergers, of the dtype and the kernels that compute.

    It covers the bytes of all their tensors, the config, the scale of pixels, and the versions of torch, transformers
    and vlft. It does not cover the model of the GPU: its features differ by rounding only.

    Args:
        model: ready to train, with whole weights (before ZeRO-3 shares them out).
        scale: of the base's processor.
        dtype: of matrix products.
        device: that computes.
        choices: kernel -> the one that runs, as `prepare_model` returns them, and other settings that change numbers.
    """
    visual: Any = adapt.tower(model, "vision")
    tensors = {**dict(visual.named_parameters()), **dict(visual.named_buffers())}
    with ThreadPoolExecutor(THREADS) as pool:
        hashes = dict(zip(tensors, pool.map(_hash, tensors.values()), strict=True))
    what = {
        "tensors": hashes,
        "config": visual.config.to_dict(),
        "scale": [scale.mean, scale.std],
        "dtype": str(dtype),
        "device": device.type,
        "choices": dict(choices),
        "versions": [__version__, *(importlib.metadata.version(name) for name in ("torch", "transformers"))],
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _hash(tensor: torch.Tensor) -> str:
    data = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{data.dtype}{tuple(data.shape)}".encode())
    digest.update(data.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
