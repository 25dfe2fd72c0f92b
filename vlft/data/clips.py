"""Open video files: how many frames, how fast, how large, and some of the frames. Knows no rows, budgets or tokens.

Letters in shapes: H, W of the upright frame; K frames read at a time.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from vlft.data.mp4 import HARMLESS, MOST_BOXES, TooManyBoxes, samples_beyond
from vlft.data.pictures import Unreadable, require_file
from vlft.errors import ConfigError

FRAMES_AT_A_TIME = 8
# A frame four times as large as 8K video's. Eight frames at a time of more than 4K are as many bytes as readers hold
# of them otherwise: 0.2 GB, and in float32, in which they are resized, four times that.
FRAME_PIXELS = 4 * 7680 * 4320
PIXELS_AT_A_TIME = 8 * 3840 * 2160


@dataclass(frozen=True, kw_only=True)
class Clip:
    """An opened video file.

    Attributes:
        path: of the file.
        frames: how many it holds.
        fps: mean frames a second.
        height, width: of a frame, upright, in pixels.
        decord: the reader that `read_frames` goes on with, or None where PyAV reads.
        times: where PyAV reads, when each frame is shown, ascending; empty where the file does not say.
        keys: indices of frames that can be decoded without those before them, ascending.
    """

    path: str
    frames: int
    fps: float
    height: int
    width: int
    decord: Any
    times: Sequence[int] = ()
    keys: Sequence[int] = ()


def open_clip(path: str) -> Clip:
    """Open a video file and count its frames; only its first frame is decoded.

    decord reads what it can, for that is what qwen-vl-utils 0.0.14, and so the stock path, reads with. PyAV reads the
    rest: seen with decord 0.6.0 are AV1, GIF, MPEG-TS, and clips turned by their metadata, as phones write them (decord
    gives garbled frames of 4 channels there).

    Raises:
        Unreadable: no such file, not a video, cut short, without a frame rate, too large to be opened safely.
        ConfigError: neither decord nor PyAV is installed.
    """
    require_file(path)
    header = _header(path)
    clip = _open_decord(path, header) or _open_pyav(path, header)
    if not (math.isfinite(clip.fps) and clip.fps > 0):
        raise Unreadable(f"{path}: does not say its frame rate ({clip.fps}). Encode it again")
    return clip


def read_frames(clip: Clip, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Decode some frames, a few at a time.

    Args:
        indices: which, ascending, without repeats.

    Yields:
        uint8 [K, H, W, 3], K at most `FRAMES_AT_A_TIME`, RGB.

    Raises:
        Unreadable: a frame cannot be decoded.
    """
    left, together = list(indices), _together(clip)
    while clip.decord is not None and left:
        some = left[:together]
        frames = _try_decord(clip.decord.get_batch, some)
        if frames is None:
            break  # it gives up at damage that PyAV may read past
        yield frames.asnumpy()
        left = left[len(some) :]
    if left:
        yield from _read_pyav(clip, left)


