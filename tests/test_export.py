"""`vlft export`: other trainers read the same tokens, pictures and pixel limits from the file as vlft trains."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from build import row, write_image, write_json, write_video
from PIL import Image
from transformers import AutoProcessor

from vlft.cli.main import main
from vlft.config.flags import DataFlags, ModelFlags
from vlft.preview import preview_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows with no, one and two pictures, some of which other readers would decode differently."""
    folder = tmp_path_factory.mktemp("export")
    write_image(folder / "a.jpg", 300, 200)
    write_image(folder / "b.png", 90, 140)
    turned = Image.Exif()
    turned[0x0112] = 6
    write_image(folder / "turned.jpg", 240, 120, exif=turned)
    Image.fromarray(np.arange(60 * 90, dtype=np.uint16).reshape(60, 90) * 12).save(folder / "deep.png")
    rows = [
        row("<image>\nWhat is this?", "A roof.", image="a.jpg", id="one"),
        row("Compare <image> with <image>.", "The first is larger.", image=["a.jpg", "b.png"]),
        row("Hi.", "Hello there."),
        row("<image>Which way is up?", "To the right.", image="turned.jpg"),
        row("<image>How deep?", "Sixteen bits.", image="deep.png"),
    ]
    rows[2]["conversations"] += [{"from": "human", "value": "And now?"}, {"from": "gpt", "value": "Goodbye."}]
    return write_json(folder / "rows.json", rows)


@pytest.fixture(scope="module")
def exported(data, base, tmp_path_factory):
    """Export once per kind and choice of flags: kind -> (rows of the file, the document of --json)."""
    done: dict = {}

    def export(kind: str, *flags: str, source=None):
        key = kind, flags, source
        if key not in done:
            out = tmp_path_factory.mktemp("out") / "exported"
            argv = ["export", kind, str(source or data), str(out), "--model_id", str(base), *flags]
            assert main(argv) == 0
            document = json.loads((out / "export.json").read_text())
            done[key] = parquet.read_table(out / "data.parquet").to_pylist(), document
        return done[key]

    return export


def previews(data, base, count: int):
    found = preview_rows(
        str(data), range(count), DataFlags(), ModelFlags(model_id=str(base)), given=frozenset({"model_id"})
    )
    return [one.as_json() for one in found]


def pictures(one: dict) -> list[Image.Image]:
    return [Image.open(io.BytesIO(picture["bytes"])) for picture in one["images"]]


def as_messages(turns: list[dict]) -> list[dict]:
    """Without the empty keys that parquet gives to each part."""
    parts = [[{k: v for k, v in part.items() if v is not None} for part in turn["content"]] for turn in turns]
    return [{"role": turn["role"], "content": content} for turn, content in zip(turns, parts, strict=True)]


def test_trl_rows_give_the_stock_processor_what_vlft_trains(exported, data, base):
    rows, document = exported("trl")
    processor = AutoProcessor.from_pretrained(base)
    assert [one["index"] for one in rows] == [0, 1, 2, 3, 4]
    for one, want in zip(rows, previews(data, base, 5), strict=True):
        text = processor.apply_chat_template(as_messages(one["prompt"] + one["completion"]), tokenize=False)
        made = processor(text=[text], images=pictures(one) or None, return_tensors="pt")
        assert made["input_ids"][0].tolist() == want["input_ids"]
        assert (made["image_grid_thw"].tolist() if one["images"] else []) == want["image_grid_thw"]
        assert one["answer"] == one["completion"][0]["content"][0]["text"]
    assert document["rows"] == document["read"] == 5
    assert document["pictures"] == 5


def test_lengths_are_those_of_training(exported, data, base):
    _, document = exported("verl")
    longest = {"prompt": 0, "answer": 0}
    for one in previews(data, base, 5):
        labels = one["labels"]
        last = max(place for place, label in enumerate(labels) if label != -100)
        start = last
        while labels[start - 1] != -100:
            start -= 1
        longest = {"prompt": max(longest["prompt"], start), "answer": max(longest["answer"], last + 1 - start)}
    assert (document["max_prompt_length"], document["max_response_length"]) == tuple(longest.values())


