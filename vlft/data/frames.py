"""Which frames a video file shows, in which order, and the decoding of some of them, by PyAV. Knows no budgets.

Containers differ in what they say of their frames: some hide samples (edit lists), some store no times (AVI, raw
streams), some begin at five seconds, and a seek may lead anywhere. So a frame is known by the packet that gives it:
packets are numbered in the order of the file, and decoders hand that number on (`AV_CODEC_FLAG_COPY_OPAQUE`). A frame
that was sought is taken only where the packets read since its key frame are, one by one, those that a reading from the
start has there; else frames are counted from the start.

Letters in shapes: F frames that are shown; H, W of the upright frame.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlft.data.pictures import Unreadable
from vlft.errors import ConfigError

# Containers that store a packet for each frame, with the time when it is shown.
TIMED = ("mov", "matroska", "flv")
# A stream of bytes in which FFmpeg finds the frames, and guesses the times that are not written there.
PARSED = "mpegts"
# Coders of which FFmpeg's parser finds whole pictures.
PARSED_CODECS = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")
# Formats that name other files or addresses instead of holding frames: they are not followed.
LISTS = ("hls", "concat", "dash", "sdp", "rtsp", "rtp", "imf", "webm_dash_manifest", "image2", "applehttp")
HEAD = 8  # frames decoded at the start, to see that they are those the packets promise
EMPTY_VOP = 16  # bytes; an MPEG-4 packet of fewer may stand for a frame that came with the packet before


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """What a video file shows.

    Attributes:
        packets: time, place in the file and size in bytes of each packet, in the order of the file; together they tell
            one packet from another. Times are in the file's units; None where it does not say.
        keys: numbers of the packets that can be decoded without those before them, ascending -> when each is decoded.
        shown: int64 [F], the number of the packet that gives each frame, in the order in which they are shown.
        times: float64 [F], when each frame is shown, in seconds from the first one; [0] where the file does not say.
        rate: mean frames a second, as the file says; 0 where it does not.
        height, width: of the first frame, upright, in pixels.
        codec, container: as FFmpeg names them.
        plain: the first frame becomes RGB in the same way in every version of FFmpeg: 8 bits, whole chroma samples,
            not interlaced.
    """

    packets: Sequence[tuple[int | None, int | None, int]] = field(repr=False)
    keys: Mapping[int, int | None] = field(repr=False)
    shown: np.ndarray = field(repr=False)
    times: np.ndarray = field(repr=False)
    rate: float
    height: int
    width: int
    codec: str
    container: str
    plain: bool

    @property
    def closed(self) -> bool:
        """Whether every packet is a frame, and no frame that is shown before a key frame is stored behind it."""
        keys = list(self.keys)
        if len(self.shown) != len(self.packets) or keys[:1] != [0]:
            return False
        latest = np.maximum.accumulate(self.shown)
        return bool((latest[np.argsort(self.shown)[keys]] == keys).all())


class _Lost(Exception):
    """Seeking did not lead to the packets that it should."""


def index_frames(path: str, *, before: Callable[[Any], None] = lambda stream: None) -> FrameIndex:
    """Find the frames of a video file: every packet is read, and as few frames are decoded as is safe.

    Args:
        before: called with the stream before a packet is read; may raise.

    Raises:
        Unreadable: not a video, or one of which no frame can be decoded.
        ConfigError: PyAV is not installed.
    """
    with opened(path) as container:
        stream = video_stream(container, path)
        before(stream)
        name = container.format.name
        timed = name.split(",")[0] in TIMED
        scan = _Scan(stream, all_frames=not timed and not (name == PARSED and stream.name in PARSED_CODECS))
        scan.read(container)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        unit, codec = float(stream.time_base or 0), stream.codec_context.name
    if scan.all_frames:
        shown = scan.given
    else:
        shown = _by_time(scan, regular=not timed)
        if shown is None:
            with opened(path) as container:
                scan = _Scan(video_stream(container, path), all_frames=True)
                scan.read(container)
            shown = scan.given
    if scan.first is None or not shown:
        raise Unreadable(f"{path}: holds no frame that can be decoded. Fetch or encode it again")
    pts = [scan.packets[number][0] for number in shown]
    times = np.array([]) if None in pts else (np.array(pts, dtype=np.float64) - float(pts[0] or 0)) * unit
    if len(times) and (np.diff(times) <= 0).any():
        times = np.array([])
    height, width = upright_size(scan.first)
    return FrameIndex(
        packets=scan.packets,
        keys=scan.keys,
        shown=np.array(shown, dtype=np.int64),
        times=times,
        rate=rate if timed else _checked_rate(rate, times),
        height=height,
        width=width,
        codec=codec,
        container=name,
        plain=_plain(scan.first),
    )


def _checked_rate(rate: float, times: np.ndarray) -> float:
    """The rate that FFmpeg guesses where a container stores none, unless the times of the frames show another."""
    if len(times) < 2:
        return rate
    seen = (len(times) - 1) / float(times[-1])
    off = 1.1 if _even(times) else 2.0
    return rate if seen / off <= rate <= seen * off else seen


def _even(times: Sequence[float] | np.ndarray) -> bool:
    """Whether frames follow each other at one rate."""
    steps = np.diff(np.asarray(times, dtype=np.float64))
    return bool(steps.min() >= 0.9 * np.median(steps) and steps.max() <= 1.1 * np.median(steps))


class _Scan:
    """One reading of all packets.

    Args:
        stream: of the video. all_frames: decode every frame, not only the first `HEAD`.
    """

    def __init__(self, stream: Any, *, all_frames: bool) -> None:
        self.stream = stream
        self.all_frames = all_frames
        self.packets: list[tuple[int | None, int | None, int]] = []
        self.keys: dict[int, int | None] = {}
        self.hidden: set[int] = set()
        self.doubtful = False  # some packet may give no frame of its own
        self.given: list[int] = []  # numbers of the frames that were decoded
        self.first: Any = None

    def read(self, container: Any) -> None:
        for packet in container.demux(self.stream):
            if packet.size:
                self._note(packet)
            if self.all_frames or len(self.given) < HEAD:
                packet.opaque = len(self.packets) - 1
                for frame in packet.decode():
                    if self.first is None:
                        self.first = frame
                    self.given.append(frame.opaque)

    def _note(self, packet: Any) -> None:
        number = len(self.packets)
        self.packets.append((packet.pts, packet.pos, packet.size))
        if packet.is_keyframe:
            self.keys[number] = packet.dts
        if packet.is_discard:
            self.hidden.add(number)
        if self.stream.codec_context.name == "mpeg4":
            self.doubtful = self.doubtful or packet.size < EMPTY_VOP
        elif self.stream.codec_context.name in ("vp8", "libvpx"):
            self.doubtful = self.doubtful or not memoryview(packet)[0] & 0x10  # RFC 6386, 9.1: show_frame


def _by_time(scan: _Scan, *, regular: bool) -> list[int] | None:
    """The frames in the order of their packets' times; None where times do not prove it.

    Args:
        regular: take it only where all are equally far apart, so that none is a field or half a frame.
    """
    visible = [number for number in range(len(scan.packets)) if number not in scan.hidden]
    times = {number: scan.packets[number][0] for number in visible}
    if scan.doubtful or not scan.given or None in times.values() or len(set(times.values())) < len(visible):
        return None
    shown = sorted(visible, key=times.__getitem__)
    if scan.given[0] not in times:
        return None
    # Leading pictures of a clip that was cut between two groups of pictures cannot be decoded, and are not shown.
    shown = shown[shown.index(scan.given[0]) :]
    if shown[: len(scan.given)] != scan.given[: len(shown)]:
        return None
    if regular and len(shown) > 1 and not _even([float(times[number] or 0) for number in shown]):
        return None
    return shown


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
    if any(before >= after for (before, _), (after, _) in zip(starts, starts[1:], strict=False)):
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
                for at, frame in frames:
                    if at >= position:
                        break
                if at != position:
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
    raise Unreadable(
        f"{path}: damaged: {count} of {len(index.shown)} frames can be decoded. Fetch or encode it again"
    )


def _rgb(frame: Any, index: FrameIndex, converter: Any) -> np.ndarray:
    """uint8 [H, W, 3], turned as the container says; of the first frame's size, should the size change on the way."""
    turns = frame.rotation // 90
    height, width = (index.width, index.height) if turns % 2 else (index.height, index.width)
    # One thread: loader workers are the threads, and starting others takes longer than small frames do.
    rgb = converter.reformat(frame, width=width, height=height, format="rgb24", threads=1)
    return np.rot90(rgb.to_ndarray(), turns)