def _together(clip: Clip) -> int:
    return max(1, min(FRAMES_AT_A_TIME, PIXELS_AT_A_TIME // (clip.height * clip.width)))


def _try_decord(read: Any, *args: Any, **kwargs: Any) -> Any:
    """What `read` gives, or None where decord fails."""
    from decord import DECORDError

    try:
        return read(*args, **kwargs)
    except (DECORDError, RuntimeError, AssertionError):
        return None


def _open_decord(path: str, header: _Header | None) -> Clip | None:
    # PyAV first: decord 0.6.0 loads its old codec libraries for all to see, and a PyAV loaded later binds to those.
    _pyav()
    try:
        import decord
    except ImportError:
        return None
    decord.logging.set_level(decord.logging.QUIET)  # FFmpeg's remarks on every odd file
    reader = _try_decord(decord.VideoReader, path, num_threads=1)  # loader workers are the threads
    first = None if reader is None else _try_decord(reader.__getitem__, 0)
    if first is None or first.shape[2] != 3:
        return None
    height, width, _ = first.shape
    _refuse_large(path, height, width)
    frames = len(reader)
    end = _try_decord(reader.get_frame_timestamp, frames - 1)
    _refuse_cut(path, header, frames, None if end is None else float(end[1]))
    return Clip(path=path, frames=frames, fps=float(reader.get_avg_fps()), height=height, width=width, decord=reader)


def _open_pyav(path: str, header: _Header | None = None) -> Clip:
    try:
        with _pyav().open(path) as container:
            if not container.streams.video:
                raise Unreadable(f"{path}: holds no video. Name a video file")
            stream = container.streams.video[0]
            frames, end = 0, 0.0
            shown: dict[int, bool] = {}  # time -> key frame
            for packet in container.demux(stream):
                if packet.size:
                    frames += 1
                    if packet.pts is not None:
                        end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                        shown[packet.pts] = packet.is_keyframe
            times = sorted(shown) if len(shown) == frames else []
            keys = [i for i, time in enumerate(times) if shown[time]]
            _refuse_cut(path, header, frames, end)
            fps = float(stream.average_rate or stream.guessed_rate or 0)
        with _pyav().open(path) as container:
            for frame in container.decode(video=0):
                height, width, _ = _upright(frame).shape
                _refuse_large(path, height, width)
                return Clip(
                    path=path, frames=frames, fps=fps, height=height, width=width, decord=None, times=times, keys=keys
                )
    except _pyav_errors() as error:
        raise Unreadable(f"{path}: not a video that decord or PyAV can read ({error}). Encode it again") from error
    raise Unreadable(f"{path}: holds no frame that can be decoded. Encode it again")


def _read_pyav(clip: Clip, indices: Sequence[int]) -> Iterator[np.ndarray]:
    left = list(indices)
    for read in (_sought, _counted):
        frames = read(clip, left)
        while some := list(islice(frames, _together(clip))):
            yield np.stack(some)
            left = left[len(some) :]


def _sought(clip: Clip, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Wanted frames, each decoded from the last key frame before it; ends early where seeking does not lead there."""
    index_of = {time: i for i, time in enumerate(clip.times)}
    at = -1
    try:
        with _pyav().open(clip.path) as container:
            stream = container.streams.video[0]
            frames = container.decode(stream)
            for wanted in indices:
                before = bisect_right(clip.keys, wanted) - 1
                if before < 0:
                    return
                if clip.keys[before] > at + 1:
                    container.seek(clip.times[clip.keys[before]], stream=stream)
                    frames = container.decode(stream)
                for frame in frames:
                    at = index_of.get(frame.pts, at)
                    if at >= wanted:
                        break
                if at != wanted:
                    return
                yield _upright(frame)
    except _pyav_errors():
        return  # what is wrong, `_counted` finds and says


def _counted(clip: Clip, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Wanted frames, counted from the first one."""
    count, wanted = 0, list(indices)
    if not wanted:
        return
    try:
        with _pyav().open(clip.path) as container:
            for count, frame in enumerate(container.decode(video=0)):
                if count == wanted[0]:
                    yield _upright(frame)
                    wanted.pop(0)
                    if not wanted:
                        return
    except _pyav_errors() as error:
        reason = f"damaged between frames {count} and {wanted[0]} of {clip.frames} ({error})"
        raise Unreadable(f"{clip.path}: {reason}. Encode it again") from error
    raise Unreadable(f"{clip.path}: ends after {count + 1} of {clip.frames} frames. Encode it again")


def _upright(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3], turned as the container says."""
    return np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What a file promises: frames (0: it does not say) and seconds of video."""

    frames: int
    seconds: float | None


def _header(path: str) -> _Header | None:
    """What the header says; None where PyAV cannot read it.

    Raises:
        Unreadable: reading on would fill the memory before a frame is looked at.
    """
    try:
        size, claimed = os.path.getsize(path), samples_beyond(path)
    except OSError as error:
        raise Unreadable(f"{path}: cannot be read ({error}). Look at its disk and permissions") from error
    except TooManyBoxes as error:
        raise Unreadable(f"{path}: more than {MOST_BOXES:,} boxes in it, as no film has. Encode it anew") from error
    if claimed is not None:
        raise _claims(path, claimed, size)
    try:
        with _pyav().open(path) as container:
            if not container.streams.video:
                return None
            stream = container.streams.video[0]
            if stream.frames > max(size, HARMLESS):  # decord makes a list of so many
                raise _claims(path, stream.frames, size)
            if stream.codec_context is not None:  # None: a codec that FFmpeg does not know
                _refuse_large(path, stream.codec_context.height, stream.codec_context.width)
            seconds = None
            if stream.duration is not None:
                seconds = float(stream.duration * stream.time_base)
            elif container.duration is not None and len(container.streams) == 1:
                seconds = container.duration / 1e6
            return _Header(frames=stream.frames, seconds=seconds)
    except _pyav_errors():
        return None


def _claims(path: str, samples: int, size: int) -> Unreadable:
    return Unreadable(f"{path}: claims {samples:,} frames or samples in {size:,} bytes. Fetch or encode it again")


def _refuse_large(path: str, height: int, width: int) -> None:
    if height * width > FRAME_PIXELS:
        raise Unreadable(
            f"{path}: frames of {width}x{height}, {FRAME_PIXELS:,} pixels at most are opened safely. Make them smaller"
        )


def _refuse_cut(path: str, header: _Header | None, frames: int, end: float | None) -> None:
    """Refuse a file that holds a tenth less than its header promises; readers stop at the cut without a word.

    Args:
        frames: found in the file.
        end: when the last of them ends, in seconds.
    """
    if header is None:
        return
    if header.frames and frames < 0.9 * header.frames:
        raise Unreadable(f"{path}: cut short: {frames} of {header.frames} frames are there. Fetch or encode it again")
    if header.seconds is not None and end is not None and end < 0.9 * header.seconds and header.seconds - end > 0.5:
        reason = f"cut short: {end:.1f} of {header.seconds:.1f} s are there"
        raise Unreadable(f"{path}: {reason}. Fetch or encode it again")


def _pyav() -> Any:
    try:
        import av
    except ImportError as error:
        raise ConfigError("reading videos needs PyAV. Install it: pip install av") from error
    av.logging.set_level(av.logging.PANIC)  # damage is reported through exceptions
    return av


def _pyav_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises on a file it cannot open or decode.

    Some of FFmpeg's own errors (external library, not implemented, unknown; PyAV 18) are no built-in error besides.
    """
    return (_pyav().FFmpegError, OSError, ValueError, EOFError, LookupError, RuntimeError)
