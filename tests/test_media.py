"""Pixels and grids against the stock processors; files that are refused; grids from headers alone."""

from __future__ import annotations

import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch
from build import photograph, picture, write_image, write_video
from patches import patches
from PIL import Image as PIL
from PIL import ImageOps, JpegImagePlugin, PngImagePlugin
from stills_and_clips import PROCESSOR, SETTINGS, grid_of, image, pixels, turn, video
from transformers import image_transforms

from vlft.config.recipe import Recipe
from vlft.config.row_flags import RowFlags
from vlft.data.media import clips
from vlft.data.media.decode import decode
from vlft.data.media.jpeg import fast_decoder
from vlft.data.media.pictures import Unreadable, open_picture, read_pixels
from vlft.data.media.read import MediaError, measure
from vlft.data.sample import Image, Video
from vlft.errors import ConfigError

TOKEN = 28 * 28
MEAN = torch.tensor(PROCESSOR.image_processor.image_mean)[:, None, None, None]
STD = torch.tensor(PROCESSOR.image_processor.image_std)[:, None, None, None]
# transformers 5.17 drops the alpha channel, 5.23 lays it on white; so do we, with either.
STOCK_ON_WHITE = "return_numpy" in image_transforms.convert_to_rgb.__code__.co_varnames
WHITE_ONLY = pytest.mark.skipif(not STOCK_ON_WHITE, reason="this transformers drops the alpha channel")


def normalised(media):
    """Our patches as the model normalises them, in the stock layout [P, 3 * 2 * 14 * 14]."""
    made = patches(media) if media.is_video else patches(media).unsqueeze(2).expand(-1, -1, 2, -1, -1)
    return ((made.float() / 255 - MEAN) / STD).flatten(1)


def assert_like_stock(path, settings=SETTINGS, opened=None):
    """A still equals the stock image processor's result for the upright picture; its grid comes from headers."""
    ours = decode(image(path), settings)
    assert measure(image(path), settings) == ours.grid
    assert ours.pixels.dtype == torch.uint8
    assert ours.pixels.shape == (1, 14 * ours.grid.h, 14 * ours.grid.w, 3)
    upright = ImageOps.exif_transpose(PIL.open(path)) if opened is None else opened
    size = {"shortest_edge": settings.image_min_pixels, "longest_edge": settings.image_max_pixels}
    stock = PROCESSOR.image_processor(images=[upright], size=size, return_tensors="pt")
    assert stock["image_grid_thw"].tolist() == [grid_of(ours)]
    torch.testing.assert_close(normalised(ours), stock["pixel_values"], atol=2e-6, rtol=0)


def assert_video_like_stock(source, ours_of, settings=SETTINGS, grid=None, **ask):
    """A video equals `process_vision_info` followed by the stock video processor without resizing."""
    from qwen_vl_utils import process_vision_info

    ours = decode(ours_of, settings)
    assert measure(ours_of, settings) == ours.grid
    assert ours.pixels.dtype == torch.uint8
    assert ours.pixels.shape == (2 * ours.grid.t, 14 * ours.grid.h, 14 * ours.grid.w, 3)
    budget = {"min_pixels": settings.video_min_pixels, "max_pixels": settings.video_max_pixels}
    content = [{"type": "video", "video": source, **budget, **ask}]
    asked = [{"role": "user", "content": content}]
    _, videos, kwargs = process_vision_info(asked, return_video_kwargs=True, return_video_metadata=True)
    frames, metadata = zip(*videos, strict=True)
    stock = PROCESSOR.video_processor(
        videos=list(frames), video_metadata=list(metadata), do_resize=False, return_tensors="pt", **kwargs
    )
    assert stock["video_grid_thw"].tolist() == [grid_of(ours)]
    torch.testing.assert_close(normalised(ours), stock["pixel_values_videos"], atol=2e-6, rtol=0)
    if grid is not None:
        assert grid_of(ours) == grid


# ---------------------------------------------------------------------------------------------------------- stills


