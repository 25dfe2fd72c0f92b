"""Print how a base counts pixels, for the scripts in scripts/: the side of a token, and what a video's limits mean.

    python -m vlft.cli.base_pixels Qwen/Qwen3-VL-4B-Instruct        prints `32 clip`

`clip` means that --video_max_pixels is for all frames of a video together, `frame` that it is for each frame. Reads
config.json only. Needs no torch.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vlft.errors import CheckpointError
from vlft.families import Family
from vlft.model_files import read_json


def base_pixels(model_id: str) -> tuple[int, str]:
    """Return the side of a token in pixels, and `clip` or `frame`.

    Args:
        model_id: a model folder or a hub id.

    Raises:
        CheckpointError: config.json cannot be read, or the model is not supported.
        OSError: the hub has no such model, or cannot be reached.
    """
    folder = Path(model_id).expanduser()
    if folder.is_dir():
        file = folder / "config.json"
    else:
        from huggingface_hub import hf_hub_download

        file = Path(hf_hub_download(model_id, "config.json"))
    config = read_json(file)
    family = Family.of(config.get("model_type"), where=model_id)
    return family.factor, "clip" if family.video_rule == "processor" else "frame"


if __name__ == "__main__":
    try:
        print(*base_pixels(sys.argv[1]))
    except (CheckpointError, OSError, ValueError) as error:  # ValueError: the name is no hub id
        sys.exit(str(error))
