"""`vlft plan`: the table of a real model, the steps of the real order, and what training would refuse."""

from __future__ import annotations

import json

import pytest
from build import FAMILY
from conftest import row
from plans import PRESETS, plan, towers

from vlft.cli.main import main
from vlft.config import device
from vlft.demo.tiny import build_tiny
from vlft.model.apply import apply_towers
from vlft.model.groups import parameter_groups, table
from vlft.model.load import load_base
from vlft.model.towers import Towers


@pytest.fixture(scope="module")
def flags(base, media, mixed_json):
    return ["--model_id", base, "--data_path", mixed_json, "--image_folder", media, "--dataloader_num_workers", 0]


def real_groups(base, asked: Towers) -> list:
    model = apply_towers(load_base(base, FAMILY), FAMILY, asked, masters=True)
    rates = {"vision": 2e-6, "merger": 1e-5, "language": 1e-4}
    return parameter_groups(model, FAMILY, learning_rates=rates, weight_decay=0.1)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("tied", [True, False])
def test_groups_are_those_of_a_real_model(capsys, tmp_path, flags, preset, tied):
    base = build_tiny(tmp_path / "base", tied=tied)
    argv, asked = towers(preset)
    rates = ["--learning_rate", "1e-4"]
    for tower, rate in (("vision", "2e-6"), ("merger", "1e-5")):
        rates += [f"--{tower}_lr", rate] if asked.modes[tower] != "frozen" else []
    planned = plan(capsys, *flags, "--model_id", base, *argv, *rates, "--weight_decay", "0.1")
    assert planned["groups"] == [group.as_json() for group in real_groups(base, asked)]
    assert planned["packs"] == 1


def test_what_a_person_reads(capsys, base, flags, mixed_json, encoded):
    argv, asked = towers("vision and language")
    rates = ["--vision_lr", "2e-6", "--merger_lr", "1e-5", "--weight_decay", "0.1"]
    assert main(["plan", *map(str, flags), *argv, *rates, "--gpus", "2"]) == 0
    out = capsys.readouterr().out
    assert table(real_groups(base, asked)) in out
    assert f"train: {mixed_json}: 7 rows, 7 taken" in out
    longest = max(encoded.values(), key=lambda sample: len(sample.input_ids_T))
    named = f"{mixed_json}[{longest.index}] (id {longest.id})"
    assert f"longest row: {named}: {len(longest.input_ids_T)} tokens, " in out
    tokens = sum(len(sample.input_ids_T) for sample in encoded.values())
    assert f"packs: 1 of up to 16,384 tokens, {tokens / 16384:.1%} full; global batch: 2 packs (1 accumulated" in out
    assert "steps: 1 an epoch, 3 in all (3 epochs)" in out


