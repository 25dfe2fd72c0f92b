"""Pictures and videos as parts of a row, and the tiny processor's settings to decode them by."""

from __future__ import annotations

import struct

import numpy as np

from vlft.config.recipe import Recipe
from vlft.data.sample import Image, Video
from vlft.demo.tiny import tiny_processor

PROCESSOR = tiny_processor()

SETTINGS = Recipe.of(PROCESSOR)


def image(path) -> Image:
    return Image(path=str(path), field="image")


def video(path) -> Video:
    return Video(path=str(path), field="video")


def turn(path, degrees):
    """Write a rotation into the track header of an .mp4, as phones do."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    cos, sin = {90: (0, one), 180: (-one, 0), 270: (0, -one)}[degrees]
    data[at : at + 36] = struct.pack(">9i", cos, sin, 0, -sin, cos, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def grid_of(media) -> list[int]:
    return [media.grid.t, media.grid.h, media.grid.w]


def pixels(media) -> np.ndarray:
    """[F, H, W, 3] of a video, of the size that its grid says."""
    t, h, w = grid_of(media)
    assert media.pixels.shape == (2 * t, 14 * h, 14 * w, 3)
    return media.pixels.numpy()
