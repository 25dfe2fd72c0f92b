"""Opens video files: number, rate and size of their frames, and the pixels of chosen frames.

PyAV finds the frames (`vlft.data.media.frames`) and decodes them (`vlft.data.media.seeking`). The stock path,
qwen-vl-utils 0.0.14, reads with decord. decord returns the same pixels of the same frames if it finds them, but it
finds wrong frames in MPEG-TS and MPEG-PS, with B-frames in AVI, and in open groups of pictures. Its pixels differ where
its old FFmpeg converts frames to RGB in another way: frames of more than 8 bits, of odd sizes, or interlaced. decord
decodes these clips if it is certain to find their frames. Independent of rows, budgets and tokens.

Letters in shapes: H, W of the upright frame; K frames read at a time.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

from vlft.data.media.containers import pyav, pyav_errors
from vlft.data.media.frames import FrameIndex, index_frames
from vlft.data.media.kinds import mistaken
from vlft.data.media.lengths import cut_short
from vlft.data.media.mp4 import HARMLESS, MOST_BOXES, TooManyBoxes, samples_beyond
from vlft.data.media.pictures import Unreadable, require_file
from vlft.data.media.seeking import decode_frames

FRAMES_AT_A_TIME = 8
# A frame four times as large as one of 8K video.
FRAME_PIXELS = 4 * 7680 * 4320
# Eight frames of 4K: 0.2 GB, and four times that in float32, in which they are resized.
PIXELS_AT_A_TIME = 8 * 3840 * 2160
# decord 0.6.0 reads these correctly, if groups of pictures are closed. A test reads each of them with it.
DECORD_CONTAINERS = ("mov", "matroska")
DECORD_CODECS = ("h264", "hevc", "vp9", "libvpx-vp9")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """An opened video file.

    Attributes:
        path: path of the file.
        frames: number of frames shown.
        fps: mean frames per second.
        height: height of an upright frame, in pixels.
        width: width of an upright frame, in pixels.
        times: when each frame is shown, in seconds from the first one; empty if the file does not say.
        index: index of its frames, for PyAV.
        decord: the decord reader that `read_frames` tries first, or None if PyAV reads.
    """

    path: str
    frames: int
    fps: float
    height: int
    width: int
    times: np.ndarray = field(repr=False)
    index: FrameIndex = field(repr=False)
    decord: Any = None


def open_clip(path: str) -> Clip:
    """Open a video file and count its frames.

    Raises:
        Unreadable: the file is missing, is not a video, is truncated, has no frame rate, or has frames that are too
            large to be opened safely.
        ConfigError: PyAV is not installed.
    """
    require_file(path)
    _refuse_others(path)
    size = _refuse_false_boxes(path)
    try:
        index = index_frames(path, before=lambda stream: _refuse_false_header(path, size, stream))
    except pyav_errors() as error:
        raise _unreadable(path, error) from error
    frames = len(index.shown)
    if frames == 1 and (why := mistaken(path, "video")):
        raise Unreadable(f"{path}: {why}")
    _refuse_large(path, index.height, index.width)
    fps = index.rate
    if not fps and len(index.times) > 1:
        fps = (frames - 1) / float(index.times[-1])
    if not (math.isfinite(fps) and fps > 0):
        raise Unreadable(f"{path}: does not say its frame rate ({fps}). Encode it again")
    clip = Clip(
        path=path, frames=frames, fps=fps, height=index.height, width=index.width, times=index.times, index=index
    )
    return clip if index.plain else _with_decord(clip)


def read_frames(clip: Clip, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Decode some frames, a few at a time.

    Args:
        indices: indices of the frames, ascending, without repeats.

    Yields:
        uint8 [K, H, W, 3], K at most `FRAMES_AT_A_TIME`, RGB.

    Raises:
        Unreadable: a frame cannot be decoded.
    """
    left = list(indices)
    together = max(1, min(FRAMES_AT_A_TIME, PIXELS_AT_A_TIME // (clip.height * clip.width)))
    while clip.decord is not None and left:
        some = left[:together]
        frames = _try_decord(clip.decord.get_batch, some)
        if frames is None:
            break  # decord stops at damage that PyAV may skip
        yield frames.asnumpy()
        left = left[len(some) :]
    rest = decode_frames(clip.path, clip.index, left)
    while left and (stack := list(islice(rest, together))):
        yield np.stack(stack)


def _with_decord(clip: Clip) -> Clip:
    """Return the clip with decord as its reader, if decord is installed and finds the same frames."""
    index = clip.index
    proved = index.container.split(",")[0] in DECORD_CONTAINERS and index.codec in DECORD_CODECS and index.closed
    if not proved or not len(index.times):
        return clip
    # Load PyAV first: decord 0.6.0 loads its old codec libraries globally, and a PyAV loaded later would bind to them.
    pyav()
    try:
        import decord
    except ImportError:
        return clip
    decord.logging.set_level(decord.logging.QUIET)  # FFmpeg prints remarks on every unusual file
    reader = _try_decord(decord.VideoReader, clip.path, num_threads=1)  # loader workers are the threads
    first = None if reader is None or len(reader) != clip.frames else _try_decord(reader.__getitem__, 0)
    if first is None or first.shape != (clip.height, clip.width, 3):
        return clip  # decord returns garbled frames of 4 channels for clips that their metadata rotates
    return replace(clip, decord=reader)


def _try_decord(read: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the result of `read`, or None if decord fails."""
    from decord import DECORDError

    try:
        return read(*args, **kwargs)
    except (DECORDError, RuntimeError, AssertionError):
        return None


def _refuse_others(path: str) -> None:
    """Refuse text, archives and truncated files before a reader opens them."""
    try:
        why = mistaken(path, "video", sure=True)
        if why is None and (cut := cut_short(path)):
            why = f"{cut}. Fetch or encode it again"
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error}). Check its disk and permissions") from error
    if why is not None:
        raise Unreadable(f"{path}: {why}")


def _refuse_false_boxes(path: str) -> int:
    """Refuse an MP4 whose index would fill the memory in FFmpeg. Returns the file's size in bytes."""
    try:
        size, claimed = os.path.getsize(path), samples_beyond(path)
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error}). Check its disk and permissions") from error
    except TooManyBoxes as error:
        raise Unreadable(f"{path}: more than {MOST_BOXES:,} boxes in it, which no film has. Encode it again") from error
    if claimed is not None:
        raise _claims(path, claimed, size)
    return size


def _refuse_false_header(path: str, size: int, stream: Any) -> None:
    """Refuse a stream whose header alone would make a reader fill the memory."""
    if stream.frames > max(size, HARMLESS):  # decord allocates a list of this length
        raise _claims(path, stream.frames, size)
    _refuse_large(path, stream.codec_context.height, stream.codec_context.width)


def _claims(path: str, samples: int, size: int) -> Unreadable:
    return Unreadable(f"{path}: claims {samples:,} frames or samples in {size:,} bytes. Fetch or encode it again")


def _unreadable(path: str, error: Exception) -> Unreadable:
    why = mistaken(path, "video")
    return Unreadable(f"{path}: {why or f'not a video that PyAV can read ({error}). Fetch or encode it again'}")


def _refuse_large(path: str, height: int, width: int) -> None:
    if height * width > FRAME_PIXELS:
        raise Unreadable(
            f"{path}: frames of {width}x{height}, {FRAME_PIXELS:,} pixels at most are opened safely. Make them smaller"
        )
