"""Opens video files with PyAV and finds their video stream. Reads no packet."""

from __future__ import annotations

from typing import Any

from vlft.data.media.pictures import Unreadable
from vlft.errors import ConfigError

# Formats that name other files or addresses instead of containing frames. They are not followed.
LISTS = ("hls", "concat", "dash", "sdp", "rtsp", "rtp", "imf", "webm_dash_manifest")
ATTACHED_PICTURE = 0x400  # AV_DISPOSITION_ATTACHED_PIC
COPY_OPAQUE = 1 << 7  # AV_CODEC_FLAG_COPY_OPAQUE


def opened(path: str) -> Any:
    """Open a file with PyAV, for any name and any encoding of its metadata. The result is a context manager.

    Raises:
        ConfigError: PyAV is not installed.
    """
    av = pyav()
    old = int(av.__version__.split(".")[0]) < 19  # later versions accept metadata in any encoding
    return av.open(f"file:{path}", **({"metadata_errors": "replace"} if old else {}))


def pyav() -> Any:
    """Import PyAV with logging off: damage is reported through exceptions."""
    try:
        import av
    except ImportError as error:
        raise ConfigError("reading videos needs PyAV. Install it: pip install av") from error
    av.logging.set_level(av.logging.PANIC)
    return av


def pyav_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that PyAV raises for a file that it cannot open or decode.

    Some of FFmpeg's own errors (external library, not implemented, unknown; PyAV 18) are not built-in errors as well.
    """
    return (pyav().FFmpegError, OSError, ValueError, EOFError, LookupError, RuntimeError)


def video_stream(container: Any, path: str) -> Any:
    """Return the stream that FFmpeg regards as the main video. It is never a cover picture.

    Raises:
        Unreadable: there is no such stream, or FFmpeg has no decoder for it.
    """
    if container.format.name in LISTS:
        raise Unreadable(
            f"{path}: a list of other files ({container.format.name}), which is not followed. Name the video"
        )
    if container.format.name == "image2":  # recognised by its ending alone
        raise Unreadable(f"{path}: not a video. Name a video file")
    stream = container.streams.best("video")
    if stream is None:
        if container.streams.video:
            raise Unreadable(f"{path}: holds video that this PyAV cannot decode. Encode it again, e.g. as H.264")
        what = "sound, and no video" if container.streams.audio else "no video"
        raise Unreadable(f"{path}: holds {what}. Name a video file")
    if stream.disposition.value & ATTACHED_PICTURE:
        raise Unreadable(f"{path}: holds sound and a cover picture, and no video. Name a video file")
    if stream.codec_context is None:
        raise Unreadable(f"{path}: holds video that this PyAV cannot decode. Encode it again, e.g. as H.264")
    stream.codec_context.thread_count = 1  # loader workers are the threads
    stream.codec_context.flags |= COPY_OPAQUE
    return stream
