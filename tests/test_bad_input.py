"""Each user error leads to one message: errors in folders, flags, bases and rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import MIXED_ROWS, row
from launch import vlft as vlft_process
from runs import FULL, arguments, lines
from safetensors.torch import load_file, save_file

from vlft.cli.main import main


@pytest.fixture
def refused(base, mixed_json, media, tmp_path, capsys):
    """Run `vlft train` with more flags, and return what it printed on stderr, which must be one message."""

    def run(*more: str, status: int = 1, base: Path = base, data: Path = mixed_json, out: str = "run") -> str:
        argv = arguments(base, data, media, tmp_path / out)
        argv = argv[: argv.index("--lora_dropout")] + argv[argv.index("--lora_rank") + 2 :] if FULL[1] in more else argv
        assert main([*argv, *more]) == status
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert "Traceback" not in printed
        return printed

    return run


def test_a_missing_model_folder(refused, tmp_path):
    assert "nowhere" in refused(base=tmp_path / "nowhere")


def test_a_base_that_is_no_qwen_vl(refused, base, tmp_path):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    shutil.copy(base / "model.safetensors", tmp_path / "llama")
    assert "'llama', not a Qwen-VL" in refused(base=tmp_path / "llama")


def test_a_base_with_a_tensor_missing(refused, base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    del weights["visual.merger.mlp.2.weight"]
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    assert "1 tensors are missing" in refused(base=broken)


def test_a_base_with_a_tensor_of_another_shape(refused, base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    weights = load_file(broken / "model.safetensors") | {"model.norm.weight": torch.ones(3)}
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    printed = refused(base=broken)
    assert "1 tensors are mismatched" in printed
    assert "model.norm.weight ([3] in the files, [64] by config.json)" in printed


def test_nothing_to_train(refused):
    assert "all frozen" in refused("--language", "frozen")


def test_language_full_beside_a_lora_tower(refused):
    assert "second copy" in refused("--language", "full", "--vision", "lora")


def test_lora_flags_without_a_lora_tower(refused):
    assert "--lora_rank is given" in refused(*FULL, "--lora_rank", "8")


def test_a_rate_for_a_frozen_tower(refused):
    assert "--vision_lr 1e-05 has no effect" in refused("--vision_lr", "1e-5")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--freeze_vision_tower", "True"), "--freeze_vision_tower True  ->  --vision frozen"),
        (("--max_seq_length", "100"), "--max_length"),
        (("--use_liger", "True"), "--use_liger_kernel"),
        (("--lora_enable", "True"), "--language lora"),
        (("--warmup_ratio", "0.03"), "--warmup_steps 0.03"),
        (("--fsdp", "full_shard"), "--deepspeed"),
        (("--learnin_rate", "1"), "did you mean --learning_rate?"),
        (("--vision", "half"), "--vision is half, must be one of full, lora, frozen"),
    ],
)
def test_flags_with_another_name_or_none(refused, flags, says):
    assert says in refused(*flags, status=2)


def test_a_row_that_fits_no_pack(refused):
    assert "tokens fit no pack, --pack_tokens is 100" in refused("--packing", "true", "--pack_tokens", "100")


def test_liger_kernels_that_cannot_run_here(refused):
    message = refused("--use_liger_kernel", "true")
    assert "--use_liger_kernel true: needs CUDA" in message
    assert "pip install 'liger-kernel" in message


def test_an_attention_kernel_that_cannot_run_here(refused):
    assert "--attn flash_attn: needs a CUDA device" in refused("--attn", "flash_attn")


ZERO2 = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({**ZERO2, "optimizer": {"type": "AdamW"}}, 'its "optimizer" block would act in place of --optim'),
        ({**ZERO2, "scheduler": 3}, 'its "scheduler" block would act in place of --lr_scheduler_type'),
        ({**ZERO2, "elasticity": {}}, 'its "elasticity" block would act in place of --global_batch'),
        ({**ZERO2, "gradient_clipping": 0.5}, "its gradient_clipping 0.5 would override --max_grad_norm 1.0"),
        ({**ZERO2, "gradient_clipping": [1]}, "gradient_clipping is [1], expected a number"),
        ({**ZERO2, "gradient_accumulation_steps": 4}, "its gradient_accumulation_steps 4 would override"),
        ({**ZERO2, "train_micro_batch_size_per_gpu": 2}, "2 would override --per_device_train_batch_size 1"),
        ({**ZERO2, "train_micro_batch_size_per_gpu": True}, "is true, expected a number"),
        ({**ZERO2, "train_batch_size": 64}, "its train_batch_size 64 would override --gradient_accumulation_steps 1"),
        ({**ZERO2, "bf16": {"enabled": True}}, "its bf16.enabled true would override --bf16 false"),
        ({**ZERO2, "fp16": {"enabled": "yes"}}, 'fp16.enabled is "yes", expected true, false or "auto"'),
        ({**ZERO2, "bf16": True}, "bf16 holds a bool, expected a JSON object"),
        ({"zero_optimization": [2]}, "zero_optimization holds a list, expected a JSON object"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4, expected 1, 2 or 3"),
        ({"zero_optimization": {"stage": "2"}}, 'zero_optimization.stage is "2", expected 1, 2 or 3'),
        ({}, "zero_optimization.stage is 0, expected 1, 2 or 3. To train without sharding, drop --deepspeed"),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}, "offload_optimizer holds a str"),
        ({"zero_optimization": {"stage": 2, "stag": 3}}, "zero_optimization.stag is 3"),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}, "reduce_bucket_size is 'many'"),
        ([], "holds a list, expected a JSON object"),
    ],
)
def test_deepspeed_files_that_would_override_flags(refused, tmp_path, settings, says):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(settings))
    printed = refused("--deepspeed", str(path))
    assert printed.startswith(f"error: --deepspeed {path}")
    assert says in printed


def test_deepspeed_files_that_are_none(refused, tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(b"\xff")
    assert "cannot be read as JSON" in refused("--deepspeed", str(path))
    assert "cannot be read as JSON" in refused("--deepspeed", str(tmp_path / "none.json"))
    printed = refused("--deepspeed", "zero4")
    assert "neither a preset (zero1, zero2, zero3, zero2_offload, zero3_offload) nor a .json file" in printed


def test_a_deepspeed_file_that_says_what_the_flags_say(tmp_path):
    from vlft.config.deepspeed import deepspeed_settings

    path = tmp_path / "ds.json"
    zero = {"stage": 3, "stage3_max_live_parameters": 10_000, "reduce_bucket_size": "auto"}
    path.write_text(json.dumps({"zero_optimization": zero, "gradient_clipping": 1.0, "bf16": {"enabled": "auto"}}))
    flags = {"max_grad_norm": 1.0, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1}
    settings = deepspeed_settings(str(path), {**flags, "bf16": False, "fp16": False, "global_batch": None})
    assert settings["zero_optimization"] == zero
    assert settings["gradient_clipping"] == "auto"


def test_evaluation_flags_that_need_each_other(refused, mixed_json):
    assert "--eval_path" in refused("--eval_strategy", "epoch")
    assert "--eval_strategy is no" in refused("--eval_path", str(mixed_json))


def test_a_config_file_that_is_none(refused, tmp_path):
    assert "cannot be read" in refused("--config", str(tmp_path / "no.yaml"))
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    assert "found a list" in refused("--config", str(tmp_path / "list.yaml"))
    (tmp_path / "latin.yaml").write_bytes("run_name: é\n".encode("latin-1"))
    assert "not in UTF-8" in refused("--config", str(tmp_path / "latin.yaml"))
    assert "--config is given twice, a.yaml and b.yaml" in refused("--config", "a.yaml", "--config=b.yaml", status=2)


def test_several_gpus_without_a_launcher(monkeypatch, refused):
    from vlft.config.training import TrainFlags

    monkeypatch.setattr(TrainFlags, "n_gpu", 4)
    assert "GPUS=4 scripts/finetune_lora.sh" in refused()


def test_an_output_folder_of_something_else(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "thesis.txt" in refused()
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--seed", "7"), "its seed is 42, this run's is 7"),
        (("--vision", "lora"), "its towers are vision frozen, this run's are vision lora."),
        (("--gradient_accumulation_steps", "3"), "its global batch is 1, this run's is 3"),
        (("--image_max_pixels", "12544"), "pixel and frame settings"),
        (("--lora_rank", "8"), "LoRA"),
    ],
)
def test_an_output_folder_of_another_run(base, mixed_json, media, tmp_path, capsys, refused, flags, says):
    assert main([*arguments(base, mixed_json, media, tmp_path / "run"), "--max_steps", "1"]) == 0
    capsys.readouterr()
    assert says in refused(*flags)


def test_a_folder_in_use(base, mixed_json, media, tmp_path, refused):
    import fcntl

    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "another run is training there" in refused()


def test_a_folder_of_a_run_killed_before_its_first_checkpoint_is_started_over(base, mixed_json, media, tmp_path):
    argv = [*arguments(base, mixed_json, media, tmp_path / "run"), "--max_steps", "4"]
    (killed,) = vlft_process(argv, out=tmp_path, kill_in_step=3)
    assert killed.status == -9
    assert main(argv) == 0
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_run_killed_while_it_writes_its_first_files_is_started_over(base, mixed_json, media, tmp_path, monkeypatch):
    argv = [*arguments(base, mixed_json, media, tmp_path / "run"), "--max_steps", "1"]
    for name in ("os.replace", "vlft.train.folder.write_yaml"):
        with monkeypatch.context() as broken:
            broken.setattr(name, Mock(side_effect=KeyboardInterrupt))
            assert main(argv) == 130
    assert main(argv) == 0


# ---- rows


@pytest.fixture
def planted(tmp_path, media) -> Path:
    """The mixed rows and three bad rows: a missing file, a truncated picture, one tag too many."""
    whole = (media / "china.jpg").read_bytes()
    (media / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    rows = [
        row("x", "<image>", id="gone", image="gone.jpg"),
        *MIXED_ROWS,
        row("x", "<image>", id="cut", image="cut.jpg"),
        row("x", "<image><image>", id="tags", image="china.jpg"),
    ]
    path = tmp_path / "planted.json"
    path.write_text(json.dumps(rows))
    return path


def test_bad_rows_stop_the_run_before_it_starts(refused, planted, tmp_path):
    printed = refused(data=planted)
    assert "rows cannot be trained" in printed
    assert "planted.json[0].image" in printed
    assert "planted.json[9]" in printed
    assert "--on_bad_row skip" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_bad_rows_are_skipped_listed_and_add_up(base, planted, media, tmp_path, capsys, workers):
    argv = arguments(base, planted, media, tmp_path / "run")
    assert main([*argv, "--on_bad_row", "skip", "--dataloader_num_workers", workers]) == 0
    (entry,) = json.loads((tmp_path / "run" / "vlft.json").read_text())["data"]
    assert entry["rows"] == 10
    assert entry["trained"] == 7
    assert [(s["index"], s["id"]) for s in entry["skipped"]] == [(0, "gone"), (8, "cut"), (9, "tags")]
    assert all(s["reason"] and s["field"] for s in entry["skipped"])
    assert "gone.jpg" in capsys.readouterr().out


def test_a_picture_that_breaks_after_the_check_stops_the_run_with_its_row(refused, planted):
    """Headers are read before the run; the pixels of this picture end early."""
    rows = [r for r in json.loads(planted.read_text()) if r.get("id") not in ("gone", "tags")]
    planted.write_text(json.dumps(rows))
    printed = refused("--dataloader_num_workers", "2", data=planted)
    assert "planted.json[7].image" in printed
    assert "vlft preview" in printed


def test_no_row_is_left(refused, tmp_path):
    path = tmp_path / "none.json"
    path.write_text(json.dumps([row("x", "<image>", image="gone.jpg")]))
    assert "no row is left" in refused("--on_bad_row", "skip", data=path)


def test_rows_skipped_before_a_kill_are_still_in_the_accounts(base, planted, media, tmp_path):
    rows = [r for r in json.loads(planted.read_text()) if r.get("id") in ("cut", "text", "still")]
    planted.write_text(json.dumps(rows))
    argv = [
        *arguments(base, planted, media, tmp_path / "run"),
        *("--on_bad_row", "skip", "--save_strategy", "steps", "--save_steps", "3", "--num_train_epochs", "1"),
        *("--max_steps", "4"),
    ]
    (killed,) = vlft_process(argv, out=tmp_path, kill_in_step=4)
    assert killed.status == -9
    # The picture is repaired meanwhile, so that the resumed run does not find it broken.
    shutil.copy(media / "china.jpg", media / "cut.jpg")
    assert main(argv) == 0
    (entry,) = json.loads((tmp_path / "run" / "vlft.json").read_text())["data"]
    assert [s["id"] for s in entry["skipped"]] == ["cut"]
    assert entry["trained"] == 2


def test_rows_mended_since_make_it_another_run(base, planted, media, tmp_path, capsys):
    argv = arguments(base, planted, media, tmp_path / "run", "--on_bad_row", "skip", "--max_steps", "1")
    assert main(argv) == 0
    shutil.copyfile(media / "china.jpg", media / "gone.jpg")
    try:
        assert main(argv) == 1
    finally:
        (media / "gone.jpg").unlink()
    assert "its number of rows is 8, this run's is 9" in capsys.readouterr().err


def test_a_skipped_row_with_half_a_character_in_its_id(base, media, tmp_path, capsys):
    rows = [row("Yes.", "Well?"), row("No.", "<image>Well?", id="half \ud83d", image="none \ud83d.jpg")]
    data = tmp_path / "half.json"
    data.write_text(json.dumps(rows))
    argv = [*arguments(base, data, media, tmp_path / "run"), "--on_bad_row", "skip"]
    (done,) = vlft_process(argv, out=tmp_path)
    assert done.status == 0, done.output
    skipped = json.loads((tmp_path / "run" / "vlft.json").read_text())["data"][0]["skipped"]
    assert [entry["id"] for entry in skipped] == ["half \ud83d"]
