"""Files that are not media, pictures of more than 8 bits, folders of frames; and messages kept from the terminal."""

from __future__ import annotations

import json
import os
import struct
import warnings
import zlib

import numpy as np
import pytest
from build import FAMILY, picture, row, write_image, write_json, write_video
from numbered import encode
from PIL import Image as PIL
from stills_and_clips import SETTINGS, image, video

from vlft.cli.main import main
from vlft.data import dataset
from vlft.data.media.decode import decode
from vlft.data.media.pictures import Header, depth_remark, open_picture, picture_header
from vlft.data.media.read import MediaError, measure
from vlft.data.sample import Video


def sound(path):
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux([*stream.encode(frame), *stream.encode()])


def webp(path):
    picture(90, 60).save(path, "WEBP")


def clip_of(name):
    def write(path):
        path.write_bytes(write_video(path.with_name(name)).read_bytes())

    return write


# name -> what stands in the file, and what is said where a picture, and where a video, is wanted of it.
NO_MEDIUM = {
    "nothing": (b"", "is empty (0 bytes). Fetch it again", "is empty (0 bytes)"),
    "a web page": (
        b"\n<!DOCTYPE html>\n<html lang=en>",
        "is a web page, not a picture. Its download failed: fetch it again",
        "is a web page, not a video",
    ),
    "a page with a comment": (b"<!-- gone -->\n<html>", "is a web page, not a picture", "is a web page, not a video"),
    "JSON": (b'{"error": "expired"}', "is JSON text, not a picture. Fetch", "is JSON text, not a video. Fetch"),
    "XML": (b"<?xml version='1.0'?><Error>", "is XML text, not a picture", "is XML text, not a video"),
    "text": ("Nicht gefunden: \xe4".encode(), "is text, not a picture. Fetch", "is text, not a video. Fetch"),
    "a pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        "is a Git LFS pointer, not the picture itself. Fetch it: git lfs pull",
        "is a Git LFS pointer, not the video itself",
    ),
    "a drawing": (
        b"<?xml version='1.0'?>\n<svg xmlns='http://www.w3.org/2000/svg'>",
        "is an SVG drawing, not a picture. Save it as PNG or JPEG",
        "is an SVG drawing, not a video. Name a video file",
    ),
    "a PDF": (b"%PDF-1.4\n", "is a PDF, not a picture. Save its pages", "is a PDF, not a video. Name a video file"),
    "an archive": (b"PK\x03\x04\0\0\0\0", "is a ZIP archive, not a picture. Unpack", "not a video. Unpack"),
    "HEIC": (
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
        "is a HEIC picture, which this Pillow does not read. Save it as PNG or JPEG",
        'is a HEIC picture, not a video. Name it under "image"',
    ),
    "half a JPEG": (
        b"\xff\xd8\xff\xe0\0",
        "begins as a JPEG picture does, and its header is damaged",
        "is a JPEG picture, not a video",
    ),
    "noise": (bytes(range(256)), "not a picture that Pillow knows", "not a video"),
    "a playlist": (b"#EXTM3U\n#EXTINF:1,\na.ts\n", "is text, not a picture", "is text, not a video"),
    "a list of files": (b"ffconcat version 1.0\nfile a.mp4\n", "is text, not a picture", "is text, not a video"),
    "a clip": (clip_of("b.mp4"), 'is an MP4 video, not a picture. Name it under "video", with a <video> tag', None),
    "an MPEG clip": (
        lambda path: path.write_bytes(encode(path.with_name("b.mpg"), codec="mpeg1video", fps=25).read_bytes()),
        "is an MPEG video, not a picture",
        None,
    ),
    "a TS clip": (
        lambda path: path.write_bytes(encode(path.with_name("b.ts")).read_bytes()),
        "is an MPEG-TS video",
        None,
    ),
    "a JPEG": (lambda path: picture(90, 60).save(path, "JPEG"), None, "is a JPEG picture, not a video. Name it under"),
    "a WebP": (webp, None, 'is a WebP picture, not a video. Name it under "image", with an <image> tag'),
    "sound": (lambda path: sound(path.with_suffix(".mp4")), None, "holds sound, and no video. Name a video file"),
}