@pytest.mark.parametrize("name", ["china", "flower", "astronaut", "chelsea", "coffee", "rocket"])
@pytest.mark.parametrize("budget", [(4, 64), (16, 1280)])
def test_photographs_equal_the_stock_processor(tmp_path, name, budget):
    PIL.fromarray(photograph(name)).save(tmp_path / "a.png")
    low, high = (tokens * TOKEN for tokens in budget)
    assert_like_stock(tmp_path / "a.png", replace(SETTINGS, image_min_pixels=low, image_max_pixels=high))


@pytest.mark.parametrize(
    ("width", "height"),
    [(1, 1), (2, 3), (500, 3), (3, 500), (28, 28), (27, 29), (41, 43), (200, 1), (57, 640), (1023, 767)],
)
def test_any_size_equals_the_stock_processor(tmp_path, width, height):
    assert_like_stock(write_image(tmp_path / "a.png", width, height))


@pytest.mark.parametrize(
    "settings", [SETTINGS, pytest.param(replace(SETTINGS, image_max_pixels=16384 * TOKEN), marks=pytest.mark.grid)]
)
def test_a_large_picture(tmp_path, settings):
    assert_like_stock(write_image(tmp_path / "a.jpg", 6000, 4100), settings)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LAB"])
def test_colour_modes_equal_the_stock_processor(tmp_path, mode):
    path = tmp_path / ("a.png" if mode in ("L", "1", "P") else "a.jpg" if mode != "LAB" else "a.tiff")
    picture(90, 60).convert(mode).save(path)
    assert_like_stock(path)


@WHITE_ONLY
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparency_is_laid_on_white_as_the_stock_processor_does(tmp_path, mode):
    save_transparent(tmp_path / "a.png", mode)
    assert_like_stock(tmp_path / "a.png")


def save_transparent(path, mode):
    plain = picture(90, 60)
    if "A" in mode:
        plain.putalpha(PIL.linear_gradient("L").resize((90, 60)))
        plain.convert(mode).save(path)
    else:
        plain = plain.convert(mode)
        plain.save(path, transparency=plain.getpixel((3, 3)))


def test_transparent_pixels_are_white(tmp_path):
    clear = PIL.new("RGBA", (56, 56), (10, 20, 30, 0))
    clear.save(tmp_path / "a.png")
    assert decode(image(tmp_path / "a.png"), SETTINGS).pixels.min() == 255


def grey16() -> np.ndarray:
    return np.linspace(0, 65535, 60 * 90).astype(np.uint16).reshape(60, 90)


@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_16_bit_grey_is_scaled_to_8(tmp_path, name):
    PIL.fromarray(grey16()).save(tmp_path / name)
    eight = PIL.fromarray((grey16() >> 8).astype(np.uint8))
    assert_like_stock(tmp_path / name, opened=eight)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "tiff", "png", "webp"])
def test_exif_turns_the_picture(tmp_path, orientation, ending):
    exif = PIL.Exif()
    exif[0x112] = orientation
    path = write_image(tmp_path / f"a.{ending}", 170, 60, exif=exif)
    assert_like_stock(path)
    turned = orientation >= 5
    grid = measure(image(path), SETTINGS)
    assert (grid.h > grid.w) == turned


def test_exif_behind_the_pixels_of_a_png(tmp_path):
    exif = PIL.Exif()
    exif[0x112] = 6
    path = write_image(tmp_path / "a.png", 170, 60, exif=exif)
    data = path.read_bytes()
    at = data.index(b"eXIf") - 4
    size = struct.unpack(">I", data[at : at + 4])[0] + 12
    end = data.index(b"IEND") - 4
    path.write_bytes(data[:at] + data[at + size : end] + data[at : at + size] + data[end:])
    assert_like_stock(path)
    assert measure(image(path), SETTINGS).h > measure(image(path), SETTINGS).w


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tiff"])
def test_of_an_animation_the_first_frame(tmp_path, name):
    rest = [picture(90, 60, name="flower")]
    picture(90, 60).save(tmp_path / name, save_all=True, append_images=rest)
    assert_like_stock(tmp_path / name)


def test_png_headers_are_measured_without_decoding(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png", 300, 200)
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda *_: pytest.fail("decoded"))
    assert measure(image(path), SETTINGS).patches


# ----------------------------------------------------------------------------------------------- JPEGs, decoded fast


