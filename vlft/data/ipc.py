"""Sends batches from a loader's worker to the trainer and to its device, whatever their content is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import get_worker_info

from vlft.data.patch_memory import Place, place_of, received

SMALL = 1 << 20  # bytes


class Parcel:
    """A mapping that arrives as a plain dict, with its small tensors inside the message.

    torch puts each tensor into its own shared memory and sends its file descriptor over its own connection. That takes
    about as long for a list of five lengths as for half a picture. Large tensors are still sent that way, unless they
    are in memory that the trainer already has (`vlft.data.patch_memory`).
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        return _opened, (_packed(self.batch),)


class _Small:
    """A tensor inside the message."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.array = tensor.numpy()


def _packed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _packed(inner) for key, inner in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    return _Small(value) if value.nbytes < SMALL else place_of(value) or value


def _opened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _opened(inner) for key, inner in value.items()}
    if isinstance(value, Place):
        return received(value)
    return torch.from_numpy(value.array) if isinstance(value, _Small) else value


def moved(value: Any, device: torch.device) -> Any:
    """A value of a batch with its tensors, also those inside a mapping, on a device. The copies are only queued."""
    if isinstance(value, Mapping):
        return {key: moved(inner, device) for key, inner in value.items()}
    return value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value


def sent(batch: Any) -> Any:
    """Wrap the result of a collate function: in a loader's worker a `Parcel` with the batch, else the batch itself."""
    return batch if get_worker_info() is None else Parcel(batch)
