"""Sends batches from a loader's worker to the trainer and to its device, whatever their content is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

SMALL = 1 << 20  # bytes
PACKED = 8 << 20  # bytes of a tensor below which it is sent to a GPU together with others; copying it takes about 1 ms
ALIGNED = 16  # bytes; kernels and views in another dtype need aligned addresses


class Parcel:
    """A mapping that arrives as a plain dict, with its small tensors inside the message.

    torch puts each tensor into its own shared memory and sends its file descriptor over its own connection. That takes
    about as long for a list of five lengths as for half a picture. Large tensors are still sent that way.
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
    return _Small(value) if isinstance(value, torch.Tensor) and value.nbytes < SMALL else value


def _opened(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _opened(inner) for key, inner in value.items()}
    return torch.from_numpy(value.array) if isinstance(value, _Small) else value


def moved(value: Any, device: torch.device) -> Any:
    """A value of a batch with its tensors, also those inside a mapping, on a device. The copies are only queued.

    A GPU takes a copy without making the host wait only from pinned memory. So all tensors below `PACKED` are packed
    into one pinned buffer and sent in one copy, and the results are views of that buffer on the GPU. A larger tensor,
    such as the patches, is sent on its own. A loader that pins its batches has pinned it already.
    """
    tensors = list(_tensors(value))
    if device.type == "cuda":
        return _with(value, iter(_sent_to_gpu(tensors, device)))
    return _with(value, (tensor.to(device) for tensor in tensors))


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, torch.Tensor):
        yield value


def _with(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The value with other tensors, in the order of `_tensors`."""
    if isinstance(value, Mapping):
        return {key: _with(inner, tensors) for key, inner in value.items()}
    return next(tensors) if isinstance(value, torch.Tensor) else value


def _sent_to_gpu(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    small = [tensor.device.type == "cpu" and tensor.nbytes < PACKED for tensor in tensors]
    packed = iter(_sent_in_one([tensor for tensor, is_small in zip(tensors, small, strict=True) if is_small], device))
    return [
        next(packed) if is_small else _pinned(tensor).to(device, non_blocking=True)
        for tensor, is_small in zip(tensors, small, strict=True)
    ]


def _sent_in_one(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    ends = list(itertools.accumulate((-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors), initial=0))
    if not ends[-1]:
        return [tensor.to(device) for tensor in tensors]

    def parts(buffer: torch.Tensor) -> list[torch.Tensor]:
        places = zip(tensors, ends, strict=False)
        return [buffer[start : start + one.nbytes].view(one.dtype).view(one.shape) for one, start in places]

    buffer = _pinned_memory((ends[-1],), torch.uint8)
    for part, tensor in zip(parts(buffer), tensors, strict=True):
        part.copy_(tensor)
    return parts(buffer.to(device, non_blocking=True))


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, if it can be copied to a GPU without a wait, or a copy in pinned memory."""
    if tensor.device.type != "cpu" or tensor.is_pinned():
        return tensor
    return _pinned_memory(tensor.shape, tensor.dtype).copy_(tensor)


def _pinned_memory(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, pin_memory=True)  # torch caches it, and waits until its copy is done


def sent(batch: Any) -> Any:
    """Wrap the result of a collate function: in a loader's worker a `Parcel` with the batch, else the batch itself."""
    return batch if get_worker_info() is None else Parcel(batch)
