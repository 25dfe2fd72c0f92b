"""Write a base whose files are quantised again in 16 or 32 bits, so that an adapter can be merged into it.

Each quantised tensor gets the dtype that it had before, which its scales record. Neighbours: `vlft.merge.quantised` has
the values that are merged, which are not rounded to that dtype first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.checkpoint import copy_configs, processor_files, read_json, rewrite
from vlft.errors import CheckpointError
from vlft.model.quantised_files import QuantisedFiles
from vlft.text import gib

if TYPE_CHECKING:
    import torch


def write_dequantised(files: QuantisedFiles, out: Path, progress: Callable[[str], None]) -> None:
    """Write a model folder without quantised tensors.

    Args:
        files: of the base.
        out: an empty folder.
        progress: called with a line of text per file.

    Raises:
        CheckpointError: the disk has too little space for this folder and the merged one.
    """
    need = 2 * files.dense_bytes()
    free = shutil.disk_usage(out).free
    if need > free:
        raise CheckpointError(
            f"{out.parent}: the base is dequantised first, and this copy and the merged weights need "
            f"{gib(need)}; {gib(free)} are free on its disk. Free some space or use an OUT on "
            "another disk."
        )
    parts = tuple(f"{name}." for name in files.packed_names())

    def change(name: str, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        if name.startswith(parts):
            return []
        published = files.family.published_name(name)
        if published in files.states:
            tensor = files.weight(published).to(files.dtype(published))
        return [(name, tensor)]

    rewrite(files.folder, out, change, progress=progress, doing="dequantise")
    copy_configs(files.folder, out)
    config = _without_quantisation(read_json(files.folder / "config.json"))
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    for file in processor_files(files.folder, files.folder):
        shutil.copyfile(file, out / file.name)


def _without_quantisation(config: Any) -> Any:
    """A copy of a config without `quantization_config`, also in its parts."""
    if not isinstance(config, dict):
        return config
    return {key: _without_quantisation(value) for key, value in config.items() if key != "quantization_config"}
