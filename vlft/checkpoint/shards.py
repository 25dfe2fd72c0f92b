"""Write tensors to safetensors files of a limited size, named and indexed as transformers writes them.

One file's tensors are in memory at a time. `vlft.checkpoint.rewrite` hands the tensors over.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.model_files import INDEX, WEIGHTS

if TYPE_CHECKING:
    import torch


class Shards:
    """Cuts tensors into files in the order in which they come, as `huggingface_hub.split_torch_state_dict_into_shards`.

    A tensor that is larger than a file may be has a file of its own.

    Args:
        out: folder to write to. Files get their names in `finish`, when their number is known.
        largest: most bytes of the tensors of a file.
        metadata: of each file.
    """

    def __init__(self, out: Path, largest: int, metadata: dict[str, str]) -> None:
        self.out = out
        self.largest = largest
        self.metadata = metadata
        self._open: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._total = 0
        self._written: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor. Files that are full are written."""
        size = tensor.numel() * tensor.element_size()
        self._total += size
        if size > self.largest:
            self._write({name: tensor})
            return
        if self._bytes + size > self.largest:
            self._close()
        self._open[name] = tensor
        self._bytes += size

    def finish(self) -> None:
        """Write the last file and the index. A single file has no index."""
        self._close()
        count = len(self._written)
        names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
        if count == 1:
            names = [WEIGHTS]
        for number, name in enumerate(names):
            os.rename(self._unnamed(number), self.out / name)
        if count > 1:
            weight_map = {tensor: name for name, some in zip(names, self._written, strict=True) for tensor in some}
            index = {"metadata": {"total_size": self._total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _close(self) -> None:
        if self._open:
            self._write(self._open)
        self._open, self._bytes = {}, 0

    def _write(self, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors import torch as safetensors

        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        safetensors.save_file(contiguous, self._unnamed(len(self._written)), metadata=self.metadata)
        self._written.append(list(tensors))

    def _unnamed(self, number: int) -> Path:
        return self.out / f"part-{number}.safetensors"