@pytest.mark.parametrize(("content", "as_picture", "as_video"), NO_MEDIUM.values(), ids=NO_MEDIUM)
def test_a_file_of_another_kind_is_called_by_its_name(tmp_path, content, as_picture, as_video):
    for wanted, name, media in ((as_picture, "a.jpg", image), (as_video, "a.mp4", video)):
        if wanted is None:
            continue
        path = tmp_path / name
        path.write_bytes(content) if isinstance(content, bytes) else content(path)
        for read in (measure, decode):
            with pytest.raises(MediaError) as caught:
                read(media(path), SETTINGS)
            assert wanted in caught.value.reason
            assert caught.value.reason.startswith(str(path))


# ------------------------------------------------------------------------------------- more than 8 bits a channel


def grey(most: int) -> np.ndarray:
    return np.linspace(0, most, 60 * 90).astype(np.uint16).reshape(60, 90)


def png16(path, values, extra=b""):
    """A PNG of 16 bits per channel, grey or RGB; `extra`: chunks before its pixels."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)
    head = struct.pack(">IIBBBBB", width, height, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    chunks = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(path, data, *, bits, samples=1):
    """An uncompressed TIFF of 90x60 pixels."""
    at = 8 + len(data)
    tags = [
        *((256, 4, 90), (257, 4, 60), (258, 3, bits if samples == 1 else at), (259, 3, 1)),
        *((262, 3, 1 if samples == 1 else 2), (273, 4, 8), (277, 3, samples), (278, 4, 60), (279, 4, len(data))),
    ]
    extra = struct.pack("<HHH", bits, bits, bits) if samples == 3 else b""
    entries = b"".join(
        struct.pack("<HHII", tag, kind, samples if tag == 258 else 1, value) for tag, kind, value in tags
    )
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    path.write_bytes(b"II*\0" + struct.pack("<I", at + len(extra)) + data + extra + ifd)


def twelve_bits(values):
    """Packed, two values in three bytes."""
    pairs = values.reshape(-1, 2).astype(np.uint32)
    joined = pairs[:, 0] << 12 | pairs[:, 1]
    return np.stack([joined >> 16, joined >> 8 & 255, joined & 255], axis=1).astype(np.uint8).tobytes()


def rgb(values):
    return np.stack([values] * 3, axis=-1)


DARK = {
    "png": ("a.png", lambda path: PIL.fromarray(grey(4095)).save(path), "largest value is 4,095 of 65,535"),
    "png, colours": ("a.png", lambda path: png16(path, rgb(grey(4095))), "largest value is about 3,840 of 65,535"),
    "tiff": ("a.tif", lambda path: PIL.fromarray(grey(4095)).save(path), "largest value is 4,095 of 65,535"),
    "tiff, colours": (
        "a.tif",
        lambda path: tiff(path, rgb(grey(4095)).astype("<u2").tobytes(), bits=16, samples=3),
        "largest value is about 3,840 of 65,535",
    ),
    "14 bits": ("a.png", lambda path: PIL.fromarray(grey(16383)).save(path), "largest value is 16,383 of 65,535"),
}


@pytest.mark.parametrize(("name", "write", "remark"), DARK.values(), ids=DARK)
def test_a_picture_of_12_bits_in_16_is_worth_a_warning(tmp_path, capsys, name, write, remark):
    write(tmp_path / name)
    assert picture_header(str(tmp_path / name)) == Header(size=(60, 90), deep=True)
    data = write_json(
        tmp_path / "rows.json", [row("<image>What?", image=name), row("<video>What?", video=[name, name])]
    )
    status, found, _ = check(capsys, data)
    assert status == 0
    fields = [(warning["index"], warning["field"]) for warning in found["warnings"] if remark in warning["reason"]]
    assert fields == [(0, "image"), (1, "video[0]"), (1, "video[1]")]
    _, found, _ = check(capsys, data, "--headers_only")
    assert not found["warnings"]


SAYS_SO = {
    "a PGM of 4,095": (
        "a.pgm",
        lambda path: path.write_bytes(b"P5\n90 60\n4095\n" + grey(4095).astype(">u2").tobytes()),
    ),
    "a PPM of 4,095": (
        "a.ppm",
        lambda path: path.write_bytes(b"P6\n90 60\n4095\n" + rgb(grey(4095)).astype(">u2").tobytes()),
    ),
    "a TIFF of 12 bits": ("a.tif", lambda path: tiff(path, twelve_bits(grey(4095)), bits=12)),
    "a TIFF up to 4,095": ("a.tif", lambda path: PIL.fromarray(grey(4095)).save(path, tiffinfo={281: 4095})),
    "a PNG of 12 bits": ("a.png", lambda path: png16(path, grey(4095), chunk(b"sBIT", b"\x0c"))),
}


@pytest.mark.parametrize(("name", "write"), SAYS_SO.values(), ids=SAYS_SO)
def test_a_picture_that_says_its_range_is_read_by_it(tmp_path, name, write):
    write(tmp_path / name)
    ours = np.asarray(open_picture(str(tmp_path / name)))[..., 0]
    assert abs(ours.astype(int) - (grey(4095) >> 4)).max() <= 1  # PGM and PPM round
    assert ours.max() == 255
    assert depth_remark(str(tmp_path / name)) is None


FULL = {
    "png": ("a.png", lambda path: PIL.fromarray(grey(65535)).save(path)),
    "tiff": ("a.tif", lambda path: PIL.fromarray(grey(65535)).save(path, tiffinfo={281: 65535})),
    "a statistic": ("a.tif", lambda path: PIL.fromarray(grey(65535)).save(path, tiffinfo={281: 40312})),
    "png of 12 bits, spread": ("a.png", lambda path: png16(path, grey(65535), chunk(b"sBIT", b"\x0c"))),
}


@pytest.mark.parametrize(("name", "write"), FULL.values(), ids=FULL)
def test_a_picture_of_16_bits_keeps_its_high_byte(tmp_path, name, write):
    write(tmp_path / name)
    assert np.array_equal(np.asarray(open_picture(str(tmp_path / name)))[..., 0], grey(65535) >> 8)
    assert depth_remark(str(tmp_path / name)) is None


# ----------------------------------------------------------------------------------------------- folders of frames


@pytest.fixture
def frames(tmp_path):
    """Eleven frames whose names sort wrongly as text, and files that operating systems create."""
    names = ["china", "flower", "astronaut", "chelsea", "coffee", "rocket"] * 2
    for i, name in enumerate(names[:11]):
        write_image(tmp_path / "clip" / f"frame_{i}.jpg", name=name)
    for name in (".DS_Store", "Thumbs.db"):
        (tmp_path / "clip" / name).write_bytes(b"x")
    return tmp_path


def check(capsys, *argv) -> tuple[int, dict, str]:
    status = main(["check-data", *map(str, argv), "--json"])
    out, err = capsys.readouterr()
    return status, json.loads(out), err


def first_reason(capsys, folder, value) -> tuple[str, str]:
    data = write_json(folder / "rows.json", [row("<video>What?", video=value)])
    status, found, _ = check(capsys, data)
    assert status == 1
    return found["bad"][0]["field"], found["bad"][0]["reason"]


@pytest.mark.parametrize("form", ["row", "list", "part"])
def test_a_folder_of_frames_is_a_video(frames, form):
    from vlft.data.rows.records import parse_record

    question = [{"type": "video", "video": "clip"}, {"type": "text", "text": "What?"}]
    raw = {
        "row": row("<video>What?", video="clip", fps=1),
        "list": row("<video>What?", video=["clip"]),
        "part": {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "It."}]},
    }[form]
    family = FAMILY
    sample = parse_record(raw, file=str(frames / "rows.json"), index=0, image_folder=None, family=family)
    (ours,) = sample.media
    listed = Video(frames=tuple(str(frames / "clip" / f"frame_{i}.jpg") for i in range(11)), field="video")
    assert ours.frames == listed.frames
    assert decode(ours, SETTINGS).pixels.equal(decode(listed, SETTINGS).pixels)
    assert measure(ours, SETTINGS).t == 6


def test_folders_that_are_no_video(frames, capsys):
    (frames / "empty").mkdir()
    assert first_reason(capsys, frames, "empty") == (
        "video",
        f"{frames}/empty: a folder without pictures is a video without frames. Add frames, or name a video file",
    )
    (frames / "clip" / "times.txt").write_text("0 1 2")
    field, reason = first_reason(capsys, frames, ["clip"])
    assert field == "video[0]"
    assert "holds pictures only, and times.txt does not have the ending of a picture. " in reason
    assert "Move it elsewhere, or list the frames" in reason


def test_a_folder_stays_inside_as_files_do(frames, tmp_path_factory, capsys):
    outside = tmp_path_factory.mktemp("outside")
    write_image(outside / "secret.jpg")
    (frames / "clip" / "frame_11.jpg").symlink_to(outside / "secret.jpg")
    (frames / "link").symlink_to(outside)
    assert "leads outside the folder of the data file" in first_reason(capsys, frames, "clip")[1]
    assert "leads outside the folder of the data file" in first_reason(capsys, frames, "link")[1]
    assert "leads outside the folder of the data file" in first_reason(capsys, frames, "../")[1]


# ------------------------------------------------------------------------------------------- silence on a terminal


def noisy(folder):
    """Files for which Pillow, libtiff, FFmpeg, decord or torchvision print messages; half of them can be read."""
    picture(90, 60).convert("P").save(folder / "palette.png", transparency=bytes(range(256)))
    picture(90, 60).save(folder / "exif.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12\0\x03\xff\xff")
    picture(90, 60).save(folder / "lzw.tif", compression="tiff_lzw")
    damaged = bytearray((folder / "lzw.tif").read_bytes())
    damaged[200:400] = bytes(200)
    (folder / "lzw.tif").write_bytes(damaged)
    write_video(folder / "ten.mp4", codec="libx264", pix_fmt="yuv420p10le")
    damaged = bytearray(write_video(folder / "damaged.mp4", 60, codec="libx264", pix_fmt="yuv420p10le").read_bytes())
    damaged[len(damaged) // 3 : len(damaged) // 2] = bytes(len(damaged) // 2 - len(damaged) // 3)
    (folder / "damaged.mp4").write_bytes(damaged)
    (folder / "page.mp4").write_text("<html>")
    media = ["palette.png", "exif.jpg", "lzw.tif", "ten.mp4", "damaged.mp4", "page.mp4"]
    return [
        row(f"<{kind}>What?", **{kind: name})
        for name in media
        for kind in ["video" if name.endswith(".mp4") else "image"]
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_libraries_say_nothing_on_stderr(tmp_path, capfd, monkeypatch, workers):
    rows = noisy(tmp_path) * (1 if workers == 0 else 3)  # fewer rows are scanned without processes
    monkeypatch.setattr(dataset, "SHORT", 0)
    data = write_json(tmp_path / "rows.json", rows)
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 90 * 60 - 1)  # above it, Pillow warns
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_, **__: os.write(2, f"{message}\n".encode()))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", ResourceWarning)
        status = main(["check-data", str(data), "--json", "--workers", str(workers)])
    out, err = capfd.readouterr()
    assert status == 1
    assert err == ""
    assert {bad["index"] % 6 for bad in json.loads(out)["bad"]} == {2, 4, 5}
