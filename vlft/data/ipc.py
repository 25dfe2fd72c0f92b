"""Sends batches from a loader's worker to the trainer and to its device, whatever their content is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from vlft.data.pixel_memory import Place, place_of, received, room_to_send

SMALL = 1 << 20  # bytes of a tensor that is copied into the message, or beside it
INLINE = 1 << 16  # bytes of all such tensors that are part of the message itself
PACKED = 8 << 20  # bytes of a tensor below which it is sent to a GPU together with others; copying it takes about 1 ms
ALIGNMENT = 64  # bytes; kernels and views in another dtype need aligned addresses


class Parcel:
    """A mapping that arrives as a plain dict, with its tensors in few pieces of memory.

    torch puts each tensor into its own shared memory and sends its file descriptor over its own connection. That takes
    about as long for a list of five lengths as for half a picture. Here pixels are in memory that the trainer already
    has (`vlft.data.pixel_memory`), and all small tensors are copied into one more piece of it. Large tensors in other
    memory are sent as torch does.

    Args:
        batch: a mapping, also of mappings. Values other than tensors are pickled.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self._small: list[torch.Tensor] = []
        self._end = 0
        self._content = self._marked(batch)
        room = room_to_send(self._end) if self._end > INLINE else None
        self._copies = torch.empty(self._end, dtype=torch.uint8) if room is None else room
        copies = self._copies.numpy()
        start = 0
        for tensor in self._small:  # by torch, because numpy has no bfloat16
            _part(copies, start, tensor.dtype, tensor.shape).copy_(tensor)
            start += _aligned(tensor.nbytes)

    def __reduce__(self) -> tuple[Any, ...]:
        copies = place_of(self._copies) or self._copies.numpy()
        return _opened, (_placed(self._content), copies)

    def _marked(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._marked(inner) for key, inner in value.items()}
        if not isinstance(value, torch.Tensor) or value.nbytes >= SMALL:
            return value
        self._small.append(value)
        start, self._end = self._end, self._end + _aligned(value.nbytes)
        return _Copy(start, value.dtype, tuple(value.shape))


class _Copy(NamedTuple):
    """A small tensor, among the copies of a parcel."""

    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def _part(whole: np.ndarray, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """Return some bytes of `whole`, uint8 [...], as a tensor.

    Its storage has these bytes alone: pickle and `copy.deepcopy` write whole storages, pickle once for each tensor.
    """
    return torch.from_numpy(whole[start : start + math.prod(shape) * dtype.itemsize]).view(dtype).view(shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _placed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _placed(inner) for key, inner in value.items()}
    return (place_of(value) or value) if isinstance(value, torch.Tensor) else value


def _opened(content: Any, copies: Place | np.ndarray) -> Any:
    return _filled(content, copies if isinstance(copies, np.ndarray) else received(copies).numpy())


def _filled(value: Any, copies: np.ndarray) -> Any:
    """The content of a parcel with its tensors.

    It is not a function inside `_opened`: one that calls itself refers to itself, and would keep `copies`, and so their
    segment, until Python looks for such cycles.
    """
    if isinstance(value, dict):
        return {key: _filled(inner, copies) for key, inner in value.items()}
    if isinstance(value, _Copy):
        return _part(copies, value.start, value.dtype, value.shape)
    return received(value) if isinstance(value, Place) else value


def moved(value: Any, device: torch.device) -> Any:
    """A value of a batch with its tensors, also those inside a mapping, on a device. The copies are only queued.

    A GPU takes a copy without making the host wait only from pinned memory. So all tensors below `PACKED` are packed
    into one pinned buffer and sent in one copy, and the results are views of that buffer on the GPU. A larger tensor,
    such as the pixels, is sent on its own. A loader that pins its batches has pinned it already.
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
    ends = list(itertools.accumulate((_aligned(tensor.nbytes) for tensor in tensors), initial=0))
    if not ends[-1]:
        return [tensor.to(device) for tensor in tensors]

    def parts(buffer: torch.Tensor) -> list[torch.Tensor]:
        places = zip(tensors, ends, strict=False)  # the last end is where no tensor starts
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
