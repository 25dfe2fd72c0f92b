"""`vlft train` through its real command line: what moves, at which rate, in which order, and what is left on disk."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from launch import vlft as vlft_process
from mishaps import before_each_loss
from runs import FULL, VISION_LORA, ZERO2, arguments, assert_same, lines, losses, split, weights
from safetensors.torch import load_file

from vlft.cli.main import main
from vlft.config.repeat import write_yaml

TWO_PROCESSES = [
    pytest.param(FULL, (), id="full-ddp"),
    pytest.param(VISION_LORA, ZERO2, id="vision-lora-zero2"),
    pytest.param(VISION_LORA, (), id="vision-lora-ddp", marks=pytest.mark.grid),
    pytest.param(FULL, ZERO2, id="full-zero2", marks=pytest.mark.grid),
]


# ---- what is trained


def test_language_lora_leaves_the_vision_tower_alone(train, base):
    run = train()
    assert not [name for name in weights(run) if "visual" in name]
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText

    stock = AutoModelForImageTextToText.from_pretrained(base)
    before = {name: p.clone() for name, p in stock.named_parameters()}
    tuned = PeftModel.from_pretrained(stock, run).merge_and_unload()
    for name, parameter in tuned.named_parameters():
        if "visual" in name:
            assert torch.equal(parameter, before[name]), name
    assert any(not torch.equal(p, before[n]) for n, p in tuned.named_parameters() if "language_model" in n)


def test_vision_and_language_lora_trains_both(train):
    moved = {name: bool(tensor.any()) for name, tensor in weights(train(*VISION_LORA)).items() if "lora_B" in name}
    for part in ("visual.blocks.0.attn.qkv", "visual.merger.mlp.2", "language_model.layers.1.mlp.down_proj"):
        assert any(part in name and touched for name, touched in moved.items()), part
    assert all(moved.values())


def test_full_training_moves_every_tensor(train, base):
    run = train(*FULL)
    before, after = load_file(base / "model.safetensors"), weights(run)
    assert set(before) == set(after)
    assert [name for name in before if torch.equal(before[name], after[name])] == []


def test_a_full_run_loads_with_plain_transformers(train, base):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    run = train(*FULL)
    _, info = AutoModelForImageTextToText.from_pretrained(run, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert AutoProcessor.from_pretrained(run).chat_template
    assert json.loads((run / "config.json").read_text()) == json.loads((base / "config.json").read_text())


def test_an_adapter_holds_a_fully_trained_merger(train):
    names = set(weights(train("--merger", "full")))
    assert "base_model.model.model.visual.merger.mlp.0.weight" in names
    assert "base_model.model.model.visual.merger.ln_q.bias" in names


def test_learning_rates_and_decay_are_those_of_the_live_optimizer(train, monkeypatch):
    from vlft.train.trainer import VlftTrainer

    seen = []
    real = VlftTrainer.create_optimizer

    def spy(self, model=None):
        optimizer = real(self, model)
        seen.append({g["name"]: (g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups})
        return optimizer

    monkeypatch.setattr(VlftTrainer, "create_optimizer", spy)
    run = train(*FULL, "--vision_lr", "2e-6", "--merger_lr", "3e-5", "--weight_decay", "0.1", "--max_steps", "2")
    rates = {name: rate for name, (rate, _, _) in seen[0].items()}
    assert rates == {
        "vision": 2e-6,
        "vision_no_decay": 2e-6,
        "merger": 3e-5,
        "merger_no_decay": 3e-5,
        "language": 1e-3,
        "language_no_decay": 1e-3,
    }
    assert {name: decay for name, (_, decay, _) in seen[0].items()} == {
        name: 0.0 if name.endswith("no_decay") else 0.1 for name in rates
    }
    assert sum(count for _, _, count in seen[0].values()) == 57
    assert lines(run)[0]["lr"] == rates
    assert lines(run)[1]["lr"]["vision"] == pytest.approx(1e-6)


# ---- the same run with any batch size and number of processes


@pytest.mark.parametrize("towers", [FULL, VISION_LORA], ids=["full", "vision-lora"])
def test_batch_and_accumulation_do_not_change_the_run(train, towers):
    whole = train(*towers, *split(4, 1), name="4x1")
    for batch, accumulation in ((2, 2), (1, 4)):
        assert_same(train(*towers, *split(batch, accumulation), name=f"{batch}x{accumulation}"), whole)


def test_checkpointing_and_workers_do_not_change_the_run(train):
    whole = train(*FULL, *split(2, 2), name="plain")
    other = train(*FULL, *split(2, 2), "--gradient_checkpointing", "true", "--dataloader_num_workers", "2", name="more")
    assert_same(other, whole)


@pytest.mark.distributed
@pytest.mark.parametrize(("towers", "strategy"), TWO_PROCESSES)
def test_two_processes_train_as_one(train, base, mixed_json, media, tmp_path, towers, strategy):
    whole = train(*towers, *split(4, 1), name="one")
    out = tmp_path / "two"
    argv = arguments(base, mixed_json, media, out, *towers, *split(1, 2), *strategy)
    for rank in vlft_process(argv, world=2, out=tmp_path):
        assert rank.status == 0, rank.output[-3000:]
    assert_same(out, whole)


def test_every_row_is_trained_once_an_epoch(train, monkeypatch):
    rows = []
    before_each_loss(monkeypatch, lambda _, batch: rows.extend(i for _, i in batch["rows"]))
    run = train(*split(1, 3))
    assert sorted(rows[:7]) == sorted(rows[7:]) == list(range(7))
    assert rows[:7] != rows[7:]
    assert sum(line["samples"] for line in lines(run)) == 14


# ---- resume


@pytest.mark.parametrize("towers", [FULL, VISION_LORA], ids=["full", "vision-lora"])
def test_a_run_that_is_killed_and_started_again_ends_with_the_same_weights(
    train, base, mixed_json, media, tmp_path, towers
):
    """LoRA has dropout and workers, so the random state must also be restored, also across the end of an epoch."""
    dropout = ("--lora_dropout", "0.1", "--dataloader_num_workers", "2") if towers is VISION_LORA else ()
    more = (*towers, *split(1, 2), "--save_strategy", "steps", "--save_steps", "3", *dropout)
    whole = train(*more, name="whole")
    out = tmp_path / "killed"
    argv = arguments(base, mixed_json, media, out, *more)
    (killed,) = vlft_process(argv, out=tmp_path, kill_in_step=5)
    assert killed.status == -9, killed.output[-3000:]
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-3"]
    assert main(argv) == 0
    a, b = weights(out), weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert losses(out) == losses(whole)
    assert [line["step"] for line in lines(out)] == [line["step"] for line in lines(whole)]


def test_a_checkpoint_under_any_name_can_be_gone_on_from(train, tmp_path):
    whole = train("--save_strategy", "steps", "--save_steps", "5")
    best = (whole / "checkpoint-5").rename(tmp_path / "best")
    other = train("--resume_from_checkpoint", str(best), name="other")
    assert [line["step"] for line in lines(other)] == [line["step"] for line in lines(whole)][5:]
    assert losses(other) == losses(whole)[5:]


# ---- evaluation


def test_evaluation_loss_is_the_token_mean_at_any_batch_size(train, mixed_json, base, encoded, encoder):
    from models import stock_loss
    from transformers import AutoModelForImageTextToText

    found = []
    for batch in (1, 3):
        run = train(
            *("--eval_path", str(mixed_json), "--eval_strategy", "epoch", "--per_device_eval_batch_size", str(batch)),
            *("--eval_on_start", "true", "--learning_rate", "1e-9"),
            name=f"eval{batch}",
        )
        found.append([line["eval_loss"] for line in lines(run) if "eval_loss" in line])
        assert all("loss" not in line for line in lines(run) if "eval_loss" in line)
    assert found[0] == pytest.approx(found[1], rel=1e-6)
    model = AutoModelForImageTextToText.from_pretrained(base)
    with torch.no_grad():
        pairs = [stock_loss(model, row, encoder.processor) for row in encoded.values()]
    expected = sum(float(loss) for loss, _ in pairs) / sum(len(logits) for _, logits in pairs)
    assert found[0][0] == pytest.approx(expected, rel=1e-5)


# ---- what is on disk and on the screen


@pytest.mark.parametrize(
    ("towers", "data"),
    [
        pytest.param(FULL, ("--data_mix", "mix.yaml"), id="full-mix"),
        pytest.param(VISION_LORA, ("--data_path", "one-{a,b}.csv", "two.json"), id="vision-lora-pattern"),
    ],
)
def test_the_config_repeats_the_run_from_any_directory(base, mixed_json, media, tmp_path, monkeypatch, towers, data):
    home, away = tmp_path / "a [home]", tmp_path / "away"  # the first looks like a pattern
    home.mkdir()
    away.mkdir()
    (home / "model").symlink_to(base)
    for name in ("one-a.csv", "one-b.csv"):
        (home / name).write_text("question,answer\nWhat is this?,A row.\n")
    for name in ("two.json", "held.json"):
        shutil.copy(mixed_json, home / name)
    folder = os.path.relpath(media, home)
    (home / "mix.yaml").write_text(f"- one-*.csv\n- path: two.json\n  image_folder: {folder}\n  repeat: 2\n")
    argv = [
        *("train", "--model_id", "~/model", "--image_folder", folder, "--eval_path", "held.json", *towers, *data),
        *("--eval_strategy", "epoch", "--packing", "false", "--dataloader_num_workers", "0", "--report_rows", "0"),
        *("--save_strategy", "no", "--vision_lr", "5e-4", "--max_steps", "2", "--output_dir", "~/run"),
    ]
    monkeypatch.chdir(home)
    monkeypatch.setenv("HOME", str(home))
    assert main(argv) == 0
    (home / "mix.yaml").unlink()  # the run has its own copy
    monkeypatch.chdir(away)
    monkeypatch.setenv("HOME", str(away))
    again = ["train", "--config", str(home / "run" / "config.yaml")]
    assert main([*again, "--output_dir", "again"]) == 0
    mine, theirs = weights(away / "again"), weights(home / "run")
    assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())
    assert main(again) == 0, "the finished run is found where it is"
    assert not (away / "run").exists()


def test_every_path_of_a_config_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    for name in ("zero2", "ds.json", "auto"):
        (tmp_path / name).touch()
    flags = {
        "data_path": ["a.json", "parts/*.csv", "~/b.json", "/c.json"],
        "resume_from_checkpoint": "old/checkpoint-2",
        "model_id": "Qwen/Qwen2-VL-2B-Instruct",
        "output_dir": "../out",
        "deepspeed": "ds.json",
        "run_name": "ds.json",
    }
    write_yaml(tmp_path / "config.yaml", flags)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {
        "data_path": [f"{tmp_path}/a.json", f"{tmp_path}/parts/*.csv", "/home/someone/b.json", "/c.json"],
        "resume_from_checkpoint": f"{tmp_path}/old/checkpoint-2",
        "model_id": "Qwen/Qwen2-VL-2B-Instruct",
        "output_dir": str(tmp_path.parent / "out"),
        "deepspeed": f"{tmp_path}/ds.json",
        "run_name": "ds.json",
    }
    words = {"resume_from_checkpoint": "auto", "deepspeed": "zero2"}
    write_yaml(tmp_path / "config.yaml", words)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == words


def test_a_finished_run_says_so_and_stays(train, capsys):
    run = train()
    before = (run / "adapter_model.safetensors").stat().st_mtime_ns
    capsys.readouterr()
    train()
    assert f"vlft merge {run}" in capsys.readouterr().out
    assert (run / "adapter_model.safetensors").stat().st_mtime_ns == before


def test_what_a_run_prints(train, capsys):
    run = train("--max_steps", "3")
    out = capsys.readouterr().out
    steps = re.findall(r"^step (\d)/3  loss \d+\.\d{4}  grad .*ETA \d:\d\d:\d\d$", out, re.M)
    assert steps == ["1", "3"], "the first and the last: the steps take less than a minute"
    assert "vision_frozen" in out
    assert re.search(
        r"; fused kernels: (off \(needs CUDA\)|RMSNorm on 5 modules, SwiGLU on 2, .*); gradient checkpointing: off",
        out,
        re.M,
    )
    assert out.rstrip().endswith(f"output: {run}\nmerge:  vlft merge {run} {run}-merged")


def test_metrics_hold_what_the_contract_names(train):
    line = lines(train("--logging_steps", "2", "--max_steps", "4"))[0]
    assert set(line) == {
        *("step", "epoch", "loss", "grad_norm", "lr", "tokens", "supervised_tokens", "images", "videos", "samples"),
        *("step_s", "data_wait_s", "tokens_per_s", "padding_fraction", "peak_gb", "mfu"),
        *("time", "save_s", "report_s", "max_steps"),
    }
    assert line["step"] == 2
    assert line["samples"] == 2
    assert line["data_wait_s"] > 0
    assert line["mfu"] is None


def test_mfu_is_required_work_over_the_peak(train, base, encoded, monkeypatch):
    """As on a card of 1 TFLOP/s."""
    from vlft.families import sizes_of
    from vlft.model import cards, flops
    from vlft.model.load import load_config
    from vlft.model.towers import Towers

    monkeypatch.setattr(cards, "peak_tflops", lambda name: 1.0)
    (line,) = lines(train(*split(1, 7), "--num_train_epochs", "1"))
    rows = list(encoded.values())
    work = flops.required_flops(
        sizes_of(load_config(base)[0]),
        Towers(vision="frozen", merger="frozen", language="lora", lora_rank=4, lora_alpha=64, lora_dropout=0.0),
        lengths=[len(row.input_ids_T) for row in rows],
        vision_lengths=[m.grid.h * m.grid.w for row in rows for m in row.media for _ in range(m.grid.t)],
        supervised=sum(int((row.labels_T != -100).sum()) for row in rows),
    )
    assert line["mfu"] == pytest.approx(flops.total(work) / 1e12 / line["step_s"], rel=1e-6)


def test_bf16_base_keeps_its_dtypes_in_the_final_weights(train, tmp_path):
    from vlft.demo.tiny import build_tiny

    base = build_tiny(tmp_path / "bf16", dtype="bfloat16", tied=False)
    run = train(*FULL, base=base)
    before, after = load_file(base / "model.safetensors"), weights(run)
    assert {n: t.dtype for n, t in before.items()} == {n: t.dtype for n, t in after.items()}


# ---- several processes, resuming and evaluating


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("towers", "strategy"),
    [
        pytest.param(FULL, (), id="full-ddp"),
        pytest.param(VISION_LORA, ZERO2, id="vision-lora-zero2", marks=pytest.mark.grid),  # test_deepspeed has zero3
        *TWO_PROCESSES[2:],
    ],
)
def test_two_processes_go_on_where_they_were_killed(base, mixed_json, media, tmp_path, towers, strategy):
    more = (*towers, *split(1, 1), *strategy, "--save_strategy", "steps", "--save_steps", "3")
    out = {}
    for name, kill in (("whole", None), ("killed", 6), ("killed", None)):
        argv = arguments(base, mixed_json, media, tmp_path / name, *more)
        for rank in vlft_process(argv, world=2, out=tmp_path, kill_in_step=kill):
            assert rank.status == (-9 if kill else 0), rank.output[-3000:]
        out[name] = tmp_path / name
    a, b = weights(out["killed"]), weights(out["whole"])
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in b)
    assert losses(out["killed"]) == pytest.approx(losses(out["whole"]), rel=1e-6)


@pytest.mark.distributed
def test_evaluation_loss_is_the_same_on_two_processes(train, base, mixed_json, media, tmp_path):
    more = ("--eval_path", str(mixed_json), "--eval_strategy", "epoch", "--report_tokens", "6", *split(1, 2))
    whole = train(*more, name="one")
    argv = arguments(base, mixed_json, media, tmp_path / "two", *more[:-1], "1")
    for rank in vlft_process(argv, world=2, out=tmp_path):
        assert rank.status == 0, rank.output[-3000:]
    found = [[line["eval_loss"] for line in lines(run) if "eval_loss" in line] for run in (whole, tmp_path / "two")]
    assert len(found[0]) == 2
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    # Rank 0 asks while the other rank waits.
    asked = [(run / "answers.jsonl").read_text() for run in (whole, tmp_path / "two")]
    assert asked[0] == asked[1]
    assert asked[0].count('"answers"') == 2


def test_only_the_newest_checkpoints_and_the_best_are_kept_and_the_best_comes_back(train, mixed_json):
    run = train(
        *("--eval_path", str(mixed_json), "--eval_strategy", "steps", "--eval_steps", "2", "--learning_rate", "0.3"),
        *("--save_strategy", "steps", "--save_steps", "2", "--save_total_limit", "2", "--max_steps", "8"),
        *("--load_best_model_at_end", "true", "--metric_for_best_model", "eval_loss", "--optim", "sgd"),
        *("--lr_scheduler_type", "constant"),
    )
    evaluated = {line["step"]: line["eval_loss"] for line in lines(run) if "eval_loss" in line}
    best = min(evaluated, key=evaluated.__getitem__)
    kept = sorted(int(p.name.split("-")[1]) for p in run.glob("checkpoint-*"))
    assert best in kept
    assert 8 in kept
    assert len(kept) <= 2
    a, b = weights(run), weights(run / f"checkpoint-{best}")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_bf16_trains_float32_masters_over_a_frozen_bf16_base(train, tmp_path, monkeypatch):
    from vlft.demo.tiny import build_tiny
    from vlft.train.trainer import VlftTrainer

    dtypes = set()
    real = VlftTrainer.create_optimizer

    def spy(self, model=None):
        dtypes.update((p.requires_grad, p.dtype) for p in self.model.parameters())
        return real(self, model)

    monkeypatch.setattr(VlftTrainer, "create_optimizer", spy)
    base = build_tiny(tmp_path / "bf16", dtype="bfloat16")
    run = train("--merger", "full", "--bf16", "true", base=base)
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    assert {t.dtype for t in weights(run).values()} == {torch.float32}
    reference = train("--merger", "full", base=base, name="float32")
    assert losses(run) == pytest.approx(losses(reference), rel=0.02)


def test_tensorboard_gets_the_same_numbers(train, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    run = train("--report_to", "tensorboard", "--max_steps", "3")
    events = EventAccumulator(str(tmp_path / "board"))
    events.Reload()
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses(run), rel=1e-6)
    assert "train/lr/language" in events.Tags()["scalars"]


def test_the_adapter_names_its_base_as_the_user_did(train, base, monkeypatch):
    monkeypatch.chdir(base.parent)
    run = train("--max_steps", "1", base=Path(base.name))
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"] == base.name


def test_a_run_of_one_step_is_not_all_warm_up(train, capsys):
    run = train("--max_steps", "1", "--warmup_steps", "0.03")
    assert lines(run)[0]["lr"]["language"] == 1e-3
    assert all(tensor.any() for name, tensor in weights(run).items() if "lora_B" in name)
    assert "the whole run has few optimizer steps: 1." in capsys.readouterr().out


def test_a_run_that_is_all_warm_up_says_so(train, capsys):
    train("--max_steps", "2", "--warmup_steps", "5")
    assert "all 2 steps are warm-up" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        # Towers that do not train have no rate.
        (("--learning_rate", "0.5"), "its learning rates are language 0.001, this run's are language 0.5."),
        (("--weight_decay", "0.3"), "its weight decay is 0.0, this run's is 0.3."),
        (("--optim", "sgd"), "its optim is adamw_torch_fused, this run's is sgd."),
        (("--box_format", "pixels"), "its box format is as_is, this run's is pixels."),
        (("--missing_tags", "first"), "its missing_tags is error, this run's is first."),
        (("--merger", "full"), "its towers are merger frozen, this run's are merger full."),
        (("--packing", "true"), "its packing is none, this run's is tokens 16384, patches 65536."),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_checkpoint_is_not_resumed_at_other_rates(train, base, mixed_json, media, tmp_path, capsys, more, said):
    """The optimizer's state would silently restore the old rates."""
    train("--max_steps", "1")
    assert main([*arguments(base, mixed_json, media, tmp_path / "run", "--max_steps", "1"), *more]) == 1
    assert f"belongs to another run: {said}" in capsys.readouterr().err


def test_every_trained_step_is_in_the_metrics_whatever_the_interval(train):
    run = train("--logging_steps", "3", "--save_strategy", "steps", "--save_steps", "5")
    assert sum(line["samples"] for line in lines(run)) == 14
    assert lines(run)[-1]["step"] == 14


@pytest.mark.distributed
def test_deepspeed_in_one_process_needs_no_launcher(base, mixed_json, media, tmp_path):
    argv = arguments(base, mixed_json, media, tmp_path / "run", "--max_steps", "1", "--deepspeed", "zero2")
    (done,) = vlft_process(argv, out=tmp_path)
    assert done.status == 0, done.output[-3000:]
