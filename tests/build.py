"""Small files for tests: photographs, clips, data files. Plain functions, no fixtures."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlft.families import DEFAULT

#: The family that tests of everything else use; those of `test_families` have a second one.
FAMILY = DEFAULT


@functools.cache
def photograph(name: str = "china") -> np.ndarray:
    """A real photograph, uint8 [H, W, 3]: china, flower (scikit-learn), astronaut, chelsea, coffee or rocket
    (scikit-image). All are files of those packages: nothing is fetched."""
    if name in ("china", "flower"):
        from sklearn.datasets import load_sample_image

        return load_sample_image(f"{name}.jpg")
    from skimage import data

    return getattr(data, name)()


def picture(width: int, height: int, *, name: str = "china") -> Image.Image:
    """A photograph brought to a size, RGB."""
    return Image.fromarray(photograph(name)).resize((width, height))


def write_image(path: Path, width: int = 90, height: int = 60, *, name: str = "china", **save: Any) -> Path:
    """A photograph as a file; its kind follows from the ending, `save` goes to `Image.save`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(width, height, name=name).save(path, **save)
    return path


def write_video(
    path: Path,
    frames: int = 12,
    width: int = 96,
    height: int = 64,
    *,
    fps: int = 6,
    codec: str = "mpeg4",
    pix_fmt: str = "yuv420p",
    name: str = "china",
    options: dict[str, str] | None = None,
) -> Path:
    """A clip that pans over a photograph; its container follows from the ending."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    wide = np.asarray(picture(2 * width, height, name=name))
    with av.open(str(path), "w", container_options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        for i in range(frames):
            left = i * width // max(frames, 1)
            view = np.ascontiguousarray(wide[:, left : left + width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_json(path: Path, rows: list) -> Path:
    """Rows as `.json` (an array) or `.jsonl` (one a line), by the ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def row(question: str = "Hi.", answer: str = "Hello.", **keys: Any) -> dict:
    """A row of one question and one answer; `keys` are the row's others (image, video, id)."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {**keys, "conversations": turns}
