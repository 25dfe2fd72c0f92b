"""A base that is opened without transformers is the one that transformers opens, and light verbs import no torch."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from build import picture
from packaging.version import Version
from published import rewrite_as_published

from vlft.checkpoint import open_plain, open_processor
from vlft.checkpoint.door import check_base
from vlft.config.recipe import Recipe
from vlft.config.row_flags import RowFlags
from vlft.data.media.sizes import frame_count, frame_range, frame_size, still_size
from vlft.demo.tiny import build_tiny
from vlft.families import DEFAULT, FAMILIES
from vlft.model.load import load_config

TEXTS = (
    "Don't panic: 42% of Zürich's 北京 \u0301e\u0301 naïve 🙂!\n\n\tOk?  <|im_end|><|image_pad|>x",
    "", " ", "\n", "a  b\r\n\r\n c", "<|vision_start|><|image_pad|><|vision_end|>", "é vs e\u0301", "١٢٣ 12345",
    "नमस्ते दुनिया, สวัสดีชาวโลก",
)  # fmt: skip
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": 'What "is" <this>?'}]},
    {"role": "assistant", "content": "A cup & a saucer."},
]


def changed(folder: Path, out: Path, name: str, **values) -> Path:
    """A copy of a model folder with other values in one of its files; None removes a key."""
    made = Path(shutil.copytree(folder, out))
    found = json.loads((made / name).read_text(encoding="utf-8")) | values
    kept = {key: value for key, value in found.items() if value is not None}
    (made / name).write_text(json.dumps(kept), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def as_published(base, tmp_path_factory) -> Path:
    return rewrite_as_published(base, tmp_path_factory.mktemp("published") / "model")


@pytest.fixture(scope="module")
def folders(base, as_published, tmp_path_factory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("forms")
    pictures = {"min_pixels": None, "max_pixels": None, "size": {"shortest_edge": 784, "longest_edge": 50_176}}
    videos = {"size": {"shortest_edge": 784, "longest_edge": 100_352}, "video_processor_type": "Qwen2VLVideoProcessor"}
    split = changed(as_published, out / "split", "preprocessor_config.json", **pictures)
    found = json.loads((split / "preprocessor_config.json").read_text()) | videos | {"fps": 1.0, "max_frames": 16}
    found.pop("image_processor_type")
    (split / "video_preprocessor_config.json").write_text(json.dumps(found))
    bare = changed(as_published, out / "bare", "preprocessor_config.json", min_pixels=None, max_pixels=None)
    return {
        "transformers 5": base,
        "published": as_published,
        "published, with a file for videos": split,
        "published, without pixel limits": bare,
    }


FORMS = ("transformers 5", "published", "published, with a file for videos", "published, without pixel limits")


@pytest.mark.parametrize("form", FORMS)
def test_it_is_what_transformers_opens(folders, form):
    if form == FORMS[-1] and Version(version("transformers")) < Version("5.23"):
        pytest.skip("5.17 writes the limits of one processor into the class, so a later one has them")
    assert_same_plainly(folders[form])


def with_files_of_their_own(folder: Path, out: Path, family) -> Path:
    """The processors in the two files of the hub's Qwen3-VL and Qwen3.5, and the tokenizer class that they name."""
    made = changed(folder, out, "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    whole = json.loads((made / "processor_config.json").read_text())
    (made / "processor_config.json").unlink()
    keys = ("size", "patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
    for part, file in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")):
        found = {key: whole[f"{part}_processor"][key] for key in keys}
        name = whole[f"{part}_processor"][f"{part}_processor_type"]
        found |= {f"{part}_processor_type": f"{name}Fast" if part == "image" else name}
        (made / file).write_text(json.dumps(found | {"processor_class": family.processor_class}))
    return made


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_later_families_are_what_transformers_opens(base_of, model_type, tmp_path):
    family = FAMILIES[model_type]
    assert_same_plainly(base_of(family))
    assert_same_plainly(with_files_of_their_own(base_of(family), tmp_path / "hub", family))


def assert_same_plainly(folder: Path) -> None:
    family = check_base(folder)
    found = open_plain(folder, family)
    assert found is not None
    config, plain = found
    stock_config, stock = load_config(folder)[0], open_processor(folder)
    assert family.sizes(config) == family.sizes(stock_config)
    for name in family.config_tokens:
        assert getattr(config, name) == getattr(stock_config, name)
    assert len(plain.tokenizer) == len(stock.tokenizer)
    ids = plain.tokenizer(list(TEXTS), add_special_tokens=False).input_ids
    assert ids == stock.tokenizer(list(TEXTS), add_special_tokens=False).input_ids
    spans = {"add_special_tokens": False, "return_offsets_mapping": True}
    assert plain.tokenizer(TEXTS[0], **spans).offset_mapping == stock.tokenizer(TEXTS[0], **spans).offset_mapping
    whole = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
    assert [plain.tokenizer.decode(one, **whole) for one in ids] == [
        stock.tokenizer.decode(one, **whole) for one in ids
    ]
    template = stock.chat_template or stock.tokenizer.chat_template
    assert (plain.chat_template or plain.tokenizer.chat_template) == template
    for prompted in (False, True):
        chat = {"chat_template": template, "tokenize": False, "add_generation_prompt": prompted}
        theirs = stock.tokenizer.apply_chat_template([CHAT, CHAT[1:]], **chat)
        assert plain.tokenizer.apply_chat_template([CHAT, CHAT[1:]], **chat) == theirs
    for flags in (RowFlags(), RowFlags(image_max_pixels=32 * 32 * 9, nframes=4), RowFlags(fps=0.5)):
        of_model = {"family": family, "tokens_per_second": family.sizes(config).vision.tokens_per_second}
        assert Recipe.of(plain, flags, **of_model) == Recipe.of(stock, flags, **of_model)
    names = ("image_mean", "image_std", "do_rescale", "rescale_factor", "do_normalize")
    for part in ("image_processor", "video_processor"):
        ours, theirs = getattr(plain, part), getattr(stock, part)
        assert all(getattr(ours, name) == getattr(theirs, name) for name in names[2:])
        assert all(list(getattr(ours, name)) == list(getattr(theirs, name)) for name in names[:2])


def test_random_text_has_the_same_tokens(base):
    plain, stock = open_plain(base, DEFAULT)[1].tokenizer, open_processor(base).tokenizer
    draw = random.Random(0)
    letters = [*"ab Z'.,\n\t0159é", "北", "🙂", "\u0301", "\u00a0", "<|im_start|>", "<|video_pad|>"]
    texts = ["".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(500)]
    assert plain(texts, add_special_tokens=False).input_ids == stock(texts, add_special_tokens=False).input_ids


ODD = {
    "another tokenizer class": ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
    "a space before words": ("tokenizer_config.json", {"add_prefix_space": True}),
    "a token that tokenizer.json lacks": ("tokenizer_config.json", {"extra_special_tokens": ["<new>"]}),
    "no padding token": ("tokenizer_config.json", {"pad_token": None}),
    "another normalizer": ("tokenizer.json", {"normalizer": {"type": "NFKC"}}),
    "another splitter": ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}),
    "a size that is left out": ("config.json", {"tie_word_embeddings": None}),
    "a size as text": ("config.json", {"vision_config": {"depth": "2"}}),
    "an unknown setting of generation": ("generation_config.json", {"max_new_tokens": 3}),
    "another picture processor": ("processor_config.json", {"image_processor": {"image_processor_type": "Own"}}),
}


