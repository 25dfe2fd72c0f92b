"""Malicious rows and files are refused, without a hang and in little memory; what flags allow; repeated reading."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import resource
import socketserver
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from build import FAMILY, picture, row, write_image, write_json, write_video
from PIL import Image as PIL
from stills_and_clips import SETTINGS, image, video

from vlft.cli.main import main
from vlft.data import dataset
from vlft.data.dataset import PAUSES, RowDataset
from vlft.data.files import read as rows
from vlft.data.files.index import index_rows, parsed
from vlft.data.media.clips import FRAME_PIXELS
from vlft.data.media.decode import decode
from vlft.data.media.mp4 import samples_beyond
from vlft.data.media.pictures import PICTURE_BYTES
from vlft.data.media.read import MediaError, measure
from vlft.data.rows import fetch as remote
from vlft.data.rows import media_refs as named
from vlft.data.rows import records
from vlft.data.rows.access import Access
from vlft.data.sample import Video
from vlft.errors import BadRow, ConfigError


@pytest.fixture
def checked(capsys) -> Callable[..., tuple[int, dict]]:
    """Run `vlft check-data --json`; returns its exit code and its document."""

    def run(*argv: object) -> tuple[int, dict]:
        status = main(["check-data", "--json", *map(str, argv)])
        return status, json.loads(capsys.readouterr().out)

    return run


def reasons(found: dict) -> dict[str, str]:
    """Field -> reason of bad rows that have an id: `id.field` -> reason."""
    return {f"{bad['id']}.{bad['field']}": bad["reason"] for bad in found["bad"]}


# ------------------------------------------------------------------------------------------- paths that lead outside


@pytest.fixture
def tree(tmp_path) -> Path:
    """pics/ with a picture and links; store/ and secret.png beside it, outside."""
    write_image(tmp_path / "pics" / "sub" / "a.png")
    write_image(tmp_path / "store" / "b.png")
    write_image(tmp_path / "secret.png")
    (tmp_path / "pics" / "store").symlink_to(tmp_path / "store")
    (tmp_path / "pics" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "pics" / "near.png").symlink_to("sub/a.png")
    (tmp_path / "pics" / "chain.png").symlink_to("link.png")
    (tmp_path / "pics" / "loop.png").symlink_to("loop.png")
    (tmp_path / "pictures").symlink_to("pics")
    (tmp_path / "pics2").mkdir()
    write_image(tmp_path / "pics2" / "c.png")
    return tmp_path


INSIDE = ["sub/a.png", "./sub/a.png", "sub/../sub/a.png", "near.png", "../pics/sub/a.png", "sub//a.png"]
OUTSIDE = {
    "../secret.png": "secret.png: it climbs out by",
    "sub/../../secret.png": "secret.png: it climbs out by",
    "link.png": "pics/link.png is a link to",
    "chain.png": "pics/chain.png is a link to link.png",
    "store/b.png": "pics/store is a link to",
    "../pics2/c.png": "pics2/c.png: it climbs out by",  # its name begins as the folder's does
    "..": "it climbs out by",
}


@pytest.mark.parametrize("folder", ["pics", "pictures", None])
def test_a_relative_path_stays_in_its_folder(tree, checked, folder):
    """A folder that is itself a link, or the data file's own folder, is the same folder."""
    at = tree / (folder or "pics")
    raw = [row("<image>?", id=path, image=path) for path in [*INSIDE, *OUTSIDE, str(tree / "secret.png")]]
    data = write_json((tree if folder else at) / "train.json", raw)
    named = ["--image_folder", at] if folder else []
    status, found = checked(data, *named)
    assert status == 1
    said = reasons(found)
    assert set(said) == {f"{path}.image" for path in OUTSIDE}
    for path, why in OUTSIDE.items():
        reason = said[f"{path}.image"]
        assert f"{path} leads outside " in reason
        assert (f"--image_folder {at}" if folder else "the folder of the data file") in reason
        assert why in reason
        assert "--allow_outside_folder" in reason
    status, found = checked(data, *named, "--allow_outside_folder")
    assert set(reasons(found)) == {"...image"}  # the folder above is no picture


