"""What belongs to another family is refused in words: processors, bases, adapters, runs; and what experts cannot do."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from build import row, write_image, write_json
from runs import arguments, record_of

from vlft.cli.main import main
from vlft.families import FAMILIES

COPIES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    write_image(folder / "a.png")
    return write_json(folder / "rows.json", [row("<image>\nWhat?", "That.", image="a.png")])


def refused(argv: list[str], capsys) -> str:
    capsys.readouterr()
    assert main(argv) == 1, argv[0]
    (said,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return said


def verbs(folder: Path, rows: Path, out: Path) -> list[list[str]]:
    common = ["--model_id", str(folder), "--data_path", str(rows)]
    return [
        arguments(folder, rows, rows.parent, out / "run"),
        ["plan", *common],
        ["check-data", *common],
        ["preview", str(rows), "--index", "0", *common[:2]],
        ["chat", str(folder), "Hello?"],
    ]


def set_in(folder: Path, name: str, part: str | None = None, **values) -> None:
    raw = json.loads((folder / name).read_text())
    (raw if part is None else raw[part]).update(values)
    (folder / name).write_text(json.dumps(raw))


def flat_files(folder: Path) -> None:
    """The files of processors as older models are published: one per processor."""
    raw = json.loads((folder / COPIES[0]).read_text())
    (folder / COPIES[0]).unlink()
    for name, part in zip(COPIES[1:], ("image_processor", "video_processor"), strict=True):
        (folder / name).write_text(json.dumps(raw[part] | {"processor_class": raw["processor_class"]}))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("model", "processor", "says"),
    [
        ("qwen3_vl", "qwen2_5_vl", "patch_size of its image processor is 14, by {}; config.json has 16 for the vision "
         "tower: they belong to different models (14 is that of Qwen2-VL, Qwen2.5-VL)."),
        ("qwen2_5_vl", "qwen3_5", "patch_size of its image processor is 16, by {}; config.json has 14 for the vision "
         "tower: they belong to different models (16 is that of Qwen3-VL, Qwen3.5, "),
        ("qwen2_5_vl", "qwen2_vl", "the processor of {} is Qwen2VLProcessor, that of Qwen2-VL; Qwen2.5-VL has "
         "Qwen2_5_VLProcessor"),
    ],
)  # fmt: skip
def test_the_processor_of_another_family(base_of, rows, tmp_path, capsys, model, processor, says, flat):
    folder = Path(shutil.copytree(base_of(FAMILIES[model]), tmp_path / "mixed"))
    shutil.copyfile(base_of(FAMILIES[processor]) / COPIES[0], folder / COPIES[0])
    if flat:
        flat_files(folder)
    for argv in verbs(folder, rows, tmp_path):
        assert says.format(COPIES[flat]) in refused(argv, capsys), argv[0]


@pytest.mark.parametrize(
    ("name", "part", "values", "says"),
    [
        (COPIES[0], "video_processor", {"video_processor_type": "Qwen2VLVideoProcessor"},
         "the video processor of video_processor_type in processor_config.json is Qwen2VLVideoProcessor, that of "
         "Qwen2-VL; Qwen3-VL has Qwen3VLVideoProcessor"),
        (COPIES[0], "video_processor", {"temporal_patch_size": 4}, "temporal_patch_size of its video processor is 4"),
        (COPIES[0], "image_processor", {"merge_size": 4}, "merge_size of its image processor is 4, by processor"),
        ("config.json", None, {"model_type": "qwen3_vl_text"}, "(only the language model of a Qwen3-VL, without"),
        ("config.json", None, {"vision_config": None}, "no vision_config: it is the language model of a Qwen3-VL al"),
        ("config.json", None, {"model_type": "qwen4_exp"}, "n-gram embeddings alone take some 90 GB"),
        ("config.json", None, {"model_type": "qwen3_omni_moe"}, "a model for speech"),
        ("config.json", None, {"model_type": "internvl"}, "another vision-language family"),
        ("config.json", None, {"quantization_config": {"quant_method": "fp8"}}, "has a quantization_config (fp8)"),
    ],
)  # fmt: skip
def test_other_bases(base_of, rows, tmp_path, capsys, name, part, values, says):
    folder = Path(shutil.copytree(base_of(FAMILIES["qwen3_vl"]), tmp_path / "other"))
    set_in(folder, name, part, **values)
    for argv in verbs(folder, rows, tmp_path):
        assert says in refused(argv, capsys), argv[0]


@pytest.mark.parametrize("recorded", [True, False])
def test_an_adapter_of_another_family(base, base_of, tmp_path, capsys, recorded):
    """Its own vlft.json names the family, or the base that adapter_config.json names."""
    other = base_of(FAMILIES["qwen3_vl"])
    run = record_of(tmp_path / "run", steps=1, of=1, finished=True) if recorded else tmp_path / "run"
    run.mkdir(exist_ok=True)
    (run / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(base)}))
    (run / "adapter_model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    says = rf"trained on {'base' if recorded else base}, a Qwen2-VL \(qwen2_vl\); {other} is a Qwen3-VL \(qwen3_vl\)"
    for argv in (["merge", str(run), str(tmp_path / "out")], ["chat", str(run), "Hello?"]):
        assert re.search(says, refused([*argv, "--base_model", str(other)], capsys)), argv[0]


def test_the_output_folder_of_a_run_of_another_family(base_of, rows, tmp_path, capsys):
    run = record_of(tmp_path / "run", steps=1, of=2)
    (run / "checkpoint-1").mkdir()
    (run / "checkpoint-1" / "trainer_state.json").write_text("{}")
    shutil.copyfile(run / "vlft.json", run / "checkpoint-1" / "vlft.json")
    says = r"holds a run on base, a model of the type 'qwen2_vl'; --model_id is of the type 'qwen3_vl'"
    assert re.search(says, refused(arguments(base_of(FAMILIES["qwen3_vl"]), rows, rows.parent, run), capsys))


@pytest.mark.parametrize("model_type", ["qwen3_vl_moe", "qwen3_5_moe"])
def test_experts_stay_frozen_and_whole(base_of, rows, tmp_path, capsys, model_type):
    family, stage3 = FAMILIES[model_type], tmp_path / "ds.json"
    stage3.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    full = ("--vision", "full", "--merger", "full", "--language", "full")
    says = rf"--language full: the language model of {family.label} chooses among experts.*stay frozen.*--language lora"
    for argv in verbs(base_of(family), rows, tmp_path)[:4]:
        argv = (
            [*argv, *full]
            if argv[0] != "train"
            else arguments(base_of(family), rows, rows.parent, tmp_path / "run", *full)
        )
        assert re.search(says, refused(argv, capsys)), argv[0]
    for name in ("zero3", "zero3_offload", str(stage3)):
        for argv in verbs(base_of(family), rows, tmp_path)[:2]:
            said = refused([*argv, "--deepspeed", name], capsys)
            assert re.search(rf"--deepspeed {name}: ZeRO-3.*every expert.*--deepspeed zero2", said), argv[0]
    assert not (tmp_path / "run").exists()
