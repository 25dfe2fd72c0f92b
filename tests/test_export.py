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
    """Rows with no, one and two pictures. Other readers would decode some of them differently."""
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
    assert [one["index"] for one in rows] == [0, 1, 2, 2, 3, 4]  # row 2 has two answers, each is a sample
    assert (rows[2]["answer"], rows[3]["answer"]) == ("Hello there.", "Goodbye.")
    assert "chat_template_kwargs" not in rows[0]  # this template takes none
    for one, want in zip([*rows[:2], *rows[3:]], previews(data, base, 5), strict=True):
        text = processor.apply_chat_template(as_messages(one["prompt"] + one["completion"]), tokenize=False)
        made = processor(text=[text], images=pictures(one) or None, return_tensors="pt")
        assert made["input_ids"][0].tolist() == want["input_ids"]
        assert (made["image_grid_thw"].tolist() if one["images"] else []) == want["image_grid_thw"]
        assert one["answer"] == one["completion"][0]["content"][0]["text"]
    assert document["rows"] == document["read"] == 5
    assert document["samples"] == 6
    assert document["pictures"] == 5


def test_lengths_are_those_of_training(exported, data, base):
    _, document = exported("verl")
    longest = {"prompt": 0, "answer": 0}
    for one in previews(data, base, 5):
        labels = one["labels"]
        for start, label in enumerate(labels):
            if label != -100 and labels[start - 1] == -100:
                end = next((place for place in range(start, len(labels)) if labels[place] == -100), len(labels))
                longest = {"prompt": max(longest["prompt"], start), "answer": max(longest["answer"], end - start)}
    assert (document["max_prompt_length"], document["max_response_length"]) == tuple(longest.values())


def test_verl_rows_have_the_columns_of_its_reader(exported):
    rows, _ = exported("verl", "--image_max_pixels", "50176")
    assert set(rows[0]) == {"data_source", "prompt", "images", "ability", "reward_model", "extra_info"}
    assert rows[1]["prompt"] == [{"role": "user", "content": "Compare <image> with <image>."}]
    assert rows[1]["reward_model"] == {"style": "rule", "ground_truth": "The first is larger."}
    assert [turn["role"] for turn in rows[3]["prompt"]] == ["user", "assistant", "user"]
    assert rows[3]["reward_model"]["ground_truth"] == "Goodbye."
    for one in rows:  # verl splits the text at these tags, and takes one picture for each
        assert sum(turn["content"].count("<image>") for turn in one["prompt"]) == len(one["images"])
        assert all(picture["max_pixels"] == 50176 for picture in one["images"])


