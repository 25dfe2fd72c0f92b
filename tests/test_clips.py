"""The frames read are those that were asked for, in every container, and every readable file is accepted."""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
from build import write_video
from numbered import FEW, FRAMES, INTERLACED, MATRIX, Recipe, encode, number_of, numbered, plain, remux, write
from stills_and_clips import SETTINGS, pixels, turn, video

from vlft.data.media import seeking
from vlft.data.media.clips import open_clip, read_frames
from vlft.data.media.decode import decode
from vlft.data.media.frames import index_frames
from vlft.data.media.pictures import Unreadable
from vlft.data.media.read import MediaError, measure
from vlft.data.sample import Overrides

EIGHT = replace(SETTINGS, nframes=8)


def asked(count: int) -> list[int]:
    return np.linspace(0, count - 1, 8).round().astype(int).tolist()


def assert_frames(path, *, count=None):
    """Through the public functions and below them: the count, the pixels, and the numbers that the frames show."""
    want = plain(path)
    clip = open_clip(str(path))
    assert clip.frames == len(want)
    assert count is None or clip.frames == count
    indices = asked(len(want))
    ours = np.concatenate(list(read_frames(clip, indices)))
    assert np.array_equal(ours, np.stack([want[i] for i in indices]))
    media = decode(video(path), EIGHT)
    assert measure(video(path), EIGHT) == media.grid
    assert [number_of(frame) for frame in pixels(media)] == [number_of(want[i]) for i in indices]
    return clip


# ------------------------------------------------------------------------------------------- containers and codecs


@pytest.mark.parametrize("recipe", FEW, ids=lambda recipe: recipe.name)
def test_frames_are_those_that_were_asked_for(tmp_path, recipe):
    path = write(tmp_path / recipe.name, recipe)
    assert_frames(path, count=FRAMES)
    assert [number_of(frame) for frame in pixels(decode(video(path), EIGHT))] == asked(FRAMES)


@pytest.mark.grid
def test_every_container_and_codec(tmp_path):
    """Prints the table with `-s`: container, codec, B-frames, and the result."""
    found: Counter[str] = Counter()
    for recipe in MATRIX:
        path = tmp_path / recipe.name
        try:
            write(path, recipe)
            want = plain(path)
        except (OSError, ValueError) as error:  # PyAV cannot write it, or cannot read it either
            verdict = f"not written or not read by PyAV: {str(error)[:60]}"
        else:
            try:
                clip = open_clip(str(path))
                ours = np.concatenate(list(read_frames(clip, range(clip.frames))))
                some = np.concatenate(list(read_frames(clip, asked(clip.frames))))
            except Unreadable as error:
                verdict = f"REFUSED: {error}"
            else:
                equal = len(ours) == len(want) and np.array_equal(ours, np.stack(want))
                right = equal and [number_of(frame) for frame in some] == asked(FRAMES)
                verdict = "right" if right else f"WRONG: {[number_of(frame) for frame in some]}"
        found[verdict.split(":")[0]] += 1
        print(f"{recipe.ending:5} {recipe.codec:11} B {recipe.bframes} {recipe.kind:7} {verdict}")
    print(found)
    assert found["right"] >= 180
    assert set(found) == {"right", "not written or not read by PyAV"}


def test_seeking_reads_a_part_of_the_file(tmp_path, monkeypatch):
    """Counting from the start is the fallback, not the usual way."""
    monkeypatch.setattr(seeking, "_counted", lambda *_: pytest.fail("counted"))
    for name in ("mp4-libx264-b3-open.mp4", "ts-libx264-b2.ts", "avi-mpeg4-b2.avi", "mkv-mpeg2video-b2.mkv"):
        recipe = next(one for one in MATRIX if one.name == name)
        clip = open_clip(str(write(tmp_path / name, recipe)))
        frames = np.concatenate(list(read_frames(clip, [1, 13, 14, 40, 59])))
        assert [number_of(frame) for frame in frames] == [1, 13, 14, 40, 59], name


def test_where_seeking_leads_nowhere_frames_are_counted(tmp_path):
    """The clip has no key frames that decode alone: columns of the frame are refreshed one after another."""
    options = {"preset": "veryfast", "x264-params": "keyint=12:intra-refresh=1:bframes=0"}
    assert_frames(encode(tmp_path / "a.mp4", options=options, bframes=0), count=FRAMES)


# -------------------------------------------------------------------------------------------------- odd containers


