"""Decodes chosen frames of a video file with PyAV, with as little work as is safe.

`vlft.data.media.frames` builds the index of the frames. A seek may lead to a wrong place. So a frame after a seek is
used only if every packet since its key frame equals the packet that the index has there; else frames are counted from
the start.

Letters in shapes: H, W of the upright frame.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from vlft.data.media.containers import opened, pyav, pyav_errors, video_stream
from vlft.data.media.frames import FrameIndex, mark, number_of
from vlft.data.media.pictures import Unreadable


class _Lost(Exception):
    """Seeking did not lead to the expected packets."""


def decode_frames(path: str, index: FrameIndex, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """Decode some frames.

    Args:
        wanted: indices of the frames, ascending, without repeats.

    Yields:
        uint8 [H, W, 3], RGB, upright.

    Raises:
        Unreadable: a frame cannot be decoded.
    """
    pyav()
    from av.video.reformatter import VideoReformatter

    converter, done = VideoReformatter(), 0
    for read in (_sought, _counted):
        if done < len(wanted):
            for frame in read(path, index, wanted[done:]):
                yield _rgb(frame, index, converter)
                done += 1


@dataclass(frozen=True, kw_only=True)
class _Starts:
    """Where decoding can begin.

    Attributes:
        place: number of a packet -> position of the frame that is decoded from it.
        keys: numbers of the packets of key frames, ascending.
        positions: position of the first frame that can be decoded from each of `keys`, ascending.
        known: time, position and size of such a packet -> its index in `keys`.
    """

    place: dict[int, int]
    keys: list[int]
    positions: list[int]
    known: dict[tuple[int | None, int | None, int], int]


def _starts(index: FrameIndex) -> _Starts | None:
    """Find where decoding can begin; None if packets cannot be distinguished, or contain several frames."""
    place = {int(number): position for position, number in enumerate(index.shown)}
    first = int(index.shown.min())
    hidden = [key for key in index.keys if key < first]  # the first frames of a clip that was cut need one of these
    keys = hidden[-1:] + [key for key in index.keys if key in place]
    positions = [place.get(key, 0) for key in keys]
    known = {index.packets[key]: i for i, key in enumerate(keys)}
    if len(place) < len(index.shown) or len(known) < len(keys):
        return None
    if any(before > after for before, after in pairwise(positions)):
        return None
    return _Starts(place=place, keys=keys, positions=positions, known=known)


def _sought(path: str, index: FrameIndex, wanted: Sequence[int]) -> Iterator[Any]:
    """Yield wanted frames, each decoded from the last key frame before it. Ends early if that is not safe."""
    starts = _starts(index)
    if starts is None:
        return
    try:
        with opened(path) as container:
            stream, at = video_stream(container, path), -1
            frames: Iterator[tuple[int, Any]] = iter(())
            for position in wanted:
                before = bisect_right(starts.positions, position) - 1
                if before < 0:
                    return
                if at < 0 or starts.positions[before] > at + 1:
                    frames = _from_key(container, stream, index, starts, before)
                frame = None
                while at < position and (following := next(frames, None)):
                    at, frame = following
                if at != position or frame is None:
                    return
                yield frame
    except _Lost:
        return
    except pyav_errors():
        return  # `_counted` finds and reports what is wrong


def _from_key(
    container: Any, stream: Any, index: FrameIndex, starts: _Starts, before: int
) -> Iterator[tuple[int, Any]]:
    """Yield frames with their positions, from this key frame on, or from an earlier one if seeking leads there.

    Raises:
        _Lost: packets or frames differ from those of a reading from the start.
    """
    found, following = _seek(container, stream, index, starts, before)
    number, start, expected = starts.keys[found], starts.positions[found], None
    for packet in following:
        if packet.size:
            if number >= len(index.packets) or _print(packet) != index.packets[number]:
                raise _Lost
            packet.opaque = mark(number)
            number += 1
        for frame in packet.decode():
            at = starts.place.get(number_of(frame), -1)
            if at < start and expected is None:
                continue  # a leading picture of the key frame, which needs earlier frames
            if frame.is_corrupt or (expected is not None and at != expected):
                raise _Lost
            expected = at + 1
            yield at, frame


def _seek(container: Any, stream: Any, index: FrameIndex, starts: _Starts, before: int) -> tuple[int, Iterator[Any]]:
    """Seek to a key frame, or an earlier one. Returns the index in `keys` that was reached, and the packets from it."""
    key = starts.keys[before]
    times = [
        index.packets[key][0],
        *(index.keys[number] for number in starts.keys[max(before - 1, 0) : before + 1][::-1]),
    ]
    if before == 0:
        times.append(0)
    # Some containers seek by decoding times, some by presentation times. An earlier key frame only costs time.
    for time in dict.fromkeys(time for time in times if time is not None):
        container.seek(time, stream=stream)
        packets = container.demux(stream)
        for packet in packets:
            found = starts.known.get(_print(packet)) if packet.is_keyframe else None
            if found is not None and found <= before:
                return found, _chain(packet, packets)
            if found is not None:
                break
    raise _Lost


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _print(packet: Any) -> tuple[int | None, int | None, int]:
    return packet.pts, packet.pos, packet.size


def _counted(path: str, index: FrameIndex, wanted: Sequence[int]) -> Iterator[Any]:
    """Yield wanted frames, counted from the first frame."""
    left, count = iter(wanted), 0
    following = next(left)
    try:
        with opened(path) as container:
            for frame in container.decode(video_stream(container, path)):
                if count == following:
                    yield frame
                    following = next(left, -1)
                    if following < 0:
                        return
                count += 1
    except pyav_errors() as error:
        reason = f"damaged between frames {count} and {following} of {len(index.shown)} ({error})"
        raise Unreadable(f"{path}: {reason}. Fetch or encode it again") from error
    raise Unreadable(f"{path}: damaged: {count} of {len(index.shown)} frames can be decoded. Fetch or encode it again")


def _rgb(frame: Any, index: FrameIndex, converter: Any) -> np.ndarray:
    """Convert a frame to uint8 [H, W, 3], rotated as the container says, and resized to the size of the first frame."""
    turns = frame.rotation // 90
    height, width = (index.width, index.height) if turns % 2 else (index.height, index.width)
    # One thread: the loader's workers run in parallel, and starting threads takes longer than converting small frames.
    rgb = converter.reformat(frame, width=width, height=height, format="rgb24", threads=1)
    return np.rot90(rgb.to_ndarray(), turns)