def test_verl_resizes_as_trained(exported, data, base):
    """verl hands each entry of `images` to qwen-vl-utils' `fetch_image`, after it opened the bytes."""
    fetch_image = pytest.importorskip("qwen_vl_utils").fetch_image
    rows, _ = exported("verl", "--image_max_pixels", "30000")
    flags = DataFlags(image_max_pixels=30000)
    want = preview_rows(str(data), range(5), flags, ModelFlags(model_id=str(base)), given=frozenset({"model_id"}))
    for one, trained in zip([*rows[:2], *rows[3:]], want, strict=True):
        limits = [{k: picture[k] for k in ("min_pixels", "max_pixels")} for picture in one["images"]]
        sizes = [
            fetch_image({"image": picture, **limit}).size for picture, limit in zip(pictures(one), limits, strict=True)
        ]
        assert [[1, h // 14, w // 14] for w, h in sizes] == trained.as_json()["image_grid_thw"]


@pytest.mark.parametrize("how", ["original", "resized"])
def test_pictures_are_what_vlft_decodes(exported, data, base, how):
    rows, _ = exported("trl", "--pictures", how)
    found = preview_rows(
        str(data), range(5), DataFlags(), ModelFlags(model_id=str(base)), given=frozenset({"model_id"})
    )
    processor = AutoProcessor.from_pretrained(base)
    for one, trained in zip([*rows[:2], *rows[3:]], found, strict=True):
        for picture, medium in zip(pictures(one), trained.media, strict=True):
            want = medium.encoded.pixels[0]
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

    from vlft.convert.exported import IGNORE

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


def test_verl_takes_no_pairs_and_calibration_the_chosen_answer(base, tmp_path, capsys):
    source = write_json(tmp_path / "pairs.json", [{**row("What?", "A roof."), "rejected_response": "A cat."}])
    flags = [str(source), str(tmp_path / "out"), "--model_id", str(base), "--method", "dpo"]
    assert main(["export", "verl", *flags]) == 1
    assert "verl's rows have one answer, not pairs" in capsys.readouterr().err
    assert main(["export", "calibration", *flags]) == 0
    assert "note: of preference rows, the chosen answer was written" in capsys.readouterr().out
    (one,) = parquet.read_table(tmp_path / "out" / "data.parquet").to_pylist()
    assert one["messages"][-1]["content"][0]["text"] == "A roof."


def test_keys_that_are_not_read_are_named(base, tmp_path, capsys):
    odd = [{**row(f"What {i}?", "A roof."), "rejected_response": "A cat."} for i in range(3)]
    source = write_json(tmp_path / "pairs.json", [row("Who?", "I."), *odd])
    assert main(["export", "trl", str(source), str(tmp_path / "out"), "--model_id", str(base), "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith(f"3 rows: {source}[1].rejected_response is not read")


def test_rows_held_out_are_not_exported(base, tmp_path, capsys):
    rows = [row(f"Question {place}?", f"Answer {place}.") for place in range(10)]
    source = write_json(tmp_path / "rows.json", rows)
    flags = ["--model_id", str(base), "--eval_split", "3", "--seed", "7"]
    assert main(["export", "trl", str(source), str(tmp_path / "out"), *flags, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["read"], document["rows"], document["held_out"]) == (7, 7, 3)
    assert "3 rows of --eval_split 3 held out" in document["notes"][0]
    from vlft.setup import open_base, rows_of_run

    data = DataFlags(data_path=[str(source)], eval_split=3)
    opened = open_base(data, ModelFlags(model_id=str(base)), given=frozenset({"model_id"}), plain=True)
    kept, _ = rows_of_run(data, opened, workers=1, seed=7)
    written = parquet.read_table(tmp_path / "out" / "data.parquet").to_pylist()
    assert [one["index"] for one in written] == [one.index for one in kept.rows.samples]


@pytest.fixture
def budget(tmp_path):
    """A row whose picture has fewer pixels than the limits of the run allow."""
    write_image(tmp_path / "a.jpg", 300, 200)
    one = {**row("<image>\nWhat?", "A roof.", image="a.jpg"), "max_pixels": 12544}
    return write_json(tmp_path / "rows.json", [one])


@pytest.mark.parametrize("kind", ["trl", "calibration", "verl"])
def test_a_row_keeps_its_own_limits(base, budget, tmp_path, capsys, kind):
    assert main(["export", kind, str(budget), str(tmp_path / "out"), "--model_id", str(base)]) == 0
    (one,) = parquet.read_table(tmp_path / "out" / "data.parquet").to_pylist()
    told = "note: 1 picture with limits of their row" in capsys.readouterr().out
    if kind == "verl":
        assert one["images"][0]["max_pixels"] == 12544
        assert not told
        return
    assert told
    (want,) = previews(budget, base, 1)
    made = AutoProcessor.from_pretrained(base).image_processor(images=pictures(one), return_tensors="pt")
    assert made["image_grid_thw"].tolist() == want["image_grid_thw"]


def test_limits_that_the_other_trainer_would_undo_are_refused(base, budget, tmp_path, capsys):
    argv = ["export", "trl", str(budget), str(tmp_path / "out"), "--model_id", str(base)]
    assert main([*argv, "--image_min_pixels", "50176", "--image_max_pixels", "100352"]) == 1
    capsys.readouterr()
    rows = json.loads(budget.read_text())
    rows[0] |= {"min_pixels": 3136}
    write_json(budget, rows)
    assert main([*argv, "--image_min_pixels", "50176", "--image_max_pixels", "100352"]) == 1
    assert "rows.json[0].image: " in (told := capsys.readouterr().err)
    assert "own limits make it" in told


# ---- thoughts: the chat template of Qwen3.5 takes arguments, and drops the thoughts of earlier answers

THOUGHT = "<think>\nA hat.\n</think>\n\nIt is red."


@pytest.fixture(scope="module")
def thinking(base_of, tmp_path_factory):
    """Rows with and without thoughts, one of them with several answers; and a base with such a template."""
    from vlft.families import FAMILIES

    folder = tmp_path_factory.mktemp("thoughts")
    write_image(folder / "a.jpg", 120, 90)
    rows = [
        row("<image>What is this?", "A roof.", image="a.jpg"),
        row("<image>Which colour?", THOUGHT, image="a.jpg"),
        row("<image>One?", "First.", image="a.jpg"),
        row("<image>Mixed?", "First.", image="a.jpg"),
    ]
    rows[2]["conversations"] += [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Second."}]
    rows[3]["conversations"] += [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": THOUGHT}]
    return write_json(folder / "rows.json", rows), base_of(FAMILIES["qwen3_5"])


def samples_of(source, base, count):
    """Tokens and labels of each sample that vlft trains, from `vlft preview --json`."""
    found = []
    for one in previews(source, base, count):
        found += one.get("samples") or [one]
    return found


def test_each_trained_answer_is_a_row_with_its_template_arguments(thinking, tmp_path, capsys):
    source, base = thinking
    assert main(["export", "trl", str(source), str(tmp_path / "out"), "--model_id", str(base)]) == 0
    told = capsys.readouterr().out
    rows = parquet.read_table(tmp_path / "out" / "data.parquet").to_pylist()
    processor = AutoProcessor.from_pretrained(base)
    want = samples_of(source, base, 4)
    by_answers = [(one["index"], one["answer"]) for one in rows]
    red = "It is red."  # without its thoughts
    assert by_answers == [(0, "A roof."), (1, red), (2, "First."), (2, "Second."), (3, "First."), (3, red)]
    for one, trained in zip(rows, want, strict=True):
        arguments = one["chat_template_kwargs"]
        ask, said = as_messages(one["prompt"]), as_messages(one["completion"])
        prompt = processor.apply_chat_template(ask, tokenize=False, add_generation_prompt=True, **arguments)
        text = processor.apply_chat_template(ask + said, tokenize=False, **arguments)
        assert text.startswith(prompt)
        ids = processor(text=[text], images=pictures(one), return_tensors="pt")["input_ids"][0].tolist()
        assert ids[: len(trained["input_ids"])] == trained["input_ids"]
        start = len(processor(text=[prompt], images=pictures(one))["input_ids"][0])
        assert next(place for place, label in enumerate(trained["labels"]) if label != -100) <= start
    assert "remove_unused_columns=False" in told
    assert "thoughts: 2 answers with thoughts, 4 answers without" in told
    assert "4 of 4 rows, 6 samples, 6 pictures" in told


@pytest.mark.parametrize(("flags", "setting"), [([0, 2], "False"), ([1], "True")])
def test_verl_gets_the_setting_of_thoughts(thinking, tmp_path, capsys, flags, setting):
    source, base = thinking
    rows = json.loads(source.read_text())
    some = write_json(source.parent / f"some{setting}.json", [rows[place] for place in flags])
    assert main(["export", "verl", str(some), str(tmp_path / "out"), "--model_id", str(base)]) == 0
    told = capsys.readouterr().out
    assert f"+data.apply_chat_template_kwargs.enable_thinking={setting}" in told
    found = parquet.read_table(tmp_path / "out" / "data.parquet").to_pylist()
    truth = [one["reward_model"]["ground_truth"] for one in found]
    assert truth == (["It is red."] if setting == "True" else ["A roof.", "First.", "Second."])


def test_calibration_takes_rows_of_several_answers(thinking, tmp_path):
    source, base = thinking
    assert main(["export", "calibration", str(source), str(tmp_path / "out"), "--model_id", str(base)]) == 0
    rows = parquet.read_table(tmp_path / "out" / "data.parquet").to_pylist()
    assert [len(one["messages"]) for one in rows] == [2, 2, 4, 4]


def test_only_idle_flags_of_the_command_line_are_told(data, base, tmp_path, capsys):
    """The YAML of a run has many flags that act in training only."""
    config = tmp_path / "config.yaml"
    config.write_text(f"model_id: {base}\nlearning_rate: 1.0e-4\nwarmup_steps: 0.1\n")
    argv = ["export", "trl", str(data), str(tmp_path / "out"), "--config", str(config), "--rows", "1"]
    assert main([*argv, "--bf16", "false", "--learning_rate", "1e-5"]) == 0
    assert "no effect here, training only: --bf16, --learning_rate\n" in capsys.readouterr().err


# ---- bad input


@pytest.mark.parametrize("name", ["cut.jpg", "cut.png"])
def test_pictures_that_end_early_are_refused_by_name(base, tmp_path, capsys, name):
    write_image(tmp_path / name, 300, 200)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    source = write_json(tmp_path / "rows.json", [row("<image>What?", "A.", image=name), row("Hi.", "Hello.")])
    argv = ["export", "trl", str(source), str(tmp_path / "out"), "--model_id", str(base)]
    assert main(argv) == 1
    assert f"rows.json[0].image: {tmp_path / name}: damaged or cut short" in capsys.readouterr().err
    assert main([*argv, "--on_bad_row", "skip", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["read"], document["rows"], len(document["skipped"])) == (2, 1, 1)


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


def test_sft_trainer_trains_the_tokens_of_vlft(thinking, tmp_path):
    """With thoughts, without, and with several answers: input ids and labels of a batch of SFTTrainer."""
    pytest.importorskip("trl", reason="pip install trl==1.16.0")
    datasets = pytest.importorskip("datasets", reason="pip install datasets")
    import trl
    from transformers import AutoModelForImageTextToText

    source, base = thinking
    rows = json.loads(source.read_text())
    source = write_json(source.parent / "single.json", [*rows[:2], rows[3]])
    assert main(["export", "trl", str(source), str(tmp_path / "out"), "--model_id", str(base)]) == 0
    read = datasets.load_dataset(
        "parquet",
        data_files=str(tmp_path / "out" / "data.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    settings = {"output_dir": str(tmp_path / "run"), "report_to": [], "use_cpu": True, "bf16": False}
    settings |= {"max_length": None, "remove_unused_columns": False, "per_device_train_batch_size": 1}
    made = trl.SFTTrainer(
        model=AutoModelForImageTextToText.from_pretrained(base),
        args=trl.SFTConfig(**settings, train_sampling_strategy="sequential"),
        train_dataset=read,
        processing_class=AutoProcessor.from_pretrained(base),
    )
    batches = list(made.get_train_dataloader())
    want = samples_of(source, base, 3)
    assert len(batches) == len(want) == 4
    for batch, one in zip(batches, want, strict=True):
        end = 1 + max(place for place, label in enumerate(one["labels"]) if label != -100)
        assert batch["input_ids"][0].tolist()[:end] == one["input_ids"][:end]
        assert batch["labels"][0].tolist()[:end] == one["labels"][:end]
        assert batch["input_ids"].shape[1] == end + 1  # TRL trains the line break after the turn too


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
