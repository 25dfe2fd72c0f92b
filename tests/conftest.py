"""Fixtures shared by the tests: tiny bases, real photographs and a short clip on disk. Nothing needs a network."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest

# Helpers with assertions of their own: as good messages as in a test.
pytest.register_assert_rewrite("runs", "models", "adapters", "kit_rows", "stock_rows", "served")

# Tests, and the processes they start, keep costs of rows in a folder of their own, never in the user's.
_CACHE = tempfile.TemporaryDirectory(prefix="vlft-cache-")
os.environ["VLFT_COST_CACHE"] = _CACHE.name


#: A machine that only runs the GPU tests may lack one of these. Rows with videos then are not there, and tests that ask
#: for one are skipped.
HAS_PYAV = importlib.util.find_spec("av") is not None
HAS_VIDEOS = HAS_PYAV and importlib.util.find_spec("qwen_vl_utils") is not None


GRID = Path(__file__).with_name("grid.txt")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Mark the cases of grid.txt, and refuse a line there that names no test."""
    wanted = {line for line in GRID.read_text(encoding="utf-8").splitlines() if not line.startswith("#")}
    names = {item: item.nodeid.removeprefix("tests/") for item in items}
    for item, name in names.items():
        if name in wanted:
            item.add_marker(pytest.mark.grid)
    if len(config.args) == 1 and config.args[0] == "tests" and (lost := sorted(wanted - set(names.values()))):
        raise pytest.UsageError(f"{GRID.name}: no such test: {', '.join(lost)}")


class Rows(dict):
    """Rows by id."""

    def __missing__(self, name):
        if not HAS_VIDEOS:
            pytest.skip(f"row {name} has a video, which needs av and qwen-vl-utils")
        raise KeyError(name)


@pytest.fixture(scope="session")
def base_family():
    """The family of `base` and of all that is made of it; a module of tests may have another."""
    from build import FAMILY

    return FAMILY


@pytest.fixture(scope="session")
def base(tmp_path_factory, base_family) -> Path:
    """A tiny model of the family, float32, tied head."""
    from vlft.demo.tiny import build_tiny

    return build_tiny(tmp_path_factory.mktemp("base"), base_family)


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """A function: family -> its tiny base, float32. Each is built once per session."""
    from vlft.demo.tiny import build_tiny

    built: dict[str, Path] = {}

    def of(family) -> Path:
        if family.model_type not in built:
            built[family.model_type] = build_tiny(tmp_path_factory.mktemp(family.model_type), family)
        return built[family.model_type]

    return of


@pytest.fixture(scope="session")
def stock_of(base_of):
    """A function: model type -> its tiny base, opened by transformers alone."""
    import functools

    from stock_rows import opened

    from vlft.families import FAMILIES

    return functools.cache(lambda model_type: opened(base_of(FAMILIES[model_type]), FAMILIES[model_type]))


@pytest.fixture(scope="session")
def media(tmp_path_factory) -> Path:
    """A folder of real photographs (china, flower, astronaut, coffee: .jpg) and, with PyAV, a 3-second clip.mp4."""
    import numpy as np
    from PIL import Image
    from skimage import data
    from sklearn.datasets import load_sample_images

    folder = tmp_path_factory.mktemp("media")
    photos = dict(zip(("china", "flower"), load_sample_images().images, strict=True))
    photos |= {"astronaut": data.astronaut(), "coffee": data.coffee()}
    for name, pixels in photos.items():
        Image.fromarray(pixels).resize((224, 168)).save(folder / f"{name}.jpg")
    if not HAS_PYAV:
        return folder
    import av

    frame = np.asarray(Image.fromarray(photos["coffee"]).resize((160, 112)))
    with av.open(str(folder / "clip.mp4"), "w") as clip:
        stream = clip.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 160, 112, "yuv420p"
        for i in range(24):
            shown = av.VideoFrame.from_ndarray(np.roll(frame, 5 * i, axis=1), format="rgb24")
            clip.mux(stream.encode(shown))
        clip.mux(stream.encode())
    return folder


@pytest.fixture(scope="session")
def quick_demo(tmp_path_factory) -> tuple[Path, str]:
    """The folder of a `vlft demo --quick`, and what it printed."""
    from vlft.cli.main import main

    out = tmp_path_factory.mktemp("demo") / "demo-out"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["demo", "--quick", "--out", str(out)]) == 0
    return out, printed.getvalue()


@pytest.fixture
def train(base, mixed_json, media, tmp_path):
    """Run `vlft train` in this process; returns the run folder."""
    from runs import arguments

    from vlft.cli.main import main

    def run(*more: str, name: str = "run", base: Path = base) -> Path:
        out = tmp_path / name
        assert main(arguments(base, mixed_json, media, out, *more)) == 0
        return out

    return run


def row(answer: str, question: str, **media: object) -> dict:
    """One LLaVA row with one question and one answer."""
    return {
        **media,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


#: Seven rows (an odd number) of every kind the loader knows, over the `media` folder.
MIXED_ROWS = [
    row("A temple in China.", "<image>\nWhat is it?", id="still", image="china.jpg"),
    {
        "id": "two-turns",
        "image": ["flower.jpg", "astronaut.jpg"],
        "conversations": [
            {"from": "human", "value": "<image><image>\nCompare the two."},
            {"from": "gpt", "value": "A flower and an astronaut."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    row("It slides.", "<video>\nWhat happens?", id="clip", video="clip.mp4"),
    {
        "id": "text",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "2+2?"},
            {"from": "gpt", "value": "4"},
        ],
    },
    row("The coffee.", "<image>\nand <video>: which is hot?", id="both", image="coffee.jpg", video="clip.mp4"),
    row("An astronaut.", "<video>\nWho?", id="frames", video=[["astronaut.jpg"] * 3]),
    row("Five.", "How many fingers?", id="text-2"),
]


@pytest.fixture(scope="session")
def mixed_json(tmp_path_factory, media) -> Path:
    """`MIXED_ROWS` as a data file that lies in the media folder's neighbour."""
    import json

    path = tmp_path_factory.mktemp("data") / "mixed.json"
    rows = [one for one in MIXED_ROWS if HAS_VIDEOS or "video" not in one]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def encoder(base, base_family):
    """The encoder of the tiny base at its own settings."""
    from vlft.config.recipe import Recipe
    from vlft.config.row_flags import RowFlags
    from vlft.data.encode import Encoder
    from vlft.model.load import load_processor

    processor = load_processor(base)
    recipe = Recipe.of(processor, RowFlags(max_length=32768))
    return Encoder(family=base_family, processor=processor, recipe=recipe)


@pytest.fixture(scope="session")
def samples(mixed_json, media, base_family):
    """`MIXED_ROWS`, parsed, by id."""
    from vlft.data.files.index import index_rows, parsed

    rows = parsed(index_rows([str(mixed_json)], image_folder=str(media), family=base_family))
    return Rows({sample.id: sample for sample in rows.samples})


@pytest.fixture(scope="session")
def encoded(samples, encoder):
    """`MIXED_ROWS`, encoded, by id."""
    return Rows({name: encoder.encode(sample) for name, sample in samples.items()})
