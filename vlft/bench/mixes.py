"""Rows for benchmarks: seeded mixes of lengths, drawn as numbers, then written as pictures, clips and a data file.

All functions except `write_mix` are pure: the same arguments give the same rows. Pictures come from a small pool of
files that look natural to a JPEG decoder (smooth colours, edges, grain). Rows share the files, because neither side of
a benchmark caches decoded pictures.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

from vlft.errors import ConfigError
from vlft.files import appearing_path

Mix = Literal["story", "photo", "video", "text"]
MIXES: tuple[Mix, ...] = get_args(Mix)
Scale = Literal["tiny", "real"]
Unit = Literal["byte", "word"]

JPEG_QUALITY = 90
POOL = 12  # files of one size
#: (width, height) -> weight. None is a multiple of 28 or 32, so that every picture is resized, as photographs are.
SIZES: dict[Scale, dict[tuple[int, int], int]] = {
    "real": {(450, 340): 30, (675, 500): 35, (900, 675): 20, (1024, 768): 15},
    "tiny": {(60, 60): 30, (90, 60): 35, (90, 90): 20, (120, 90): 15},
}
PHOTOS: dict[Scale, dict[tuple[int, int], int]] = {
    "real": {(1150, 870): 4, (870, 1150): 3, (1010, 1010): 1, (1340, 750): 2},
    "tiny": {(120, 90): 4, (90, 120): 3, (110, 110): 1, (150, 84): 2},
}
CLIPS: dict[Scale, tuple[int, int]] = {"real": (452, 340), "tiny": (84, 56)}
FRAMES_A_SECOND = 8  # frame rate of written clips; training uses 2 frames per second by default
SHORTER: dict[Scale, int] = {"real": 1, "tiny": 16}  # factor by which texts are shorter

WORDS = (
    *("the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on", "not"),
    *(
        "he",
        "his",
        "but",
        "at",
        "are",
        "this",
        "have",
        "from",
        "or",
        "had",
        "an",
        "they",
        "which",
        "one",
        "you",
        "were",
    ),
    *("all", "her", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who", "will", "no", "more"),
    *("if", "out", "so", "up", "said", "what", "its", "about", "than", "into", "them", "can", "only", "other", "time"),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Sizes of one row.

    Attributes:
        pictures: (width, height, number of the file in the pool) of each picture.
        seconds: length of the row's clip; 0 for none.
        question: tokens of the question, without tags.
        answer: tokens of the answer.
    """

    pictures: tuple[tuple[int, int, int], ...] = ()
    seconds: int = 0
    question: int
    answer: int


def draw_rows(mix: Mix, count: int, *, seed: int, scale: Scale) -> list[Row]:
    """Draw `count` rows of a mix.

    `story`: 1 to 12 pictures and 20 to 3,000 answer tokens, both long-tailed. `photo`: one picture of about 1 MP and a
    short answer. `video`: one clip of 2 to 16 seconds. `text`: 50 to 3,000 answer tokens.

    Args:
        scale: `real` for these sizes; `tiny` for tiny models: pictures of a few tokens, and texts 16 times shorter.
    """
    rng = random.Random(f"{mix}/{seed}/{scale}")
    return [_row(mix, rng, scale) for _ in range(count)]


