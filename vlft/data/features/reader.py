"""Decode a medium, or take its features from the cache. Called in the loader's workers, in place of `decode`.

A medium whose features are there is neither decoded nor resized: its files are read to make the key, and their headers
for the grid.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import replace
from multiprocessing.sharedctypes import RawValue
from pathlib import Path
from typing import TYPE_CHECKING

from vlft.config.recipe import Recipe
from vlft.data.features.keys import key_of, stamps_of
from vlft.data.features.stored import Reader
from vlft.data.media import decode as decoder
from vlft.data.media.read import measure
from vlft.data.sample import EncodedMedia, Media, Video

if TYPE_CHECKING:
    import torch

ONLY_OTHERS = -1  # sees the features of other runs only


class CachedMedia:
    """The media of one loader.

    Args:
        folder: of the tower (`vlft.data.features.stored`).
        tower: print of the tower.
        run: of the run that reads.
    """

    def __init__(self, folder: Path, *, tower: str, run: int) -> None:
        self.folder = folder
        self.tower = tower
        self.run = run
        #: The limit of `Reader.get`, shared with the loader's workers. They read the index again when it changes, so
        #: that what they see does not depend on how fast they are.
        self.limit = RawValue(ctypes.c_int64, ONLY_OTHERS)
        self._reader: Reader | None = None
        self._seen: int | None = None

    def decode(self, media: Media, recipe: Recipe) -> EncodedMedia:
        """Return a medium with its features, or with its pixels and the key to store its features.

        Raises:
            MediaError: the errors of `vlft.data.media.decode.decode`.
        """
        import torch

        before = stamps_of(media)
        key = None if before is None else key_of(media, recipe, tower=self.tower)
        if key is None:
            return decoder.decode(media, recipe)
        features = self._get(key)
        if features is not None:
            grid = measure(media, recipe)
            if grid.tokens(recipe.merge_size) == features.shape[1]:
                empty, is_video = torch.empty(0, dtype=torch.uint8), isinstance(media, Video)
                return EncodedMedia(grid=grid, pixels=empty, is_video=is_video, features=features)
        found = decoder.decode(media, recipe)
        # A file that changed in the meantime has other features than its key says.
        return replace(found, key=key) if stamps_of(media) == before else found

    def _get(self, key: bytes) -> torch.Tensor | None:
        limit = self.limit.value
        if self._reader is None:
            self._reader = Reader(self.folder, run=self.run, note=_note)
        if limit != self._seen:
            self._seen = limit
            self._reader.index.refresh()
        return self._reader.get(key, limit=limit)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
