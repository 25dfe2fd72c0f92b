"""Clips whose frame i shows i as six black or white blocks, which every codec keeps; and the table of what PyAV writes.

A frame that comes out of a decoder so says itself which one it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

FRAMES = 60
MILLISECOND = Fraction(1, 1000)
TS = {"ts": "mpegts", "m2ts": "mpegts", "y4m": "yuv4mpegpipe"}  # endings that name no muxer of FFmpeg
STILL_OPTIONS = ("libvpx", "libvpx-vp9", "libsvtav1")  # coders that refuse a number of B-frames
INTERLACED = 1 << 18 | 1 << 29  # AV_CODEC_FLAG_INTERLACED_DCT and _ME


def numbered(i: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Frame i, uint8 [height, width, 3]."""
    frame = np.full((height, width, 3), 128, np.uint8)
    for bit, block in enumerate(_blocks(width, height)):
        frame[block] = 225 if i >> bit & 1 else 30
    return frame


def number_of(frame: np.ndarray) -> int:
    """What a frame of any size shows."""
    height, width = frame.shape[:2]
    blocks = _blocks(width, height, margin=4)
    return sum(int(frame[block].mean() > 128) << bit for bit, block in enumerate(blocks))


def _blocks(width: int, height: int, margin: int = 0):
    h, w = height // 2, width // 3
    for row in range(2):
        for column in range(3):
            yield slice(row * h + margin, (row + 1) * h - margin), slice(column * w + margin, (column + 1) * w - margin)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A clip: container by its ending, codec, B-frames in a row, frames from key frame to key frame."""

    ending: str
    codec: str
    bframes: int = 0
    gop: int = 12
    kind: str = ""  # open, long, altref
    pix_fmt: str = "yuv420p"
    size: tuple[int, int] = (96, 64)
    fps: int = 10

    @property
    def name(self) -> str:
        kind = f"-{self.kind}" if self.kind else ""
        return f"{self.ending}-{self.codec}-b{self.bframes}{kind}.{self.ending}"

    @property
    def options(self) -> dict[str, str]:
        gop = f"keyint={self.gop}:min-keyint={self.gop}:scenecut=0:bframes={self.bframes}:b-adapt=0"
        open_gop = int(self.kind == "open")
        return {
            "libx264": {"preset": "veryfast", "x264-params": f"{gop}:open-gop={open_gop}"},
            "libx265": {"preset": "ultrafast", "x265-params": f"{gop}:open-gop={open_gop}:log-level=none"},
            "libvpx": _vpx(self.kind),
            "libvpx-vp9": _vpx(self.kind),
            "libsvtav1": {"preset": "12", "svtav1-params": "keyint=12"},
            "snow": {"strict": "-2"},
            "dnxhd": {"profile": "dnxhr_sq"},
        }.get(self.codec, {})


def _vpx(kind: str) -> dict[str, str]:
    if kind == "altref":
        return {"deadline": "good", "cpu-used": "4", "auto-alt-ref": "1", "lag-in-frames": "16"}
    return {"deadline": "realtime", "cpu-used": "8"}


def write(path: Path, recipe: Recipe, **more: Any) -> Path:
    """The clip of a recipe. `more`: see `encode`."""
    return encode(
        path,
        codec=recipe.codec,
        size=recipe.size,
        pix_fmt=recipe.pix_fmt,
        fps=recipe.fps,
        gop=recipe.gop,
        bframes=None if recipe.codec in STILL_OPTIONS else recipe.bframes,
        options=recipe.options,
        **more,
    )


def encode(
    path: Path,
    *,
    codec: str = "libx264",
    frames: int = FRAMES,
    size: tuple[int, int] = (96, 64),
    pix_fmt: str = "yuv420p",
    fps: Any = 10,
    gop: int = 12,
    bframes: int | None = 2,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    times: Any = None,
    flags: int = 0,
    cover: bool = False,
    second: tuple[int, int] | None = None,
    comment: str = "",
    **context: Any,
) -> Path:
    """A clip of numbered frames.

    Args:
        options, container: of encoder and muxer.
        times: of i: when frame i is shown, in milliseconds; default: at a constant rate.
        flags, context: of the encoder.
        cover: a cover picture is its first stream. second: size of a second video stream, black.
        comment: in the container's metadata.
    """
    import av

    width, height = size
    with av.open(f"file:{path}", "w", format=TS.get(path.suffix[1:]), container_options=container or {}) as out:
        if comment:
            out.metadata["comment"] = comment
        covers = out.add_stream("mjpeg", rate=1) if cover else None
        stream = out.add_stream(codec, rate=fps, options=options or Recipe(ending="", codec=codec, bframes=2).options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.gop_size = gop
        stream.codec_context.flags |= flags
        if bframes is not None:
            stream.codec_context.max_b_frames = bframes
        if codec not in ("libx264", "libx265", "libsvtav1", "rawvideo", "gif", "apng", "dvvideo", "dnxhd"):
            stream.codec_context.bit_rate = 2_000_000
        if times is not None:
            stream.codec_context.time_base = stream.time_base = MILLISECOND
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        other = out.add_stream(codec, rate=fps) if second else None
        if other is not None:
            other.width, other.height, other.pix_fmt = (*second, "yuv420p")
        if covers is not None:
            covers.width, covers.height, covers.pix_fmt = 32, 32, "yuvj420p"
            covers.disposition = av.stream.Disposition.attached_pic
            blank = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            out.mux([*covers.encode(blank.reformat(format="yuvj420p")), *covers.encode()])
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(numbered(i, width, height), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times(i), MILLISECOND
            out.mux(stream.encode(frame))
            if other is not None:
                out.mux(
                    other.encode(av.VideoFrame.from_ndarray(np.zeros((*second[::-1], 3), np.uint8), format="rgb24"))
                )
        out.mux(stream.encode())
        if other is not None:
            out.mux(other.encode())
    return path


def remux(source: Path, path: Path, keep: Any) -> Path:
    """The packets of a clip for whose number `keep` says so, as a cut by stream copy makes it."""
    import av

    with av.open(str(source)) as old, av.open(str(path), "w", format=TS.get(path.suffix[1:])) as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for i, packet in enumerate(old.demux(stream)):
            if packet.size and keep(i):
                packet.stream = copy
                new.mux(packet)
    return path


def plain(path: Path) -> list[np.ndarray]:
    """All frames of a file as PyAV decodes them, from the first to the last: what every reader is compared with."""
    import av

    with av.open(f"file:{path}", metadata_errors="replace") as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.best("video"))]


def _table() -> list[Recipe]:
    def many(endings: str, codecs: str, bframes: tuple[int, ...] = (0,), kinds: str = "", **how: Any) -> list[Recipe]:
        return [
            Recipe(ending=ending, codec=codec, bframes=b, kind=kind, gop=250 if kind == "long" else 12, **how)
            for ending in endings.split()
            for codec in codecs.split()
            for b in bframes
            for kind in kinds.split() or [""]
        ]

    all_b = (0, 2, 3)
    return [
        *many("mp4 mov mkv ts m2ts avi flv h264 3gp nut", "libx264", all_b),
        *many("mp4 mov mkv ts m2ts avi flv h264 3gp nut mpg", "libx264", (3,), "open long"),
        *many("mp4 mov mkv ts hevc", "libx265", (0, 3)),
        *many("mp4 mov mkv ts", "libx265", (3,), "open"),
        *many("mp4 mov mkv ts m2ts avi mpg vob", "mpeg1video mpeg2video", all_b, fps=25),
        *many("mp4 mov mkv ts m2ts avi m4v wmv", "mpeg4", all_b),
        *many("mp4 avi", "mpeg4", (2,), "long"),
        *many("ts mxf m2v m1v", "mpeg2video", (0, 2), fps=25),
        *many("webm mkv mp4 ivf avi", "libvpx-vp9"),
        *many("webm mkv mp4 ivf avi", "libvpx-vp9", (0,), "altref"),
        *many("webm mkv ivf avi ogv", "libvpx"),
        *many("webm mkv ivf avi ogv", "libvpx", (0,), "altref"),
        *many("webm mkv mp4 ivf avif", "libsvtav1"),
        *many("avi asf wmv", "msmpeg4 msmpeg4v2 wmv1 wmv2 flv"),
        *many("avi asf wmv mov mkv mp4 mjpeg", "mjpeg", pix_fmt="yuvj420p"),
        *many("flv swf", "flv"),
        *many("3gp avi rm", "h263", size=(176, 144)),
        *many("rm", "rv10 rv20", size=(176, 144)),
        *many("mkv avi nut", "ffv1 ffvhuff utvideo magicyuv rawvideo snow jpeg2000"),
        *many("avi nut", "huffyuv", pix_fmt="yuv422p"),
        *many("avi mov nut", "png cinepak", pix_fmt="rgb24"),
        *many("mov", "qtrle", pix_fmt="rgb24"),
        *many("avi nut", "zmbv", pix_fmt="bgr0"),
        *many("mov mkv", "prores_ks", pix_fmt="yuv422p10le"),
        *many("avi mov nut", "cfhd", pix_fmt="yuv422p10le"),
        *many("avi mov nut", "svq1", pix_fmt="yuv410p"),
        *many("avi nut", "msvideo1", pix_fmt="rgb555le"),
        *many("mov", "dnxhd", pix_fmt="yuv422p", size=(256, 128)),
        *many("dv", "dvvideo", size=(720, 576), fps=25),
        *many("gif", "gif", pix_fmt="gray"),
        *many("apng", "apng", pix_fmt="rgb24"),
        *many("y4m", "rawvideo"),
    ]


MATRIX = tuple({recipe.name: recipe for recipe in _table()}.values())
#: A few that seeking gets wrong, one of each kind, and a few that it does not: for every run of the tests.
FEW = tuple(
    recipe
    for recipe in MATRIX
    if recipe.name.rpartition(".")[0]
    in (
        "mp4-libx264-b2",
        "mp4-libx264-b3-open",
        "mkv-libx265-b3-open",
        "mp4-mpeg4-b2",
        "mkv-mpeg2video-b2",
        "avi-mpeg4-b2",
        "avi-libx264-b2",
        "avi-mpeg1video-b0",
        "ts-libx264-b2",
        "m2ts-mpeg2video-b3",
        "ts-mpeg2video-b2-long",
        "mpg-mpeg1video-b2",
        "vob-mpeg2video-b3",
        "wmv-wmv2-b0",
        "flv-libx264-b3-open",
        "h264-libx264-b2",
        "webm-libvpx-vp9-b0-altref",
        "webm-libvpx-b0",
        "gif-gif-b0",
        "mov-prores_ks-b0",
    )
)