@pytest.mark.parametrize("name", ODD)
def test_what_only_transformers_can_read_is_left_to_it(name, base, tmp_path):
    file, values = ODD[name]
    assert open_plain(changed(base, tmp_path / "odd", file, **values), DEFAULT) is None


def test_a_template_of_another_kind_is_left_to_transformers(base, tmp_path):
    made = Path(shutil.copytree(base, tmp_path / "odd"))
    template = made / "chat_template.jinja"
    marked = template.read_text().replace("{% for", "{% generation %}{% endgeneration %}{% for", 1)
    template.write_text(marked)
    assert open_plain(made, DEFAULT) is None


# ---- sizes


def test_sizes_of_pictures_and_frames_are_those_of_the_stock_path():
    from qwen_vl_utils import vision_process
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    draw = random.Random(1)
    for _ in range(20_000):
        height, width = (int(2 ** draw.uniform(0, 13)) for _ in range(2))
        if max(height, width) / min(height, width) > 200:
            continue
        low = draw.randint(1, 2_000_000)
        high = low + draw.randint(0, 13_000_000)
        limits = {"min_pixels": low, "max_pixels": high}
        sized = {"factor": draw.choice((28, 32, 56)), "low": low, "high": high}
        assert still_size(height, width, **sized) == smart_resize(height, width, factor=sized["factor"], **limits)
        theirs = vision_process.smart_resize(height, width, sized["factor"], **limits)
        assert frame_size(height, width, **sized) == theirs