def test_verl_rows_have_the_columns_of_its_reader(exported):
    rows, _ = exported("verl", "--image_max_pixels", "50176")
    assert set(rows[0]) == {"data_source", "prompt", "images", "ability", "reward_model", "extra_info"}
    assert rows[1]["prompt"] == [{"role": "user", "content": "Compare <image> with <image>."}]
    assert rows[1]["reward_model"] == {"style": "rule", "ground_truth": "The first is larger."}
    assert [turn["role"] for turn in rows[2]["prompt"]] == ["user", "assistant", "user"]
    assert rows[2]["reward_model"]["ground_truth"] == "Goodbye."
    for one in rows:  # verl splits the text at these tags, and takes one picture for each
        assert sum(turn["content"].count("<image>") for turn in one["prompt"]) == len(one["images"])
        assert all(picture["max_pixels"] == 50176 for picture in one["images"])


def test_verl_resizes_as_trained(exported, data, base):
    """verl hands each entry of `images` to qwen-vl-utils' `fetch_image`, after it opened the bytes."""
    fetch_image = pytest.importorskip("qwen_vl_utils").fetch_image
    rows, _ = exported("verl", "--image_max_pixels", "30000")
    flags = DataFlags(image_max_pixels=30000)
    want = preview_rows(str(data), range(5), flags, ModelFlags(model_id=str(base)), given=frozenset({"model_id"}))
    for one, trained in zip(rows, want, strict=True):
        limits = [{k: picture[k] for k in ("min_pixels", "max_pixels")} for picture in one["images"]]
        sizes = [
            fetch_image({"image": picture, **limit}).size for picture, limit in zip(pictures(one), limits, strict=True)
        ]
        assert [[1, h // 14, w // 14] for w, h in sizes] == trained.as_json()["image_grid_thw"]


@pytest.mark.parametrize("how", ["original", "resized"])
def test_pictures_are_what_vlft_decodes(exported, data, base, how):
    from vlft.preview.page import frames_of

    rows, _ = exported("trl", "--pictures", how)
    found = preview_rows(
        str(data), range(5), DataFlags(), ModelFlags(model_id=str(base)), given=frozenset({"model_id"})
    )
    processor = AutoProcessor.from_pretrained(base)
    for one, trained in zip(rows, found, strict=True):
        for picture, medium in zip(pictures(one), trained.media, strict=True):
            want = frames_of(medium.encoded, merge=2)[0]
            if how == "resized":
                assert torch.equal(torch.from_numpy(np.array(picture)), want)
            made = processor.image_processor(images=[picture.convert("RGB")], return_tensors="pt")
            grid = medium.encoded.grid
            assert made["image_grid_thw"].tolist() == [[grid.t, grid.h, grid.w]]


def test_calibration_takes_whole_conversations(exported):
    rows, document = exported("calibration", "--rows", "3")
    assert document["rows"] == 3
    assert len({one["index"] for one in rows}) == 3
    for one in rows:
        parts = [part["type"] for turn in one["messages"] for part in turn["content"]]
        assert parts.count("image") == len(one["images"])
        assert one["messages"][-1]["role"] == "assistant"


def test_the_ignored_modules_are_the_vision_tower_and_the_head(base):
    """llm-compressor 0.14 matches `re:` patterns from the start of a module's name."""
    import re

    from transformers import AutoModelForImageTextToText

    from vlft.convert.export import IGNORE

    model = AutoModelForImageTextToText.from_pretrained(base)
    linears = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    kept = {name for name in linears if any(re.match(one.removeprefix("re:"), name) for one in IGNORE)}
    assert kept == {name for name in linears if "visual" in name or "lm_head" in name}
    assert not {name for name in linears if re.match("visual.*", name)}  # what the examples of others write


def test_pairs(exported, data, tmp_path):
    write_image(tmp_path / "a.jpg", 120, 90)
    pair = {**row("<image>What?", "A roof.", image="a.jpg"), "rejected_response": "A cat on a roof."}
    source = write_json(tmp_path / "pairs.json", [pair])
    rows, document = exported("trl", "--method", "dpo", source=source)
    assert rows[0]["chosen"][0]["content"] == [{"type": "text", "text": "A roof."}]
    assert rows[0]["rejected"][0]["content"] == [{"type": "text", "text": "A cat on a roof."}]
    assert "completion" not in rows[0]
    assert document["rows"] == 1


# ---- bad input


def test_videos_are_refused_by_name_or_skipped(data, base, tmp_path, capsys):
    write_video(tmp_path / "clip.mp4")
    source = write_json(
        tmp_path / "rows.json", [row("<video>What?", "A walk.", video="clip.mp4", id="v"), row("Hi.", "Hello.")]
    )
    argv = ["export", "verl", str(source), str(tmp_path / "out"), "--model_id", str(base)]
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert "rows.json[0].video (id v): an export for verl holds pictures" in error
    assert "--on_bad_row skip" in error
    assert not (tmp_path / "out").exists()
    assert main([*argv, "--on_bad_row", "skip", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["read"], document["rows"], len(document["skipped"])) == (2, 1, 1)


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["export"], 2, "export"),
        (["export", "jsonl", "DATA", "OUT"], 2, "verl, trl or calibration, not jsonl"),
        (["export", "trl", "DATA"], 2, "no data file"),
        (["export", "trl", "nothing.json", "OUT", "--model_id", "BASE"], 1, "nothing.json"),
        (["export", "trl", "DATA", "OUT"], 1, "--model_id is missing"),
        (["export", "trl", "DATA", "OUT", "--model_id", "BASE", "--rows", "0"], 2, "--rows"),
    ],
)
def test_wrong_commands(data, base, tmp_path, capsys, words, status, told):
    named = {"DATA": str(data), "OUT": str(tmp_path / "out"), "BASE": str(base)}
    assert main([named.get(word, word) for word in words]) == status
    assert told in capsys.readouterr().err