@pytest.mark.parametrize(
    ("argv", "batch", "per_epoch", "steps"),
    [
        ([], 1, 7, 21),
        (["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "2"], 4, 2, 6),
        (["--gpus", "8", "--num_train_epochs", "1"], 8, 1, 1),
        (["--num_train_epochs", "0.5"], 1, 7, 4),
        (["--gpus", "2", "--max_steps", "10"], 2, 4, 10),
    ],
)
def test_steps_of_rows(capsys, flags, argv, batch, per_epoch, steps):
    planned = plan(capsys, *flags, "--packing", "false", *argv)
    assert planned["packs"] is None
    assert (planned["rows"], planned["global_batch"]) == (7, batch)
    assert (planned["steps_per_epoch"], planned["steps"]) == (per_epoch, steps)


@pytest.mark.parametrize(
    ("argv", "packs", "batch", "per_epoch"),
    [
        (["--pack_tokens", "400"], 3, 1, 3),
        (["--pack_tokens", "400", "--gpus", "2"], 3, 2, 2),
        (["--pack_tokens", "400", "--gradient_accumulation_steps", "3"], 3, 3, 1),
        (["--pack_tokens", "400", "--global_batch", "7"], 3, 3, 1),
        (["--global_batch", "3", "--gpus", "2"], 5, 2, 3),
        (["--pack_patches", "500"], 4, 1, 4),
    ],
)
def test_steps_of_packs(capsys, flags, encoded, argv, packs, batch, per_epoch):
    planned = plan(capsys, *flags, *argv)
    assert (planned["packs"], planned["global_batch"], planned["steps_per_epoch"]) == (packs, batch, per_epoch)
    assert planned["tokens"] == sum(len(sample.input_ids_T) for sample in encoded.values())


def test_it_writes_nothing(capsys, tmp_path, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    plan(capsys, *flags)
    plan(capsys, *flags, "--output_dir", tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_yaml_and_flags(capsys, tmp_path, flags):
    config = tmp_path / "run.yaml"
    config.write_text("packing: false\ngradient_accumulation_steps: 4\nnum_train_epochs: 2\n", encoding="utf-8")
    planned = plan(capsys, "--config", config, *flags, "--num_train_epochs", 1)
    assert (planned["global_batch"], planned["steps"]) == (4, 2)


def test_refused_rows(capsys, tmp_path, flags):
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps([row("A.", "Q?"), row("", "Q?", id="empty")]), encoding="utf-8")
    assert main(["plan", *map(str, flags), "--data_path", str(bad)]) == 1
    assert f"1 of 2 rows cannot be trained:\n  {bad}[1].conversations[1].value (id empty)" in capsys.readouterr().err
    planned = plan(capsys, *flags, "--data_path", bad, "--on_bad_row", "skip")
    assert planned["rows"] == 1
    assert planned["files"] == [{"file": str(bad), "rows": 2, "trained": 1, "skipped": 1, "changed": 0}]


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--vision_lr", "1e-5"], 1, "--vision_lr 1e-05 has no effect: --vision is frozen"),
        (["--language", "frozen"], 1, "nothing would be trained"),
        (["--language", "full", "--vision", "lora"], 1, "--language full with --vision lora"),
        (["--eval_strategy", "epoch"], 1, "--eval_strategy epoch needs --eval_path"),
        (["--eval_path", "x.json"], 1, "--eval_strategy is no"),
        (["--pack_tokens", "200"], 1, "231 tokens fit no pack, --pack_tokens is 200"),
        (["--pack_patches", "200"], 1, "patches fit no pack, --pack_patches is 200"),
        (["--packing", "false", "--pack_tokens", "9999"], 1, "--pack_tokens 9999 has no effect: --packing is false"),
        (["--per_device_train_batch_size", "2"], 1, "--per_device_train_batch_size 2 has no effect: with packing"),
        (["--global_batch", "4", "--gradient_accumulation_steps", "2"], 1, "both set how large a step is"),
        (["--packing", "false", "--global_batch", "4", "--gpus", "3"], 1, "--global_batch 4 is not a multiple of 3"),
        (["--global_batch", "0"], 1, "--global_batch is 0"),
        (
            ["--load_best_model_at_end", "true"],
            1,
            "needs --eval_strategy and --save_strategy to be equal, not no and steps",
        ),
        (["--per_device_train_batch_size", "0"], 1, "--per_device_train_batch_size is 0, must be at least 1"),
        (["--gradient_accumulation_steps", "0"], 1, "--gradient_accumulation_steps is 0"),
        (["--num_train_epochs", "0"], 1, "--num_train_epochs is 0, must be more than 0"),
        (["--max_length", "99999"], 1, "--max_length is 99,999"),
        (["--max_length", "50"], 1, "rows cannot be trained"),
        (["--image_folder", "nowhere"], 1, "--image_folder nowhere"),
        (["--gpus", "0"], 2, "--gpus is 0, must be at least 1"),
        (["--warmup_ratio", "0.1"], 2, "--warmup_steps 0.1"),
        (["--learning_rat", "1"], 2, "did you mean --learning_rate?"),
    ],
)
def test_what_training_refuses(capsys, flags, argv, status, message):
    assert main(["plan", *map(str, flags), *argv]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err


def test_a_base_without_its_weights(capsys, tmp_path, base, flags):
    folder = tmp_path / "base"
    folder.mkdir()
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    assert main(["plan", *map(str, flags), "--model_id", str(folder)]) == 1
    assert "neither model.safetensors nor" in capsys.readouterr().err


def test_a_base_that_lacks_a_tensor(capsys, tmp_path, base, flags):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "base"
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if "q_proj.weight" in name)
    save_file({name: t for name, t in tensors.items() if name != lost}, folder / "model.safetensors")
    assert main(["plan", *map(str, flags), "--model_id", str(folder)]) == 1
    said = capsys.readouterr().err
    assert "1 tensors are missing" in said
    assert "e.g. model.layers.0.self_attn.q_proj.weight. config.json and the weights" in said


def test_flags_for_a_gpu_are_planned_without_torch(capsys, monkeypatch, flags):
    """A YAML of another kit has them, and is planned on a machine without GPU first."""
    monkeypatch.setattr("vlft.cli.plan.may_have_cuda", lambda: False)
    monkeypatch.setattr("vlft.cli.plan.train_types", None)
    asked = ("--tf32", "true", "--deepspeed", "zero3", "--use_liger_kernel", "auto", "--use_cpu", "true")
    assert plan(capsys, *flags, *asked)["steps"] == plan(capsys, *flags)["steps"]


@pytest.mark.parametrize(
    ("platform", "there", "gpu", "cuda"),
    [
        ("linux", (), False, False),
        ("linux", ("/dev/dri",), True, False),  # a display
        ("linux", ("/dev/dri", "/dev/nvidiactl"), True, True),
        ("linux", ("/dev/kfd",), True, True),
        ("darwin", (), True, False),
        ("win32", (), True, True),
    ],
)
def test_only_a_driver_for_cuda_makes_a_plan_ask_torch(monkeypatch, platform, there, gpu, cuda):
    monkeypatch.setattr("sys.platform", platform)
    monkeypatch.setattr("os.path.exists", lambda path: path in there)
    assert (device.may_have_gpu(), device.may_have_cuda()) == (gpu, cuda)