def by_pillow(path) -> torch.Tensor:
    return torch.from_numpy(np.array(open_picture(str(path)))).permute(2, 0, 1)


@pytest.fixture
def pillow_decodes(monkeypatch) -> list[str]:
    """Files whose pixels Pillow decodes."""
    seen: list[str] = []
    load = JpegImagePlugin.JpegImageFile.load

    def spy(self, *args):
        seen.append(str(self.filename))
        return load(self, *args)

    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, "load", spy)
    return seen


JPEGS = {
    "4:2:0": {"subsampling": "4:2:0"},
    "4:2:2": {"subsampling": "4:2:2"},
    "4:4:4": {"subsampling": "4:4:4"},
    "low quality": {"quality": 5},
    "best quality": {"quality": 100},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "restart markers": {"restart_marker_blocks": 3},
    "progressive, restart markers": {"progressive": True, "restart_marker_rows": 1},
    "RGB inside": {"keep_rgb": True},
}


@pytest.mark.parametrize("how", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize(("name", "mode"), [("china", "RGB"), ("astronaut", "RGB"), ("coffee", "L")])
def test_jpegs_are_decoded_bit_for_bit_as_by_pillow(tmp_path, pillow_decodes, how, name, mode):
    for size in ((640, 427), (161, 93), (1, 1)):
        path = tmp_path / f"{size[0]}.jpg"
        picture(*size, name=name).convert(mode).save(path, **how)
        ours = read_pixels(str(path))
        assert not pillow_decodes
        assert torch.equal(ours, by_pillow(path))
        pillow_decodes.clear()


@pytest.mark.parametrize("orientation", range(10))
def test_a_turned_jpeg_is_turned_as_by_pillow(tmp_path, pillow_decodes, orientation):
    exif = PIL.Exif()
    exif[0x112] = orientation
    path = write_image(tmp_path / "a.jpg", 170, 60, exif=exif)
    ours = read_pixels(str(path))
    assert not pillow_decodes
    assert torch.equal(ours, by_pillow(path))


def test_a_jpeg_with_a_second_picture_behind_it_is_decoded_as_by_pillow(tmp_path, pillow_decodes):
    """As phones write them, with a depth map or another exposure (MPO)."""
    path = tmp_path / "a.jpg"
    picture(90, 60).save(path, "MPO", save_all=True, append_images=[picture(90, 60, name="flower")])
    assert PIL.open(path).format == "MPO"
    ours = read_pixels(str(path))
    assert not pillow_decodes
    assert torch.equal(ours, by_pillow(path))


def test_pillow_reads_headers_that_may_turn_a_picture_only(tmp_path, monkeypatch):
    exif = PIL.Exif()
    exif[0x112] = 6
    plain = write_image(tmp_path / "a.jpg", 90, 60, comment=b"A comment.", icc_profile=b"a profile" * 9)
    turned = write_image(tmp_path / "b.jpg", 90, 60, exif=exif)
    xmp = write_image(tmp_path / "c.jpg", 90, 60, xmp=b'<x xmlns:tiff="t" tiff:Orientation="6"/>')
    want = [by_pillow(path) for path in (plain, turned, xmp)]
    assert [one.shape[1:] for one in want] == [(60, 90), (90, 60), (90, 60)]
    opened, real = [], PIL.open
    monkeypatch.setattr(PIL, "open", lambda path: opened.append(path) or real(path))
    for path, one in zip((plain, turned, xmp), want, strict=True):
        assert torch.equal(read_pixels(str(path)), one)
    assert opened == [str(turned), str(xmp)]


@pytest.mark.parametrize("how", ["it is gone", "its part in C++ is missing"])
def test_a_fast_decoder_that_does_not_work_is_said_once(tmp_path, capsys, monkeypatch, pillow_decodes, how):
    def broken(*args, **options):
        raise RuntimeError("Couldn't load custom C++ ops.")

    if how == "it is gone":
        monkeypatch.delattr("torchvision.io.decode_jpeg")
    else:
        monkeypatch.setattr("torchvision.io.decode_jpeg", broken)
    path = write_image(tmp_path / "a.jpg", 90, 60)
    fast_decoder.cache_clear()
    try:
        for _ in range(2):
            assert torch.equal(read_pixels(str(path)), by_pillow(path))
    finally:
        fast_decoder.cache_clear()
    assert pillow_decodes
    (note,) = capsys.readouterr().err.splitlines()
    assert "decoded by Pillow, which takes about 2.5 times as long: torchvision.io.decode_jpeg cannot be used (" in note
    assert ("cannot import name" if how == "it is gone" else "custom C++ ops") in note


@pytest.mark.parametrize("ending", ["jpg", "png"])
def test_what_is_no_plain_jpeg_pillow_decodes(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    picture(90, 60).convert("CMYK" if ending == "jpg" else "P").save(path)
    assert torch.equal(read_pixels(str(path)), by_pillow(path))


def test_a_damaged_jpeg_is_taken_or_refused_as_by_pillow(tmp_path):
    """Truncated or with overwritten bytes: vlft skips what Pillow skips, and refuses with the message of Pillow."""
    rng = np.random.default_rng(0)
    path, outcomes = tmp_path / "a.jpg", set()
    for i in range(300):
        picture(90, 60).save(path, progressive=i % 3 == 0, restart_marker_blocks=4 * (i % 2))
        data = bytearray(path.read_bytes())
        if i % 5 == 0:
            del data[rng.integers(2, len(data)) :]
        elif i % 5 == 1:
            del data[-rng.integers(1, 9) :]
        else:
            last = len(data) if i % 2 else data.index(b"\xff\xda") + 20  # anywhere, or in the header
            for at in rng.integers(2, last, size=rng.integers(1, 6)):
                data[at] = rng.integers(256)
        path.write_bytes(data)
        found: list[torch.Tensor | str] = []
        for read in (read_pixels, lambda p: by_pillow(p)):
            try:
                found.append(read(str(path)))
            except Unreadable as error:
                found.append(str(error))
        ours, theirs = found
        if isinstance(ours, str) or isinstance(theirs, str):
            assert ours == theirs, i
        else:
            assert torch.equal(ours, theirs), i
        outcomes.add(isinstance(ours, str))
    assert outcomes == {True, False}


# --------------------------------------------------------------------------------------------------- stills refused


def write_truncated(path):
    data = write_image(path, 400, 300).read_bytes()
    path.write_bytes(data[: len(data) // 2])


def write_wide(path):
    PIL.new("RGB", (2010, 10)).save(path)


BAD_PICTURES = {
    "missing": ("a.jpg", lambda path: None, "no such file"),
    "folder": ("a.jpg", lambda path: path.mkdir(), "is a folder"),
    "empty": ("a.jpg", lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "text": ("a.png", lambda path: path.write_text("hello"), "is text, not a picture"),
    "truncated jpeg": ("a.jpg", write_truncated, "cut short"),
    "truncated png": ("a.png", write_truncated, "cut short"),
    "aspect ratio": ("a.png", write_wide, "2010x10: the longer side is 201.0 times"),
    "float": ("a.tiff", lambda path: PIL.new("F", (60, 60)).save(path), "floating-point"),
}


@pytest.mark.parametrize(("name", "write", "reason"), BAD_PICTURES.values(), ids=BAD_PICTURES)
def test_pictures_refused(tmp_path, name, write, reason):
    write(tmp_path / name)
    with pytest.raises(MediaError, match=reason) as caught:
        decode(Image(path=str(tmp_path / name), field="image[3]"), SETTINGS)
    assert caught.value.field == "image[3]"
    assert str(tmp_path / name) in caught.value.reason
    if reason != "cut short":  # the only files whose headers are intact
        with pytest.raises(MediaError, match=reason):
            measure(image(tmp_path / name), SETTINGS)


def test_decompression_bomb(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png", 300, 200)
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 300 * 200 // 2 - 1)
    with pytest.raises(MediaError, match="too large"):
        measure(image(path), SETTINGS)
    monkeypatch.setattr(PIL, "MAX_IMAGE_PIXELS", 300 * 200 - 1)  # Pillow only warns, so vlft accepts it
    assert measure(image(path), SETTINGS) == decode(image(path), SETTINGS).grid


def test_media_errors_cross_processes():
    error = pickle.loads(pickle.dumps(MediaError("video[1]", "why")))
    assert (error.field, error.reason, str(error)) == ("video[1]", "why", "video[1]: why")


# ---------------------------------------------------------------------------------------------------------- videos


@pytest.mark.parametrize(
    ("file", "codec"),
    [("a.mp4", "mpeg4"), ("a.mp4", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4"), ("a.mkv", "libx264")],
)
def test_videos_equal_the_stock_path(tmp_path, file, codec):
    path = write_video(tmp_path / file, 20, codec=codec)
    ask = {"fps": SETTINGS.fps, "max_frames": SETTINGS.video_max_frames}
    assert_video_like_stock(str(path), video(path), **ask)


@pytest.mark.parametrize(("fps", "t"), [(0.5, 2), (1.0, 2), (2.0, 3), (6.0, 10), (30.0, 10)])
def test_fps(tmp_path, fps, t):
    path = write_video(tmp_path / "a.mp4", 21, fps=6)
    settings = replace(SETTINGS, fps=fps)
    assert_video_like_stock(str(path), video(path), settings, grid=[t, 4, 6], fps=fps, max_frames=768)


@pytest.mark.parametrize("nframes", [2, 6, 20])
def test_nframes(tmp_path, nframes):
    path = write_video(tmp_path / "a.mp4", 21)
    assert_video_like_stock(str(path), video(path), replace(SETTINGS, nframes=nframes), nframes=nframes)


@pytest.mark.parametrize("most", [2, 8])
def test_max_frames(tmp_path, most):
    path = write_video(tmp_path / "a.mp4", 40)
    settings = replace(SETTINGS, fps=6.0, video_max_frames=most)
    assert_video_like_stock(str(path), video(path), settings, fps=6.0, max_frames=most)
    assert measure(video(path), settings).t == most // 2


@pytest.mark.parametrize(("low", "high"), [(4, 16), (128, 768), (700, 16384), (900, 16384)])
def test_frame_budgets(tmp_path, low, high):
    path = write_video(tmp_path / "a.mp4", 6, 640, 360, codec="libx264")
    settings = replace(SETTINGS, video_min_pixels=low * TOKEN, video_max_pixels=high * TOKEN)
    assert_video_like_stock(str(path), video(path), settings, fps=2.0, max_frames=768)


@pytest.mark.grid
def test_many_frames_share_a_budget(tmp_path):
    path = write_video(tmp_path / "a.mp4", 320, 160, 120, fps=8)
    settings = replace(SETTINGS, video_min_pixels=300 * TOKEN, video_max_pixels=768 * TOKEN, nframes=320)
    ours = measure(video(path), settings)
    from qwen_vl_utils import vision_process

    budget = {"min_pixels": settings.video_min_pixels, "max_pixels": settings.video_max_pixels}
    frames = vision_process.fetch_video({"video": str(path), "nframes": 320, **budget})
    assert [ours.t * 2, 3, ours.h * 14, ours.w * 14] == list(frames.shape)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("width", "height"), [(96, 64), (640, 360), (57, 300)])
def test_a_list_of_frames_equals_the_stock_path(tmp_path, count, width, height):
    names = ["china", "flower", "astronaut", "chelsea", "coffee"][:count]
    paths = [write_image(tmp_path / f"{name}.png", width, height, name=name) for name in names]
    frames = Video(frames=tuple(map(str, paths)), field="video")
    assert_video_like_stock([PIL.open(path) for path in paths], frames)
    assert measure(frames, SETTINGS).t == (count + 1) // 2
    big = replace(SETTINGS, video_min_pixels=128 * TOKEN, video_max_pixels=16384 * TOKEN)
    assert_video_like_stock([PIL.open(path) for path in paths], frames, big)


def test_frames_are_made_upright_and_rgb(tmp_path):
    exif = PIL.Exif()
    exif[0x112] = 6
    paths = [write_image(tmp_path / "0.jpg", 170, 60, exif=exif), tmp_path / "1.png"]
    picture(60, 170).convert("P").save(paths[1])
    opened = [ImageOps.exif_transpose(PIL.open(path)).convert("RGB") for path in paths]
    assert_video_like_stock(opened, Video(frames=tuple(map(str, paths)), field="video"))


@pytest.mark.parametrize(
    ("file", "codec", "pix_fmt"),
    [
        ("a.mp4", "libsvtav1", "yuv420p"),
        ("a.gif", "gif", "rgb8"),
        ("a.ts", "libx264", "yuv420p"),
        ("a.apng", "apng", "rgb24"),
    ],
)
def test_what_decord_cannot_open_is_read(tmp_path, file, codec, pix_fmt):
    path = write_video(tmp_path / file, 20, 112, 56, codec=codec, pix_fmt=pix_fmt)
    ours = decode(video(path), SETTINGS)
    assert measure(video(path), SETTINGS) == ours.grid
    assert grid_of(ours) == [3, 4, 8]
    twin = write_video(tmp_path / "twin.mkv", 20, 112, 56, codec="ffv1")  # lossless, read by decord
    want = pixels(decode(video(twin), SETTINGS)).astype(float)
    for i, frame in enumerate(pixels(ours)):  # these codecs lose colour, but not which frame it is
        assert abs(frame - want).mean(axis=(1, 2, 3)).argmin() == i


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_a_clip_turned_by_its_metadata_is_upright(tmp_path, degrees):
    path = write_video(tmp_path / "a.mp4", 8, 112, 56, codec="libx264")
    plain = decode(video(path), SETTINGS)
    turn(path, degrees)
    ours = decode(video(path), SETTINGS)
    assert measure(video(path), SETTINGS) == ours.grid
    want = np.rot90(pixels(plain), -degrees // 90, axes=(1, 2))
    difference = pixels(ours).astype(float) - want
    assert abs(difference).mean() < 1


@pytest.mark.parametrize(
    ("file", "codec"),
    [("a.mp4", "libx264"), ("a.mp4", "mpeg4"), ("a.ts", "libx264"), ("a.mp4", "libsvtav1"), ("a.webm", "libvpx-vp9")],
)
def test_frames_that_were_sought_are_those_that_were_counted(tmp_path, file, codec):
    """PyAV seeks from key frame to key frame; every frame equals that of decoding all of them."""
    import av

    path = write_video(tmp_path / file, 300, 112, 56, codec=codec)
    turned = 2 if file == "a.mp4" else 0
    if turned:
        turn(path, 180)
    with av.open(str(path)) as container:
        counted = [np.rot90(frame.to_ndarray(format="rgb24"), turned) for frame in container.decode(video=0)]
    wanted = [0, 1, 7, 120, 131, 260, 261, 299]
    frames = np.concatenate(list(clips.read_frames(clips.open_clip(str(path)), wanted)))
    assert np.array_equal(frames, np.stack([counted[i] for i in wanted]))


def test_seeking_decodes_only_what_it_must(tmp_path):
    path = write_video(tmp_path / "a.mp4", 600, 112, 56)  # mpeg4: a key frame every 12
    clip = clips.open_clip(str(path))
    data = bytearray(path.read_bytes())
    middle = slice(len(data) // 3, len(data) // 2)
    data[middle] = bytes(len(data[middle]))  # frames that are not asked for
    path.write_bytes(data)
    assert len(np.concatenate(list(clips.read_frames(clip, [3, 60, 500, 590])))) == 4


# --------------------------------------------------------------------------------------------------- videos refused


def write_cut(path, keep=0.5, **how):
    data = write_video(path, 60, 320, 240, **how).read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


BAD_VIDEOS = {
    "missing": ("a.mp4", lambda path: None, "no such file"),
    "empty": ("a.mp4", lambda path: path.write_bytes(b""), r"is empty \(0 bytes\)"),
    "text": ("a.mp4", lambda path: path.write_text("hello" * 99), "is text, not a video"),
    "cut mp4": ("a.mp4", write_cut, "cut short"),
    "cut mp4, index first": ("a.mp4", lambda path: write_cut(path, options={"movflags": "faststart"}), "cut short"),
    "cut avi": ("a.avi", write_cut, "cut short"),
    "cut webm": ("a.webm", lambda path: write_cut(path, codec="libvpx-vp9"), "cut short"),
    "one frame": ("a.mp4", lambda path: write_video(path, 1), "a video of 1 frame, 2 are needed"),
    "a still": ("a.jpg", lambda path: write_image(path), 'is a JPEG picture, not a video. Name it under "image"'),
}


@pytest.mark.parametrize(("name", "write", "reason"), BAD_VIDEOS.values(), ids=BAD_VIDEOS)
def test_videos_refused(tmp_path, name, write, reason):
    write(tmp_path / name)
    for read in (measure, decode):
        with pytest.raises(MediaError, match=reason) as caught:
            read(Video(path=str(tmp_path / name), field="video[1]"), SETTINGS)
        assert caught.value.field == "video[1]"


@pytest.mark.parametrize("kind", ["ExternalError", "PatchWelcomeError", "UnknownError"])
def test_an_error_of_ffmpeg_itself_names_the_file(tmp_path, monkeypatch, kind):
    """These exceptions are neither OSError nor ValueError."""
    import av

    def fail(*_, **__):
        raise getattr(av.error, kind)(1, "codec trouble")

    write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(av, "open", fail)
    with pytest.raises(MediaError, match=r"a\.mp4: not a video that PyAV can read .*codec trouble"):
        measure(video(tmp_path / "a.mp4"), SETTINGS)


def test_fewer_frames_than_asked_for(tmp_path):
    path = write_video(tmp_path / "a.mp4", 5)
    with pytest.raises(MediaError, match=r"--nframes 8, and it has 5 frames\. Lower --nframes to 4"):
        measure(video(path), replace(SETTINGS, nframes=8))


def test_a_bad_frame_is_named(tmp_path):
    good, wide = write_image(tmp_path / "0.png", 90, 60), write_image(tmp_path / "1.png", 300, 60)
    for read in (measure, decode):
        with pytest.raises(MediaError, match="no such file") as caught:
            read(Video(frames=(str(good), str(tmp_path / "no.png")), field="video[0]"), SETTINGS)
        assert caught.value.field == "video[0][1]"
        with pytest.raises(MediaError, match="300x60, the first frame 90x60"):
            read(Video(frames=(str(good), str(wide)), field="video"), SETTINGS)


# -------------------------------------------------------------------------------------------------------- settings


def test_settings_default_to_the_processor():
    assert (SETTINGS.image_min_pixels, SETTINGS.image_max_pixels) == (4 * TOKEN, 64 * TOKEN)
    assert (SETTINGS.video_min_pixels, SETTINGS.video_max_pixels) == (4 * TOKEN, 64 * TOKEN)
    assert (SETTINGS.fps, SETTINGS.nframes, SETTINGS.video_max_frames) == (2.0, None, 768)
    flags = RowFlags(image_max_pixels=100 * TOKEN, video_min_pixels=8 * TOKEN, fps=1, video_max_frames=8)
    given = Recipe.of(PROCESSOR, flags)
    assert (given.image_max_pixels, given.video_min_pixels) == (100 * TOKEN, 8 * TOKEN)
    assert (given.fps, given.video_max_frames) == (1, 8)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"fps": 2.0, "nframes": 8}, "--fps 2.0 and --nframes 8"),
        ({"fps": 0.0}, "--fps 0.0"),
        ({"nframes": 7}, "--nframes 7: frames go in pairs"),
        ({"nframes": 0}, "--nframes 0"),
        ({"video_max_frames": 1}, "--video_max_frames 1"),
        ({"nframes": 8, "video_max_frames": 4}, "--nframes 8 is above --video_max_frames 4"),
        ({"image_min_pixels": 65 * TOKEN}, f"--image_min_pixels {65 * TOKEN} is above --image_max_pixels {64 * TOKEN}"),
        ({"video_max_pixels": 3 * TOKEN}, f"--video_min_pixels {4 * TOKEN} is above --video_max_pixels {3 * TOKEN}"),
        ({"image_min_pixels": 0}, "--image_min_pixels 0"),
        ({"image_min_pixels": 1, "image_max_pixels": 700}, "less than one token"),
        ({"video_max_pixels": 769 * TOKEN}, f"--video_max_pixels {769 * TOKEN}: no frame gets more than {768 * TOKEN}"),
    ],
)
def test_settings_refused(flags, reason):
    with pytest.raises(ConfigError, match=reason):
        Recipe.of(PROCESSOR, RowFlags(**flags))