def upright_size(frame: Any) -> tuple[int, int]:
    """(H, W) of a frame, turned as the container says."""
    return (frame.width, frame.height) if frame.rotation // 90 % 2 else (frame.height, frame.width)


def _plain(frame: Any) -> bool:
    whole = frame.format.chroma_width(2) == 2 and frame.format.chroma_height(2) == 2
    even = whole or (frame.width % 2 == 0 and frame.height % 2 == 0)
    return even and not frame.interlaced_frame and all(part.bits <= 8 for part in frame.format.components)


def video_stream(container: Any, path: str) -> Any:
    """The stream that FFmpeg takes for the main one, which is no cover picture.

    Raises:
        Unreadable: there is none, or FFmpeg has no decoder for it.
    """
    if container.format.name in LISTS:
        raise Unreadable(f"{path}: a list of other files ({container.format.name}), which is not followed. Name the video")
    stream = container.streams.best("video")
    if stream is None:
        if container.streams.video:
            raise Unreadable(f"{path}: holds video that this PyAV has no decoder for. Encode it again, as H.264, say")
        what = "sound, and no video" if container.streams.audio else "no video"
        raise Unreadable(f"{path}: holds {what}. Name a video file")
    if stream.disposition.value & ATTACHED_PICTURE:
        raise Unreadable(f"{path}: holds sound and a cover picture, and no video. Name a video file")
    if stream.codec_context is None:
        raise Unreadable(f"{path}: holds video that this PyAV has no decoder for. Encode it again, as H.264, say")
    stream.codec_context.thread_count = 1  # loader workers are the threads
    stream.codec_context.flags |= COPY_OPAQUE
    return stream


ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC
COPY_OPAQUE = 1 << 7  # AV_CODEC_FLAG_COPY_OPAQUE


def opened(path: str) -> Any:
    """A file as PyAV opens it, whatever its name and its metadata look like; a context.

    Raises:
        ConfigError: PyAV is not installed.
    """
    return pyav().open(f"file:{path}", metadata_errors="replace")


def pyav() -> Any:
    """PyAV, silent: damage is reported through exceptions."""
    try:
        import av
    except ImportError as error:
        raise ConfigError("reading videos needs PyAV. Install it: pip install av") from error
    av.logging.set_level(av.logging.PANIC)
    return av


def pyav_errors() -> tuple[type[Exception], ...]:
    """What PyAV raises on a file it cannot open or decode.

    Some of FFmpeg's own errors (external library, not implemented, unknown; PyAV 18) are no built-in error besides.
    """
    return (pyav().FFmpegError, OSError, ValueError, EOFError, LookupError, RuntimeError)
