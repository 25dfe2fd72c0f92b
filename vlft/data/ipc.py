"""Sends batches from a loader's worker to the trainer. Depends on torch's loader, not on the content of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.utils.data import get_worker_info

SMALL = 1 << 20  # bytes


class Parcel:
    """A mapping that arrives as a plain dict, with its small tensors inside the message.

    torch puts each tensor into its own shared memory and sends its file descriptor over its own connection. That takes
    about as long for a list of five lengths as for half a picture. Large tensors are still sent that way.
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
    """Wrap the result of a collate function: in a loader's worker a `Parcel` with the batch, else the batch itself."""
    return batch if get_worker_info() is None else Parcel(batch)
