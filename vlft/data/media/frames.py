"""Index of the frames that a video file shows, and their order, with PyAV. `vlft.data.media.seeking` decodes frames.

Containers differ in what they say about their frames: some hide samples (edit lists), some store no times (AVI, raw
streams), some begin at five seconds. So a frame is identified by the packet that it is decoded from: packets are
numbered in the order of the file, and decoders pass that number on (`AV_CODEC_FLAG_COPY_OPAQUE`).

Letters in shapes: F frames that are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlft.data.media.containers import opened, pyav_errors, video_stream
from vlft.data.media.kinds import mistaken
from vlft.data.media.pictures import Unreadable

# Containers that store one packet per frame, with the time when the frame is shown.
TIMED = ("mov", "matroska", "flv")
# A byte stream in which FFmpeg finds the frames, and guesses times that are not stored.
PARSED = "mpegts"
# Codecs for which FFmpeg's parser finds complete pictures.
PARSED_CODECS = ("h264", "hevc", "mpeg1video", "mpeg2video", "mpeg4")
HEAD = 8  # frames decoded at the start, to check that they match the packets
EMPTY_VOP = 16  # bytes; a smaller MPEG-4 packet may stand for a frame that was stored in the packet before


@dataclass(frozen=True, kw_only=True)
class FrameIndex:
    """Index of the frames of a video file.

    Attributes:
        packets: presentation time, byte position and size in bytes of each packet, in the order of the file; together
            they distinguish packets. Times are in the file's units; None if the file does not say.
        keys: numbers of the packets that can be decoded without earlier ones, ascending -> their decoding times.
        shown: int64 [F], number of the packet that each frame is decoded from, in the order of showing.
        times: float64 [F], when each frame is shown, in seconds from the first one; [0] if the file does not say.
        rate: mean frames per second that the file states; 0 if it does not.
        height: height of the first frame, upright, in pixels.
        width: width of the first frame, upright, in pixels.
        codec: FFmpeg's name of the codec.
        container: FFmpeg's name of the container format.
        plain: every version of FFmpeg converts the first frame to RGB in the same way: it has 8 bits and whole chroma
            samples, and is not interlaced.
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
        """Whether every packet is a frame, and no frame that is shown before a key frame is stored after it."""
        keys = list(self.keys)
        if len(self.shown) != len(self.packets) or keys[:1] != [0]:
            return False
        latest = np.maximum.accumulate(self.shown)
        return bool((latest[np.argsort(self.shown)[keys]] == keys).all())


def index_frames(path: str, *, before: Callable[[Any], None] = lambda stream: None) -> FrameIndex:
    """Find the frames of a video file. Every packet is read, and as few frames are decoded as is safe.

    Args:
        before: called with the stream before a packet is read; may raise.

    Raises:
        Unreadable: the file is not a video, or none of its frames can be decoded.
        ConfigError: PyAV is not installed.
    """
    with opened(path) as container:
        stream = video_stream(container, path)
        before(stream)
        name = container.format.name
        timed = name.split(",")[0] in TIMED
        scan = _Scan(stream, all_frames=not timed and not (name == PARSED and stream.name in PARSED_CODECS))
        scan.read(container, path)
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        unit, codec = float(stream.time_base or 0), stream.codec_context.name
    shown = scan.given if scan.all_frames else _by_time(scan, regular=not timed)
    if shown is None:
        with opened(path) as container:
            scan = _Scan(video_stream(container, path), all_frames=True)
            scan.read(container, path)
        shown = scan.given
    if scan.first is None or not shown:
        raise Unreadable(f"{path}: holds no frame that can be decoded. Fetch or encode it again")
    if -1 in shown:  # the decoder does not pass numbers on, so frames are counted
        shown, scan.keys = list(range(len(shown))), {}
    pts = [scan.packets[number][0] for number in shown] if scan.keys else [None]
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
    """Return the rate that FFmpeg guessed for a container without one, or that of the frames' times if they differ."""
    if len(times) < 2:
        return rate
    seen = (len(times) - 1) / float(times[-1])
    off = 1.1 if _even(times) else 2.0
    return rate if seen / off <= rate <= seen * off else seen


def _even(times: Sequence[float] | np.ndarray) -> bool:
    """Whether frames follow each other at a constant rate."""
    steps = np.diff(np.asarray(times, dtype=np.float64))
    return bool(steps.min() >= 0.9 * np.median(steps) and steps.max() <= 1.1 * np.median(steps))


class _Scan:
    """One reading of all packets.

    Args:
        stream: the video stream.
        all_frames: decode every frame, not only the first `HEAD`.
    """

    def __init__(self, stream: Any, *, all_frames: bool) -> None:
        self.stream = stream
        self.all_frames = all_frames
        self.packets: list[tuple[int | None, int | None, int]] = []
        self.keys: dict[int, int | None] = {}
        self.hidden: set[int] = set()
        self.doubtful = False  # some packet may have no frame of its own
        self.given: list[int] = []  # packet numbers of the decoded frames
        self.first: Any = None

    def read(self, container: Any, path: str) -> None:
        """Read all packets.

        Raises:
            Unreadable: the file is damaged after the first packet.
        """
        try:
            for packet in container.demux(self.stream):
                if packet.size:
                    self._note(packet)
                if self.all_frames or len(self.given) < HEAD:
                    packet.opaque = mark(len(self.packets) - 1)
                    self._take(packet.decode())
        except pyav_errors() as error:
            if not self.packets or (not self.given and mistaken(path, "video")):
                raise
            where = f"after its first {len(self.given)} frames" if self.given else "at its first frame"
            raise Unreadable(f"{path}: damaged {where} ({error}). Fetch or encode it again") from error

    def _take(self, frames: list[Any]) -> None:
        for frame in frames:
            if self.first is None:
                self.first = frame
            self.given.append(number_of(frame))

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
    """Return the frames in the order of their packets' times; None if the times do not prove that order.

    Args:
        regular: require equal distances between frames, so that none of them is a field or half a frame.
    """
    visible = [number for number in range(len(scan.packets)) if number not in scan.hidden]
    times = {number: time for number in visible if (time := scan.packets[number][0]) is not None}
    if scan.doubtful or not scan.given or len(set(times.values())) < len(visible):
        return None
    shown = sorted(visible, key=times.__getitem__)
    if scan.given[0] not in times:
        return None
    # Leading pictures of a clip that was cut between two groups of pictures cannot be decoded and are not shown.
    shown = shown[shown.index(scan.given[0]) :]
    if shown[: len(scan.given)] != scan.given[: len(shown)]:
        return None
    if regular and len(shown) > 1 and not _even([times[number] for number in shown]):
        return None
    return shown


def mark(number: int) -> tuple[int]:
    """Build the object that a packet passes on to its frames, with the packet's number.

    Each packet needs its own object: up to PyAV 18, packets that share one lose it when the first of them is freed.
    """
    return (number,)


def number_of(frame: Any) -> int:
    """Return the number of the packet that a frame was decoded from; -1 if the decoder does not pass it on."""
    return -1 if frame.opaque is None else int(frame.opaque[0])


def upright_size(frame: Any) -> tuple[int, int]:
    """Return (H, W) of a frame, rotated as the container says."""
    return (frame.width, frame.height) if frame.rotation // 90 % 2 else (frame.height, frame.width)


def _plain(frame: Any) -> bool:
    whole = frame.format.chroma_width(2) == 2 and frame.format.chroma_height(2) == 2
    even = whole or (frame.width % 2 == 0 and frame.height % 2 == 0)
    return even and not frame.interlaced_frame and all(part.bits <= 8 for part in frame.format.components)