def _row(mix: Mix, rng: random.Random, scale: Scale) -> Row:
    def text(median: float, sigma: float, low: int, high: int) -> int:
        return max(4, min(high, max(low, round(rng.lognormvariate(math.log(median), sigma)))) // SHORTER[scale])

    def picture(sizes: dict[tuple[int, int], int]) -> tuple[int, int, int]:
        [(width, height)] = rng.choices(list(sizes), weights=list(sizes.values()))
        return width, height, rng.randrange(POOL)

    if mix == "story":
        count = min(12, max(1, round(rng.lognormvariate(math.log(3), 0.7))))
        pictures = tuple(picture(SIZES[scale]) for _ in range(count))
        return Row(pictures=pictures, question=text(30, 0.5, 8, 200), answer=text(200, 1.1, 20, 3000))
    if mix == "photo":
        return Row(pictures=(picture(PHOTOS[scale]),), question=text(20, 0.5, 5, 80), answer=text(30, 0.7, 5, 200))
    if mix == "video":
        seconds = min(16, max(2, round(rng.lognormvariate(math.log(5), 0.6))))
        return Row(seconds=seconds, question=text(20, 0.5, 5, 80), answer=text(80, 0.8, 20, 500))
    return Row(question=text(60, 1.0, 10, 1000), answer=text(300, 1.0, 50, 3000))


def mean_tokens(rows: Sequence[Row], scale: Scale, *, factor: int) -> float:
    """Estimate the mean number of tokens of a row at stock pixel and frame settings.

    Args:
        factor: side of a token in pixels.
    """

    def of(width: int, height: int) -> int:
        return max(1, round(width / factor)) * max(1, round(height / factor))

    total = 0
    for row in rows:
        total += row.question + row.answer + 40  # control tokens of the turns, and the default system turn
        total += sum(of(width, height) + 3 for width, height, _ in row.pictures)
        total += row.seconds * of(*CLIPS[scale])  # two frames per second make one time step
    return total / len(rows)


def write_mix(
    folder: Path,
    mix: Mix,
    count: int,
    *,
    seed: int,
    scale: Scale,
    unit: Unit,
    say: Callable[[str], None] = lambda line: None,
) -> Path:
    """Write a mix to disk.

    Args:
        folder: folder to write in. Existing files of the same mix are reused.
        unit: text that makes one token: a `byte` (our built-in tokenizer) or a common `word` (a real one).
        say: receives a line before writing, which takes some seconds.

    Returns:
        the data file.

    Raises:
        ConfigError: the mix has clips, and PyAV is missing.
    """
    file = folder / f"{mix}-{scale}-{unit}-{count}-{seed}.json"
    if file.exists():
        return file
    rows = draw_rows(mix, count, seed=seed, scale=scale)
    needed = {picture for row in rows for picture in row.pictures}
    clips = {(row.seconds, i % POOL) for i, row in enumerate(rows) if row.seconds}
    say(f"writing {count:,} rows of the {mix} mix ({len(needed) + len(clips)} media files) to {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    for width, height, k in sorted(needed):
        _once(
            folder / _picture_name(width, height, k),
            partial(_write_picture, width=width, height=height, k=k, seed=seed),
        )
    for seconds, k in sorted(clips):
        _once(
            folder / _clip_name(scale, seconds, k), partial(_write_clip, seconds=seconds, k=k, scale=scale, seed=seed)
        )
    rng = random.Random(f"text/{mix}/{seed}")
    records = [_record(i, row, rng, scale, unit) for i, row in enumerate(rows)]
    _once(file, lambda path: path.write_text(json.dumps(records), encoding="utf-8"))
    return file


def _once(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file atomically, unless it exists."""
    if not path.exists():
        with appearing_path(path) as spare:
            write(spare)


def _record(index: int, row: Row, rng: random.Random, scale: Scale, unit: Unit) -> dict[str, Any]:
    record: dict[str, Any] = {"id": str(index)}
    tags = ""
    if row.pictures:
        record["image"] = [_picture_name(*picture) for picture in row.pictures]
        tags = "<image>\n" * len(row.pictures)
    if row.seconds:
        record["video"] = _clip_name(scale, row.seconds, index % POOL)
        tags = "<video>\n"
    question, answer = (_text(rng, tokens, unit) for tokens in (row.question, row.answer))
    turns = [{"from": "human", "value": tags + question}, {"from": "gpt", "value": answer}]
    return record | {"conversations": turns}


def _text(rng: random.Random, tokens: int, unit: Unit) -> str:
    words = " ".join(rng.choices(WORDS, k=tokens))
    return words if unit == "word" else words[: tokens - 1].rstrip() + "."


def _picture_name(width: int, height: int, k: int) -> str:
    return f"{width}x{height}-{k}.jpg"


def _clip_name(scale: Scale, seconds: int, k: int) -> str:
    return f"{scale}-{seconds}s-{k}.mp4"


def _write_picture(path: Path, *, width: int, height: int, k: int, seed: int) -> None:
    scenery(width, height, seed=(seed, width, height, k)).save(path, quality=JPEG_QUALITY)


def scenery(width: int, height: int, *, seed: Sequence[int]):
    """Draw an RGB picture that costs a decoder as much as a photograph: broad shades, edges, fine grain."""
    import numpy as np
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(list(seed))
    total = np.zeros((height, width, 3), np.float32)
    side = max(width, height)
    for octave in range(5):
        cells = 2 ** (octave + 1)
        small = rng.random((max(2, cells * height // side), max(2, cells * width // side), 3)) * 255
        shade = Image.fromarray(small.astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
        total += np.asarray(shade, np.float32) * 0.5 ** (octave + 1)
    picture = Image.fromarray(np.clip(total, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(picture, "RGBA")
    for _ in range(14):
        x, y, w, h = (int(v * side) for v in rng.random(4) * (1.0, 1.0, 0.35, 0.35))
        colour = (*(int(c) for c in rng.integers(0, 256, 3)), int(rng.integers(60, 200)))
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)((x - w, y - h, x, y), fill=colour)
    grain = rng.normal(0, 4, (height, width, 1))
    return Image.fromarray(np.clip(np.asarray(picture, np.float32) + grain, 0, 255).astype(np.uint8))


def _write_clip(path: Path, *, seconds: int, k: int, scale: Scale, seed: int) -> None:
    """Write a clip that pans over scenery."""
    try:
        import av
    except ImportError as error:
        raise ConfigError("the video mix needs PyAV to write its clips: pip install av. Or use --mix story") from error
    import numpy as np

    width, height = CLIPS[scale]
    frames = seconds * FRAMES_A_SECOND
    step = max(1, width // 40)
    wide = np.asarray(scenery(width + step * frames, height, seed=(seed, seconds, k)))
    with av.open(str(path), "w") as clip:
        stream: Any = clip.add_stream("libx264", rate=FRAMES_A_SECOND)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            view = np.ascontiguousarray(wide[:, i * step : i * step + width])
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        clip.mux(stream.encode())