def test_what_is_not_there_is_missing_and_not_outside(tree, checked):
    raw = [row("<image>?", id=path, image=path) for path in ("no.png", "no/such.png", "loop.png", "a\0b", "a\ud800/b")]
    _, found = checked(write_json(tree / "train.json", raw), "--image_folder", tree / "pics")
    said = list(reasons(found).values())
    assert ["no such file" in why or "Too many levels" in why for why in said] == [True] * 5


def test_frames_and_videos_stay_inside_as_well(tree, checked):
    raw = [
        row("<video>?", id="clip", video="../clip.mp4"),
        row("<video>?", id="frames", video=[["sub/a.png", "link.png"]]),
        row("<video>?", id="list", video=["sub/a.png", "../secret.png"]),
    ]
    _, found = checked(write_json(tree / "train.json", raw), "--image_folder", tree / "pics")
    assert {where: "leads outside" in why for where, why in reasons(found).items()} == {
        "clip.video": True,
        "frames.video[0][1]": True,
        "list.video[1]": True,
    }


def test_training_refuses_them_too(tree, base, capsys):
    data = write_json(tree / "train.json", [row("<image>?", image="../secret.png")])
    argv = ["train", "--model_id", str(base), "--data_path", str(data), "--image_folder", str(tree / "pics")]
    assert main([*argv, "--output_dir", str(tree / "run"), "--use_cpu", "true"]) == 1
    printed = capsys.readouterr().err
    assert "train.json[0].image: ../secret.png leads outside --image_folder" in printed
    assert str(tree / "secret.png") in printed
    assert "--allow_outside_folder" in printed


def test_an_image_folder_at_the_root(tree):
    access = Access()
    assert access.locate(str(tree / "secret.png")[1:], folder="/", named="/") == str(tree / "secret.png")


def test_a_path_costs_one_look(tree, monkeypatch):
    looks = []
    lstat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path: looks.append(path) or lstat(path))
    access = Access()
    for i in range(500):
        access.locate(f"sub/{i}.png", folder=str(tree / "pics"), named="")
    assert len(looks) < 520


# ------------------------------------------------------------------------------------------------------ by http(s)


class Answers(http.server.BaseHTTPRequestHandler):
    """Serves the responses that a test sets, path -> (status, headers, body), and records the requests."""

    planted: dict[str, tuple[int, dict[str, str], bytes]]
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        status, headers, body = self.planted.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(OSError):  # a client that has seen enough
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class Site:
    def __init__(self, port: int, handler: type[Answers]) -> None:
        self.at = f"http://127.0.0.1:{port}"
        self.planted, self.asked = handler.planted, handler.asked

    def plant(self, path: str, body: bytes, status: int = 200, **headers: str) -> str:
        self.planted[path] = (status, {name.replace("_", "-"): value for name, value in headers.items()}, body)
        return self.at + path