def test_a_folder_in_use_is_refused(data, base, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert main(["export", "trl", str(data), str(tmp_path), "--model_id", str(base)]) == 1
    assert "not empty" in capsys.readouterr().err


# ---- the readers themselves, where they are installed


def test_datasets_reads_pictures(data, base, tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    out = tmp_path / "out"
    assert main(["export", "trl", str(data), str(out), "--model_id", str(base)]) == 0
    found = datasets.load_dataset(
        "parquet", data_files=str(out / "data.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [picture.size for picture in found[1]["images"]] == [(300, 200), (90, 140)]
    assert found[2]["images"] == []


@pytest.mark.parametrize("trainer", ["sft", "dpo", "grpo"])
def test_trl_trains_a_step(data, base, tmp_path, trainer):
    pytest.importorskip("trl", reason="pip install trl==1.16.0")
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    import trl
    from transformers import AutoModelForImageTextToText

    source, flags = data, []
    if trainer == "dpo":
        write_image(tmp_path / "a.jpg", 120, 90)
        pair = {**row("<image>What?", "A roof.", image="a.jpg"), "rejected_response": "A cat on a roof."}
        source, flags = write_json(tmp_path / "pairs.json", [pair, pair]), ["--method", "dpo"]
    out = tmp_path / "out"
    assert main(["export", "trl", str(source), str(out), "--model_id", str(base), *flags]) == 0
    rows = datasets.load_dataset(
        "parquet", data_files=str(out / "data.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    if trainer != "dpo":
        rows = rows.filter(lambda one: len(one["images"]) > 0)
    settings = {"output_dir": str(tmp_path / "run"), "max_steps": 1, "per_device_train_batch_size": 2, "report_to": []}
    settings |= {"use_cpu": True, "bf16": False, "save_strategy": "no", "logging_steps": 1}
    settings |= {"num_generations": 2, "max_completion_length": 4} if trainer == "grpo" else {"max_length": None}
    name = trainer.upper()
    more = {"reward_funcs": lambda completions, answer, **_: [float(len(one)) for one in answer]}
    made = getattr(trl, f"{name}Trainer")(
        model=AutoModelForImageTextToText.from_pretrained(base),
        args=getattr(trl, f"{name}Config")(**settings),
        train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(base),
        **(more if trainer == "grpo" else {}),
    )
    assert np.isfinite(made.train().training_loss)