def cut_by_edit_list(path, *, first, frames=None):
    """Hide frames of an .mp4 as a cut by stream copy does: they are stored but not shown."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12
    shown_ms, start = struct.unpack(">Ii", data[at : at + 8])
    assert shown_ms == FRAMES * 100
    with av.open(str(path)) as container:
        step = int(Fraction(1, 10) / container.streams.video[0].time_base)
    frames = FRAMES - first if frames is None else frames
    data[at : at + 8] = struct.pack(">Ii", frames * 100, start + first * step)
    path.write_bytes(data)


@pytest.mark.parametrize(("first", "frames"), [(3, None), (12, None), (17, None), (0, 30), (5, 20)])
@pytest.mark.parametrize("recipe", ["mp4-libx264-b2.mp4", "mp4-libx264-b3-open.mp4"])
def test_samples_that_an_edit_list_hides_are_no_frames(tmp_path, recipe, first, frames):
    path = write(tmp_path / "a.mp4", next(one for one in MATRIX if one.name == recipe))
    cut_by_edit_list(path, first=first, frames=frames)
    clip = assert_frames(path)
    (start,) = np.concatenate(list(read_frames(clip, [0])))
    assert number_of(start) == first
    assert clip.frames < FRAMES
    assert clip.times[0] == 0
    assert np.allclose(np.diff(clip.times), 0.1)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
@pytest.mark.parametrize(("recipe", "cut"), [("mp4-libx265-b3-open.mp4", 12), ("mp4-mpeg2video-b2.mp4", 7)])
def test_a_clip_that_begins_between_key_frames(tmp_path, recipe, cut, ending):
    """Leading pictures of the first key frame cannot be decoded, and are not counted."""
    whole = write(tmp_path / "whole.mp4", next(one for one in MATRIX if one.name == recipe))
    assert_frames(remux(whole, tmp_path / f"a.{ending}", lambda i: i >= cut))


def test_a_file_with_a_hole(tmp_path):
    whole = write(tmp_path / "whole.mp4", Recipe(ending="mp4", codec="libx264", bframes=2))
    assert_frames(remux(whole, tmp_path / "a.ts", lambda i: not 20 <= i < 23))


ODD = {
    "begins at 5 s, mkv": ("a.mkv", {"times": lambda i: 5000 + 100 * i}),
    "begins at 5 s, mp4": ("a.mp4", {"times": lambda i: 5000 + 100 * i}),
    "begins at 5 s, ts": ("a.ts", {"times": lambda i: 5000 + 100 * i}),
    "begins before 0": ("a.mp4", {"times": lambda i: 100 * i - 500, "container": {"avoid_negative_ts": "disabled"}}),
    "variable rate": ("a.mp4", {"times": lambda i: 100 * i + 17 * (i % 5)}),
    "variable rate, ts": ("a.ts", {"times": lambda i: 100 * i + 17 * (i % 5)}),
    "a pause": ("a.mkv", {"times": lambda i: 100 * i + 3000 * (i > 30)}),
    "fragments": ("a.mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}}),
    "a cover picture first": ("a.mkv", {"cover": True}),
    "two streams": ("a.mp4", {"second": (32, 32)}),
    "odd size": ("a.mkv", {"codec": "ffv1", "size": (161, 113)}),
    "4:4:4": ("a.mp4", {"pix_fmt": "yuv444p", "size": (161, 113)}),
    "10 bits, ts": ("a.ts", {"pix_fmt": "yuv420p10le"}),
    "full range": ("a.mov", {"color_range": 2}),
    "interlaced, ts": ("a.ts", {"codec": "mpeg2video", "fps": 25, "flags": INTERLACED}),
    "alpha": ("a.mov", {"codec": "prores_ks", "pix_fmt": "yuva444p10le"}),
    "a name like an address": ("a:b c%20d?.mp4", {}),
}


@pytest.mark.parametrize(("name", "how"), ODD.values(), ids=ODD)
def test_odd_clips(tmp_path, name, how):
    assert_frames(encode(tmp_path / name, **how))


def test_where_versions_of_ffmpeg_differ_pixels_are_those_of_the_stock_path(tmp_path):
    decord = pytest.importorskip("decord")
    path = write_video(tmp_path / "a.mp4", codec="libx264", pix_fmt="yuv420p10le")
    ours = np.concatenate(list(read_frames(open_clip(str(path)), [0, 5, 11])))
    theirs = decord.VideoReader(str(path), num_threads=1).get_batch([0, 5, 11]).asnumpy()
    assert np.array_equal(ours, theirs)
    assert not np.array_equal(ours[0], plain(path)[0])


def test_the_last_frame_may_be_held(tmp_path):
    path = encode(tmp_path / "a.mp4", bframes=0, options={"preset": "veryfast", "x264-params": "bframes=0"})
    data = bytearray(path.read_bytes())
    for box, at in ((b"mvhd", 20), (b"tkhd", 24), (b"mdhd", 20), (b"elst", 12)):  # ten times as long
        at += data.index(box)
        data[at : at + 4] = (int.from_bytes(data[at : at + 4]) * 10).to_bytes(4)
    path.write_bytes(data)
    assert_frames(path, count=FRAMES)


def test_a_turned_clip_is_counted_as_it_lies(tmp_path):
    path = encode(tmp_path / "a.mp4")
    turn(path, 180)
    clip = open_clip(str(path))
    ours = np.concatenate(list(read_frames(clip, asked(FRAMES))))
    assert np.array_equal(ours, np.stack([np.rot90(plain(path)[i], 2) for i in asked(FRAMES)]))


def test_a_frame_of_another_size_is_brought_to_the_first(tmp_path):
    small, large = encode(tmp_path / "small.ts"), encode(tmp_path / "large.ts", size=(192, 128))
    path = tmp_path / "a.ts"
    path.write_bytes(small.read_bytes() + large.read_bytes())
    clip = open_clip(str(path))
    frames = np.concatenate(list(read_frames(clip, [0, 59, 60, 119])))
    assert [number_of(frame) for frame in frames] == [0, 59, 0, 59]
    assert frames.shape[1:] == (64, 96, 3)


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_seconds_are_counted_from_the_first_frame(tmp_path, name):
    path = encode(tmp_path / name, times=lambda i: 5000 + 100 * i)
    part = replace(video(path), overrides=Overrides(video_start=1.0, video_end=3.0, nframes=4))
    assert [number_of(frame) for frame in pixels(decode(part, SETTINGS))] == [10, 17, 23, 30]
    assert np.allclose(open_clip(str(path)).times, np.arange(FRAMES) / 10)


@pytest.mark.parametrize("name", ["a.gif", "a.mp4"])
def test_a_comment_in_another_alphabet(tmp_path, name):
    gif = name == "a.gif"
    path = encode(
        tmp_path / name, comment="caf~", **({"codec": "gif", "pix_fmt": "gray", "bframes": None} if gif else {})
    )
    data = path.read_bytes()
    if gif:  # FFmpeg writes none
        at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
        data = data[:at] + b"!\xfe\x04caf\xe9\x00" + data[at:]
    path.write_bytes(data.replace(b"caf~", b"caf\xe9"))
    assert b"caf\xe9" in path.read_bytes()
    assert_frames(path, count=FRAMES)


# -------------------------------------------------------------------------------------------------------- cut short


@pytest.mark.parametrize("keep", [0.5, 0.8])
@pytest.mark.parametrize(
    "name",
    [
        *("mp4-libx264-b2.mp4", "mov-prores_ks-b0.mov", "3gp-libx264-b0.3gp", "mkv-libx264-b2.mkv"),
        *("webm-libvpx-b0.webm", "avi-mpeg4-b2.avi", "avi-libx264-b2.avi", "wmv-wmv2-b0.wmv"),
        *("flv-flv-b0.flv", "gif-gif-b0.gif"),
    ],
)
def test_a_file_that_was_cut_short_is_refused(tmp_path, name, keep):
    path = write(tmp_path / name, next(one for one in MATRIX if one.name == name))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    for read in (measure, decode):
        with pytest.raises(MediaError, match="cut short"):
            read(video(path), SETTINGS)


def test_what_does_not_say_its_length_is_taken_as_it_is(tmp_path):
    path = encode(tmp_path / "a.ts")
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2 // 188 * 188])
    assert 20 < assert_frames(path).frames < 40


def test_damage_is_told_from_another_kind_of_file(tmp_path):
    path = encode(tmp_path / "a.mp4")
    index = index_frames(str(path))
    data = bytearray(path.read_bytes())
    for _, place, size in index.packets[:3]:
        data[place : place + size] = bytes(size)
    path.write_bytes(data)
    with pytest.raises(MediaError, match=r"a\.mp4: damaged at its first frame"):
        measure(video(path), SETTINGS)


def test_numbers_survive_the_smallest_size():
    assert [number_of(numbered(i, 48, 32)) for i in range(64)] == list(range(64))
