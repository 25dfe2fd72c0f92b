"""Batches on their way from a loader's worker to the trainer. Knows torch's loader; nothing of what is in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import get_worker_info

SMALL = 1 << 20  # bytes


class Parcel:
    """A mapping that arrives as a plain dict, its small tensors sent along in the message.

    Torch puts each tensor into shared memory of its own and hands its file over by a connection of its own: about as
    long for a list of five lengths as for half a picture. Large ones still go that way.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self.batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        small = {
            key: value.numpy()
            for key, value in self.batch.items()
            if isinstance(value, torch.Tensor) and value.nbytes < SMALL
        }
        return _opened, ({**self.batch, **small}, tuple(small))


def _opened(batch: dict[str, Any], small: tuple[str, ...]) -> dict[str, Any]:
    return batch | {key: torch.from_numpy(batch[key]) for key in small}


def sent(batch: Any) -> Any:
    """What a collate function returns: in a loader's worker the batch in a `Parcel`, elsewhere the batch itself."""
    return batch if get_worker_info() is None else Parcel(batch)