def test_frames_are_counted_as_qwen_vl_utils_counts_them():
    from qwen_vl_utils import vision_process

    draw = random.Random(2)
    for _ in range(20_000):
        frames, rate = draw.randint(2, 5000), draw.choice((1.0, 8.0, 23.976, 25.0, 29.97, 60.0, draw.uniform(0.1, 240)))
        fps, most = draw.choice((0.5, 1.0, 2.0, draw.uniform(0.01, 30))), 2 * draw.randint(1, 400)
        asked = {"fps": fps, "max_frames": most}
        theirs = vision_process.smart_nframes(asked, total_frames=frames, video_fps=rate)
        assert frame_count(frames, rate, fps=fps, most=most) == theirs
        start, end = (draw.choice((None, draw.uniform(0, 1.2 * frames / rate))) for _ in range(2))
        try:
            span = {"video_start": start, "video_end": end}
            first, last, _ = vision_process.calculate_video_frame_range(span, frames, rate)
        except ValueError:
            assert frame_range(start, end, frames=frames, rate=rate) is None
        else:
            assert frame_range(start, end, frames=frames, rate=rate) == (first, last)


# ---- imports

LIGHT = """
import sys
from vlft.cli.main import main
base, data, out, *others = sys.argv[1:]
rows, model = ["--image_folder", out], ["--model_id", base]
for wanted, argv in (
    (0, ["preview", data, *rows, *model]),
    (0, ["preview", data, *rows, *model, "--json"]),
    (0, ["preview", data, *rows]),
    (1, ["preview", data, *rows, *model, "--index", "1"]),
    (1, ["check-data", data, *rows, "--headers_only"]),
    (1, ["check-data", data, *rows, *model, "--headers_only", "--json"]),
    (1, ["check-data", data, *rows]),
    (1, ["check-data", data, *rows, *model, "--fix", out + "/clean.jsonl"]),
    (0, ["plan", "--data_path", data, *rows, *model, "--on_bad_row", "skip"]),
    (2, ["train", "--config", out + "/wrong.yaml"]),
    (2, ["plan", "--fps", "fast"]),
    (1, ["train", *model, "--data_path", "gone.json", "--output_dir", out]),
    (1, ["train", *model, "--data_path", data, "--output_dir", base]),
    (1, ["train", "--model_id", out, "--data_path", data]),
    (1, ["merge", out + "/gone", out + "/merged"]),
    (1, ["chat", out + "/gone", "Hi."]),
    (1, ["report", out + "/gone"]),
    *((0, ["preview", data, *rows, "--model_id", other]) for other in others),
    *((1, ["check-data", data, *rows, "--model_id", other, "--headers_only"]) for other in others),
    *((0, ["plan", "--data_path", data, *rows, "--model_id", other, "--on_bad_row", "skip"]) for other in others),
):
    status = main(argv)
    heavy = [name for name in ("torch", "transformers", "peft", "pandas", "sklearn") if name in sys.modules]
    assert status == wanted, (argv, status)
    assert not heavy, (argv, heavy)
"""


def test_verbs_without_pixels_and_wrong_commands_import_no_torch(base, base_of, tmp_path):
    """In a fresh process, with a base and without one, for rows that are taken and refused, and for wrong commands."""
    others = [str(base_of(family)) for family in FAMILIES.values() if family is not DEFAULT]
    picture(90, 60).save(tmp_path / "a.jpg")
    turns = [{"from": "human", "value": "<image>Q?"}, {"from": "gpt", "value": "A."}]
    rows = [{"image": "a.jpg", "conversations": turns}, {"image": "gone.jpg", "conversations": turns}]
    (tmp_path / "rows.json").write_text(json.dumps(rows * 10), encoding="utf-8")
    (tmp_path / "wrong.yaml").write_text("fps: fast\nlr: 1e-4\n", encoding="utf-8")
    argv = [sys.executable, "-c", LIGHT, str(base), str(tmp_path / "rows.json"), str(tmp_path), *others]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_tiny_base_is_read_plainly(tmp_path):
    assert open_plain(build_tiny(tmp_path / "base"), DEFAULT) is not None
