"""Keys of cached features: a hash of everything that decides the pixels of a picture or video.

It covers all bytes of its files, the pixel and frame settings, and the versions of the packages that decode and resize.
A file's name, time and place are not part of it: a copied data set keeps its features, and a changed file has others.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
from dataclasses import asdict

from vlft.config.recipe import Recipe
from vlft.data.media.read import recipe_for
from vlft.data.sample import Image, Media

KEY_BYTES = 16
FORMAT = 1  # increase it whenever pixels or features may differ from earlier ones
#: Packages that decode and resize.
PACKAGES = ("pillow", "torch", "torchvision", "qwen-vl-utils", "decord", "av")
#: Settings of a recipe that change no pixel. All others are part of the key, also those that are added later.
NO_PIXELS = (
    *("max_length", "over_length", "missing_tags", "columns", "fit", "box_format", "thinking", "turns"),
    *("chat_template", "tokenizer", "switches", "tokens_per_second", "frames_fps", "video_time"),
    "pairs",
)
#: Settings that change no pixel of a still.
OF_VIDEOS = (
    *("video_min_pixels", "video_max_pixels", "fps", "nframes", "video_max_frames", "video_rule"),
    *("min_frames", "frame_tokens"),
)

#: Size in bytes, time of modification in nanoseconds and number of each file of a medium.
Stamps = tuple[tuple[int, int, int], ...]


def stamps_of(media: Media) -> Stamps | None:
    """Return what changes if a file of the medium is replaced during decoding; None if a file cannot be read."""
    try:
        found = [os.stat(path) for _, path in media.files]
    except (OSError, ValueError):
        return None
    return tuple((one.st_size, one.st_mtime_ns, one.st_ino) for one in found)


def key_of(media: Media, recipe: Recipe, *, tower: str) -> bytes | None:
    """Return the key of a medium's features: `KEY_BYTES`. Reads its files whole.

    Args:
        media: a picture or video.
        recipe: of the run. What the row itself sets is applied to it.
        tower: `vlft.model.prints.tower_print` of the tower that computes the features.

    Returns:
        None if a file cannot be read; decoding it gives the error for the user.

    Raises:
        MediaError: the row's settings contradict those of the run.
    """
    settings = asdict(recipe_for(media, recipe))
    still = isinstance(media, Image)
    for name in (*NO_PIXELS, *(OF_VIDEOS if still else ())):
        settings.pop(name, None)
    span = () if still else (media.overrides.video_start, media.overrides.video_end)
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    what = [FORMAT, tower, _versions(), "still" if still else "video", media.path is None, span, settings]
    digest.update(json.dumps(what, sort_keys=True).encode())
    try:
        for _, path in media.files:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "blake2b").digest())
    except (OSError, ValueError):
        return None
    return digest.digest()


@functools.cache
def _versions() -> tuple[str | None, ...]:
    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return tuple(map(version, PACKAGES))