@pytest.fixture
def site(tmp_path, monkeypatch) -> Iterator[Site]:
    """A server on this machine, and a cache folder for what is fetched."""
    handler = type("Planted", (Answers,), {"planted": {}, "asked": []})
    monkeypatch.setenv("VLFT_MEDIA_CACHE", str(tmp_path / "fetched"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield Site(server.server_address[1], handler)
        server.shutdown()
        thread.join()


@pytest.fixture
def a_picture(tmp_path) -> bytes:
    return write_image(tmp_path / "plain.jpg").read_bytes()


def test_nothing_is_fetched_unasked(site, tmp_path, base, a_picture, capsys):
    data = write_json(tmp_path / "train.json", [row("<image>?", image=site.plant("/a.jpg", a_picture))])
    argv = ["train", "--model_id", str(base), "--data_path", str(data), "--output_dir", str(tmp_path / "run")]
    assert main([*argv, "--use_cpu", "true"]) == 1
    printed = capsys.readouterr().err
    assert f"train.json[0].image: {site.at}/a.jpg is not a local file, and nothing is fetched by default" in printed
    assert "--allow_remote_media" in printed
    assert site.asked == []
    assert not (tmp_path / "fetched").exists()


def test_what_is_fetched_is_trained_on_and_kept(site, tmp_path, base, a_picture):
    clip = write_video(tmp_path / "clip.mp4").read_bytes()
    moved = site.plant("/moved", b"", 302, Location="/a.jpg")
    raw = [
        row("<image><image>?", "One.", image=[site.plant("/a.jpg", a_picture), moved]),
        row("<image>?", "The same.", image=f"{site.at}/a.jpg"),
        row("<video>?", "It moves.", video=site.plant("/clip.mp4?quality=1", clip)),
        row("<video>?", "Frames.", video=[site.plant("/f.jpg?n=1", a_picture), site.plant("/f.jpg?n=2", a_picture)]),
        row("<image>?", "Ümlaut.", image=site.plant("/%C3%BC%20b.jpg", a_picture).replace("%C3%BC%20", "ü ")),
    ]
    data = write_json(tmp_path / "train.json", raw)
    argv = ["train", "--model_id", str(base), "--data_path", str(data), "--use_cpu", "true", "--num_train_epochs", "1"]
    argv += ["--dataloader_num_workers", "0", "--allow_remote_media"]
    assert main([*argv, "--output_dir", str(tmp_path / "run")]) == 0
    (entry,) = json.loads((tmp_path / "run" / "vlft.json").read_text())["data"]
    assert (entry["rows"], entry["trained"]) == (5, 5)
    asked = sorted(site.asked)
    assert asked == sorted(
        ["/a.jpg", "/moved", "/a.jpg", "/clip.mp4?quality=1", "/f.jpg?n=1", "/f.jpg?n=2", *asked[:1]]
    )
    site.asked.clear()
    site.planted.clear()
    assert main([*argv, "--output_dir", str(tmp_path / "again")]) == 0
    assert site.asked == []
    assert not [path for path in (tmp_path / "fetched").rglob("*") if path.name.endswith(".tmp")]


def test_an_address_that_gives_nothing_is_a_bad_row(site, tmp_path, base, a_picture, checked, monkeypatch):
    monkeypatch.setattr(remote, "FILE_BYTES", 100_000)
    site.plant("/loop", b"", 302, Location="/loop")
    raw = [
        row("<image>?", id="good", image=site.plant("/a.jpg", a_picture)),
        row("<image>?", id="gone", image=f"{site.at}/gone.jpg"),
        row("<image>?", id="page", image=site.plant("/page", b"<html>", Content_Type="text/html")),
        row("<image>?", id="file", image=site.plant("/file", b"", 302, Location="file:///etc/passwd")),
        row("<image>?", id="ftp", image=site.plant("/ftp", b"", 302, Location="ftp://127.0.0.1/a")),
        row("<image>?", id="loop", image=f"{site.at}/loop"),
        row("<image>?", id="cut", image=site.plant("/cut.jpg", a_picture, Content_Length="90000")),
        row("<image>?", id="large", image=site.plant("/large.jpg", bytes(100_001))),
        row("<image>?", id="silent", image=site.plant("/silent.jpg", bytes(100_001), Content_Length="0")),
        row("<image>?", id="closed", image="http://127.0.0.1:9/a.jpg"),
        row("<image>?", id="odd", image="http://[/a.jpg"),
        row("<image>?", id="text", image=site.plant("/text.jpg", b"hello", Content_Type="image/jpeg")),
        row("<video>?", id="frame", video=[[f"{site.at}/a.jpg", f"{site.at}/no.jpg"]]),
    ]
    data = write_json(tmp_path / "train.json", raw)
    status, found = checked(data, "--allow_remote_media", "true", "--on_bad_row", "skip")
    assert status == 1
    assert found["ok"] == 1
    said = reasons(found)
    for where, why in {
        "gone.image": "/gone.jpg cannot be fetched (404 Not Found)",
        "page.image": "the server returned text/html",
        "file.image": "it redirects to file:///etc/passwd, and only http and https are followed",
        "ftp.image": "it redirects to ftp://127.0.0.1/a, and only http and https are followed",
        "loop.image": "it redirects more than 5 times",
        "cut.image": "of 90,000 bytes received",
        "large.image": "100,001 bytes or more; the limit is 100,000",
        "silent.image": "it is empty",
        "closed.image": "refused",
        "odd.image": "cannot be fetched",
        "text.image": "is text, not a picture. Fetch it again",
        "frame.video[0][1]": "/no.jpg cannot be fetched (404 Not Found)",
    }.items():
        assert why in said[where], where
    assert len(said) == 12
    assert site.asked.count("/gone.jpg") == 1
    assert site.asked.count("/cut.jpg") == remote.TRIES  # that may pass


def test_a_server_that_drips_does_not_hold_up_a_run(site, tmp_path, a_picture, monkeypatch):
    monkeypatch.setattr(remote, "FILE_SECONDS", 0.3)

    def drip(self) -> None:
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(1000):
                self.wfile.write(b"x")
                time.sleep(0.05)

    monkeypatch.setattr(Answers, "do_GET", drip)
    began = time.monotonic()
    ((_, why),) = remote.fetch({str(tmp_path / "fetched" / "a"): f"{site.at}/a"})
    assert "it took more than 0.3 s" in why
    assert time.monotonic() - began < 20


def test_a_silent_server(site, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE", 0.1)
    monkeypatch.setattr(Answers, "do_GET", lambda self: time.sleep(1))
    ((_, why),) = remote.fetch({str(tmp_path / "fetched" / "a"): f"{site.at}/a"})
    assert "timed out" in why


def test_a_cache_folder_that_cannot_be_written_ends_the_run(site, tmp_path, a_picture, monkeypatch, capsys):
    data = write_json(tmp_path / "train.json", [row("<image>?", image=site.plant("/a.jpg", a_picture))])
    (tmp_path / "file").write_text("")
    for cache, why in ((tmp_path / "file", "cannot be saved there"), ("0", "no folder for fetched files")):
        monkeypatch.setenv("VLFT_MEDIA_CACHE", str(cache))
        assert main(["check-data", str(data), "--allow_remote_media"]) == 1
        printed = capsys.readouterr().err
        assert why in printed
        assert "VLFT_MEDIA_CACHE" in printed


def test_preview_fetches_its_row_only(site, tmp_path, base, a_picture, capsys):
    raw = [row("<image>?", image=site.plant(f"/{i}.jpg", a_picture)) for i in range(2)] + [
        row("<image>?", image=f"{site.at}/gone.jpg")
    ]
    data = write_json(tmp_path / "train.json", raw)
    look = ["preview", str(data), "--model_id", str(base), "--allow_remote_media", "true", "--index"]
    assert main([*look, "1"]) == 0
    assert site.asked == ["/1.jpg"]
    assert main([*look, "2"]) == 1
    assert "gone.jpg cannot be fetched (404 Not Found)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- headers that claim too much


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = (b"IDAT", zlib.compress(bytes((3 * 8 + 1) * 8)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in (head, *chunks, pixels, (b"IEND", b"")))


def resized(path: Path, **save: object) -> bytes:
    """A small picture whose header is overwritten to say 60000 x 60000 (16383 x 16383 for WebP, its most)."""
    write_image(path, 64, 64, **save)
    data = bytearray(path.read_bytes())
    big = 60000
    if path.suffix == ".jpg":
        at = data.index(b"\xff\xc0") + 5
        data[at : at + 4] = struct.pack(">HH", big, big)
    elif path.suffix == ".gif":
        data[6:10] = struct.pack("<HH", big, big)
    elif path.suffix == ".bmp":
        data[18:26] = struct.pack("<ii", big, big)
    elif path.suffix == ".webp":
        at = data.index(b"\x9d\x01\x2a") + 3
        data[at : at + 4] = struct.pack("<HH", 16383, 16383)
    else:
        entries = struct.unpack("<I", data[4:8])[0]
        for i in range(struct.unpack("<H", data[entries : entries + 2])[0]):
            at = entries + 2 + 12 * i
            if struct.unpack("<H", data[at : at + 2])[0] in (256, 257):
                data[at + 2 : at + 12] = struct.pack("<HII", 4, 1, big)
    return bytes(data)


def huge(path: Path) -> None:
    """A picture followed by zeros, stored as a hole in a sparse file."""
    write_image(path)
    os.truncate(path, 5 << 30)


TEXT_BOMB = (b"zTXt", b"a\0\0" + zlib.compress(bytes(200 << 20)))
PROFILE_BOMB = (b"iCCP", b"a\0\0" + zlib.compress(bytes(200 << 20)))
PICTURE_BOMBS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "png": ("a.png", lambda path: path.write_bytes(png(60000, 60000)), "too large to be opened safely"),
    "jpeg": ("a.jpg", lambda path: path.write_bytes(resized(path)), "too large to be opened safely"),
    "gif": ("a.gif", lambda path: path.write_bytes(resized(path)), "too large to be opened safely"),
    "bmp": ("a.bmp", lambda path: path.write_bytes(resized(path)), "too large to be opened safely"),
    "tiff": ("a.tiff", lambda path: path.write_bytes(resized(path)), "too large to be opened safely"),
    "webp": ("a.webp", lambda path: path.write_bytes(resized(path)), "too large|cannot be opened|not a picture"),
    "text of a png": ("a.png", lambda path: path.write_bytes(png(8, 8, TEXT_BOMB)), "too large"),
    "profile of a png": ("a.png", lambda path: path.write_bytes(png(8, 8, PROFILE_BOMB)), "too large"),
    "many texts": (
        "a.png",
        lambda path: path.write_bytes(png(8, 8, *[(b"tEXt", b"k\0" + bytes(1 << 20))] * 70)),
        "Too",
    ),
    "a chunk of 2 GB": (
        "a.png",
        lambda path: path.write_bytes(png(8, 8)[:33] + struct.pack(">I4s", 2**31 - 1, b"iCCP") + bytes(99)),
        "cannot be opened|not a picture",
    ),
    "5 GB": ("a.jpg", huge, "5,368,709,120 bytes, a picture has 1,073,741,824 at most"),
    "a program": ("a.eps", lambda path: picture(8, 8).save(path), "PostScript, a program"),
    "a program by another name": ("a.jpg", lambda path: picture(8, 8).save(path, "EPS"), "PostScript, a program"),
    "a pipe": ("a.jpg", os.mkfifo, "is a named pipe, not a regular file"),
    "a device": ("a.jpg", lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "a folder": ("a.jpg", lambda path: path.mkdir(), "is a folder, not a file"),
}


@contextlib.contextmanager
def bounded(seconds: float = 5.0, megabytes: int = 300) -> Iterator[None]:
    """Fails if the block takes more processor time (the machine may be shared), or the process grows by more memory."""
    began, before = time.process_time(), peak()
    yield
    assert time.process_time() - began < seconds
    assert peak() - before < megabytes


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize(("name", "write", "why"), PICTURE_BOMBS.values(), ids=PICTURE_BOMBS)
def test_pictures_that_mean_harm(tmp_path, name, write, why):
    write(tmp_path / name)
    for read in (measure, decode):
        with bounded(), pytest.raises(MediaError, match=why) as caught:
            read(image(tmp_path / name), SETTINGS)
        assert str(tmp_path / name) in caught.value.reason
    with bounded(), pytest.raises(MediaError, match=why) as caught:
        decode(Video(frames=(str(tmp_path / name),) * 2, field="video"), SETTINGS)
    assert caught.value.field == "video[0]"


@pytest.mark.parametrize("error", [RuntimeError("Missing or empty image item"), MemoryError()])
def test_whatever_a_reader_of_pictures_raises_names_the_file(tmp_path, monkeypatch, error):
    """Pillow 13 on a damaged AVIF, and on a JPEG 2000 whose box says that it has exabytes."""
    path = write_image(tmp_path / "a.avif")
    monkeypatch.setattr(PIL, "open", Mock(side_effect=error))
    for read in (measure, decode):
        with pytest.raises(MediaError, match=r"a\.avif: cannot be opened"):
            read(image(path), SETTINGS)


def overwrite(path: Path, box: bytes, at: int, *values: int) -> None:
    data = bytearray(path.read_bytes())
    start = data.index(box) + at
    data[start : start + 4 * len(values)] = struct.pack(f">{len(values)}I", *values)
    path.write_bytes(data)


def claim(path: Path, samples: int) -> None:
    """An MP4 whose tables claim this many samples, all of one size."""
    write_video(path)
    overwrite(path, b"stsz", 8, 100, samples)
    overwrite(path, b"stsc", 16, samples)
    overwrite(path, b"stts", 12, samples)


def claim_times(path: Path) -> None:
    """Only its table of times claims 4 billion samples."""
    write_video(path)
    overwrite(path, b"stts", 12, 0xFF00000C)


def claim_in_fragment(path: Path) -> None:
    write_video(path, options={"movflags": "frag_keyframe+empty_moov"})
    overwrite(path, b"trun", 4, 0, 50_000_000)


def hide_behind_boxes(path: Path) -> None:
    """Its claim is after more empty boxes than are read."""
    claim(path, 50_000_000)
    data = path.read_bytes()
    start = struct.unpack(">I", data[:4])[0]
    path.write_bytes(data[:start] + struct.pack(">I4s", 8, b"free") * 1_000_001 + data[start:])


VIDEO_BOMBS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "50 million frames": ("a.mp4", lambda path: claim(path, 50_000_000), "claims 50,000,000 frames or samples in"),
    "a billion frames": ("a.mp4", lambda path: claim(path, 10**9), "claims 1,000,000,000 frames or samples in"),
    "4 billion times": ("a.mp4", claim_times, "claims 4,278,190,092 frames or samples in"),
    "many in a fragment": ("a.mp4", claim_in_fragment, "claims 50,000,"),
    "behind a million boxes": ("a.mp4", hide_behind_boxes, "more than 1,000,000 boxes in it"),
    "a pipe": ("a.mp4", os.mkfifo, "is a named pipe, not a regular file"),
    "a device": ("a.mp4", lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
}


@pytest.mark.parametrize(("name", "write", "why"), VIDEO_BOMBS.values(), ids=VIDEO_BOMBS)
def test_videos_that_mean_harm(tmp_path, name, write, why):
    write(tmp_path / name)
    for read in (measure, decode):
        with bounded(), pytest.raises(MediaError, match=why):
            read(video(tmp_path / name), SETTINGS)


def test_frames_too_large_are_refused_by_the_header(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 4, 160, 112)
    monkeypatch.setattr("vlft.data.media.clips.FRAME_PIXELS", 160 * 112 - 1)
    monkeypatch.setattr("vlft.data.media.frames._Scan.read", lambda *_: pytest.fail("read"))
    with pytest.raises(MediaError, match="frames of 160x112, 17,919 pixels at most are opened safely"):
        measure(video(path), SETTINGS)
    assert FRAME_PIXELS > 7680 * 4320


@pytest.mark.parametrize("file", ["a.mp4", "a.mov", "a.webm", "a.avi", "f.mp4"])
def test_honest_headers_claim_nothing_beyond(tmp_path, monkeypatch, file):
    monkeypatch.setattr("vlft.data.media.mp4.HARMLESS", 0)
    options = {"movflags": "frag_keyframe+empty_moov"} if file == "f.mp4" else {}
    path = write_video(tmp_path / file, 200, codec="libvpx-vp9" if file == "a.webm" else "mpeg4", options=options)
    assert samples_beyond(str(path)) is None
    for size in (0, 3, 8, 20, 100, 1000):  # truncated, it claims less than its length, or is refused
        path.write_bytes(path.read_bytes()[: path.stat().st_size - size] if size else path.read_bytes())
        samples_beyond(str(path))


def test_large_frames_are_decoded_fewer_at_a_time(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", 20, 160, 112)
    plain = decode(video(path), SETTINGS)
    monkeypatch.setattr("vlft.data.media.clips.PIXELS_AT_A_TIME", 2 * 160 * 112)
    assert (decode(video(path), SETTINGS).pixels == plain.pixels).all()


def test_a_long_list_of_large_frames_is_held_small(tmp_path):
    """Each full picture is 36 MB; ten of them at once would be 360."""
    frames = [str(write_image(tmp_path / f"{i}.jpg", 4000, 3000)) for i in range(2)] * 5
    decode(Video(frames=tuple(frames[:2]), field="video"), SETTINGS)
    with bounded(60, 200):
        decode(Video(frames=tuple(frames), field="video"), SETTINGS)


def test_a_bomb_names_its_row(tmp_path, checked):
    (tmp_path / "bomb.png").write_bytes(png(60000, 60000))
    write_image(tmp_path / "good.png")
    raw = [row("<image>?", image="good.png"), row("<image>?", id="b", image="bomb.png")]
    data = write_json(tmp_path / "train.json", raw)
    for headers in ([], ["--headers_only"]):
        status, found = checked(data, *headers)
        (bad,) = found["bad"]
        assert (status, bad["index"], bad["field"]) == (1, 1, "image")
        assert "too large to be opened safely" in bad["reason"]


# ------------------------------------------------------------------------------------------------------- data files


def load(path: Path) -> records.Rows:
    return parsed(index_rows([str(path)], image_folder=None, family=FAMILY))


DEEP = "[" * 100_000 + "]" * 100_000
DATA_BOMBS = {
    "deep": ("a.json", f"[{DEEP}]".encode(), "cannot be read as JSON: maximum recursion depth"),
    "a long number": ("a.json", b"[" + b"1" * 10_000_000 + b"]", "cannot be read as JSON: Exceeds the limit"),
    "packed": ("a.json", b"\x1f\x8b\x08\0\0", "is compressed, although its name says otherwise. Unpack it"),
    "packed lines": ("a.jsonl", b"PK\x03\x04\0", "is compressed"),
    "packed, by its name": ("a.json.gz", b"\x1f\x8b\x08\0\0", "is compressed. Unpack it"),
}


@pytest.mark.parametrize(("name", "data", "why"), DATA_BOMBS.values(), ids=DATA_BOMBS)
def test_data_files_that_mean_harm(tmp_path, name, data, why):
    (tmp_path / name).write_bytes(data)
    with bounded(), pytest.raises(ConfigError, match=why) as caught:
        load(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (os.mkfifo, "is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is not a regular file"),
        (lambda path: path.mkdir(), "a folder without data"),
    ],
)
def test_data_files_that_are_none(tmp_path, make, why):
    make(tmp_path / "a.json")
    with pytest.raises(ConfigError, match=why):
        load(tmp_path / "a.json")


def test_lines_that_mean_harm_are_bad_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LINE_BYTES", 2_000_000)
    good = json.dumps(row())
    text = [
        good,
        DEEP,
        f'{{"id": {"9" * 5000}}}',
        f'{{"id": "{"x" * 5_000_000}"}}',
        f'{{"id": {"[" * 500 + "]" * 500}}}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join([*text, f'{{"{"k" * 1_000_000}": 1}}', good]) + "\n")
    with bounded():
        found = load(tmp_path / "a.jsonl")
    assert [sample.index for sample in found.samples] == [0, 6]
    assert [bad.index for bad in found.bad] == [1, 2, 3, 4, 5]
    for bad, why in zip(
        found.bad,
        [
            "line 2: not JSON in UTF-8: maximum recursion depth",
            "Exceeds the limit",
            "line 4: more than 2,000,000 bytes. Split the row",
            'no "conversations"',
            'no "conversations"',
        ],
        strict=True,
    ):
        assert why in bad.reason
        assert len(str(bad)) < 1000


def test_a_json_too_large_to_be_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "ARRAY_BYTES", 10)
    with pytest.raises(ConfigError, match="and an array may have 10"):
        load(write_json(tmp_path / "a.json", [row()]))
    load(write_json(tmp_path / "a.jsonl", [row()]))


def test_bounds_leave_room():
    """For the longest rows in use: a context of 128k tokens, 2,000 pictures, a page of 179 million pixels."""
    assert named.FILES_PER_ROW >= 2_000
    assert records.RENDERED_PER_ROW >= 131_072 * 4 * 100
    assert PICTURE_BYTES >= 179_000_000 * 4


# ----------------------------------------------------------------------------------------- media read again in training


@pytest.fixture
def one(tmp_path, encoder) -> tuple[RowDataset, Path]:
    """A dataset of one row of one picture, and the picture."""
    path = write_image(tmp_path / "a.jpg", 200, 150)
    samples = load(write_json(tmp_path / "a.json", [row("<image>?", image="a.jpg")])).samples
    return RowDataset(samples, encoder, list(dataset.scan(samples, encoder.measure, workers=0))), path


@pytest.mark.parametrize("fault", ["gone", "cut"])
def test_a_picture_that_comes_back_is_trained(one, fault):
    data, path = one
    whole = path.read_bytes()
    path.unlink() if fault == "gone" else path.write_bytes(whole[: len(whole) // 2])
    timer = threading.Timer(0.5, path.write_bytes, [whole])
    timer.start()
    began = time.monotonic()
    assert not isinstance(data[0], BadRow)
    timer.join()
    assert time.monotonic() - began > 0.4


def test_a_picture_that_does_not_is_a_bad_row_that_says_how_often_it_was_tried(one):
    data, path = one
    path.unlink()
    began = time.monotonic()
    bad = data[0]
    took = time.monotonic() - began
    assert isinstance(bad, BadRow)
    assert bad.field == "image"
    assert "no such file" in bad.reason
    assert bad.reason.endswith(" (tried 4 times in 3.0 s)")
    assert sum(PAUSES) <= took < sum(PAUSES) + 20


def test_a_disk_that_fails_to_read_is_tried_again(one, monkeypatch):
    data, _ = one
    read, faults = np.fromfile, [OSError(5, "Input/output error"), OSError(116, "Stale file handle")]

    def fail(*args, **kwargs):
        if faults:
            raise faults.pop(0)
        return read(*args, **kwargs)

    monkeypatch.setattr(np, "fromfile", fail)
    monkeypatch.setattr(dataset, "PAUSES", (0.0, 0.0))
    assert not isinstance(data[0], BadRow)
    faults += [OSError(5, "Input/output error")] * 3
    bad = data[0]
    assert isinstance(bad, BadRow)
    assert "a.jpg: cannot be read ([Errno 5] Input/output error). Check its disk (tried 3 times in 0.0 s)" in bad.reason


def test_a_file_system_that_does_not_answer_is_no_missing_file(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.jpg")
    real = os.stat

    def stale(name, *args, **kwargs):
        if str(name) == str(path):
            raise OSError(116, "Stale file handle")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stale)
    with pytest.raises(MediaError, match=r"cannot be read \(Stale file handle\)"):
        decode(image(path), SETTINGS)


def test_a_row_whose_cost_changed_is_not_tried_again(one, monkeypatch):
    data, path = one
    monkeypatch.setattr(time, "sleep", lambda *_: pytest.fail("waited"))
    write_image(path, 90, 90)
    bad = data[0]
    assert isinstance(bad, BadRow)
    assert "changed since it was measured" in bad.reason


def test_a_folder_full_of_damage_is_not_waited_for(tmp_path, encoder, monkeypatch):
    count = dataset.PATIENCE + 5
    samples = load(write_json(tmp_path / "a.json", [row("<image>?", image="no.jpg")] * count)).samples
    data = RowDataset(samples, encoder)
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    whole, short = sum(PAUSES), PAUSES[0]
    for index, seconds in ((0, whole), (0, short), (1, whole)):  # the second time is that of the next epoch
        assert isinstance(data[index], BadRow)
        assert sum(slept) == pytest.approx(seconds)
        slept.clear()
    for index in range(2, count):
        assert isinstance(data[index], BadRow)
    assert sum(slept) == pytest.approx((dataset.PATIENCE - 2) * whole + 5 * short)
