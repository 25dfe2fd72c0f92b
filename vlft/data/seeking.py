"""Some frames of a video file, decoded by PyAV with as little work as is safe. What frames it has: `vlft.data.frames`.

A seek may lead anywhere. So a frame that was sought is taken only where the packets read since its key frame are, one
by one, those that a reading from the start has there; else frames are counted from the start.

Letters in shapes: H, W of the upright frame.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from vlft.data.containers import opened, pyav, pyav_errors, video_stream
from vlft.data.frames import FrameIndex
from vlft.data.pictures import Unreadable


class _Lost(Exception):
    """Seeking did not lead to the packets that it should."""


def decode_frames(path: str, index: FrameIndex, wanted: Sequence[int]) -> Iterator[np.ndarray]:
    """Decode some frames.

    Args:
        wanted: which, ascending, without repeats.

    Yields:
        uint8 [H, W, 3], RGB, upright.

    Raises:
        Unreadable: a frame cannot be decoded.
    """
    pyav()
    from av.video.reformatter import VideoReformatter

    left, converter = list(wanted), VideoReformatter()
    for read in (_sought, _counted):
        for frame in read(path, index, left):
            yield _rgb(frame, index, converter)
            left = left[1:]


def _sought(path: str, index: FrameIndex, wanted: Sequence[int]) -> Iterator[Any]:
    """Wanted frames, each decoded from the last key frame before it; ends early where that cannot be done safely."""
    place = {int(number): position for position, number in enumerate(index.shown)}
    starts = [(place[key], key) for key in index.keys if key in place]
    known = {index.packets[key]: key for _, key in starts}
    if len(place) < len(index.shown) or len(known) < len(starts) or not wanted:
        return
    if any(before >= after for (before, _), (after, _) in pairwise(starts)):
        return
    positions = np.array([position for position, _ in starts])
    try:
        with opened(path) as container:
            stream, at, frames = video_stream(container, path), -1, iter(())
            for position in wanted:
                before = int(np.searchsorted(positions, position, side="right")) - 1
                if before < 0:
                    return
                if at < 0 or starts[before][0] > at + 1:
                    frames = _from_key(container, stream, index, starts[before][1], known, place)
                frame = None
                while at < position and (following := next(frames, None)):
                    at, frame = following
                if at != position or frame is None:
                    return
                yield frame
    except (_Lost, *pyav_errors()):
        return  # what is wrong, `_counted` finds and says


def _from_key(
    container: Any, stream: Any, index: FrameIndex, key: int, known: dict, place: dict[int, int]
) -> Iterator[tuple[int, Any]]:
    """Frames with their places, from that of the key frame on, or from an earlier key frame where the file leads there.

    Raises:
        _Lost: other packets, or other frames, than a reading from the start gives.
    """
    number, following = _seek(container, stream, index, key, known)
    start, expected = place[number], None
    for packet in following:
        if packet.size:
            if number >= len(index.packets) or _print(packet) != index.packets[number]:
                raise _Lost
            packet.opaque = number
            number += 1
        for frame in packet.decode():
            at = place.get(frame.opaque, -1)
            if at < start and expected is None:
                continue  # a picture that leads the key frame, and needs those before it
            if frame.is_corrupt or (expected is not None and at != expected):
                raise _Lost
            expected = at + 1
            yield at, frame


def _seek(container: Any, stream: Any, index: FrameIndex, key: int, known: dict) -> tuple[int, Iterator[Any]]:
    """The number of the key frame that seeking leads to, at or before the one meant, and the packets from it on."""
    keys = [number for number in index.keys if number <= key][-2:]
    times = [index.packets[key][0], *(index.keys[number] for number in reversed(keys))]
    if len(keys) == 1:
        times.append(0)
    # Some containers seek by the times of decoding, some by those of showing; a key frame too early costs time only.
    for time in dict.fromkeys(time for time in times if time is not None):
        container.seek(time, stream=stream)
        packets = container.demux(stream)
        for packet in packets:
            number = known.get(_print(packet)) if packet.is_keyframe else None
            if number is not None and number <= key:
                return number, _chain(packet, packets)
            if number is not None:
                break
    raise _Lost


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _print(packet: Any) -> tuple[int | None, int | None, int]:
    return packet.pts, packet.pos, packet.size


def _counted(path: str, index: FrameIndex, wanted: Sequence[int]) -> Iterator[Any]:
    """Wanted frames, counted from the first one."""
    left, count = list(wanted), 0
    if not left:
        return
    try:
        with opened(path) as container:
            for frame in container.decode(video_stream(container, path)):
                if count == left[0]:
                    yield frame
                    left.pop(0)
                    if not left:
                        return
                count += 1
    except pyav_errors() as error:
        reason = f"damaged between frames {count} and {left[0]} of {len(index.shown)} ({error})"
        raise Unreadable(f"{path}: {reason}. Fetch or encode it again") from error
    raise Unreadable(f"{path}: damaged: {count} of {len(index.shown)} frames can be decoded. Fetch or encode it again")


def _rgb(frame: Any, index: FrameIndex, converter: Any) -> np.ndarray:
    """uint8 [H, W, 3], turned as the container says; of the first frame's size, should the size change on the way."""
    turns = frame.rotation // 90
    height, width = (index.width, index.height) if turns % 2 else (index.height, index.width)
    # One thread: loader workers are the threads, and starting others takes longer than small frames do.
    rgb = converter.reformat(frame, width=width, height=height, format="rgb24", threads=1)
    return np.rot90(rgb.to_ndarray(), turns)
