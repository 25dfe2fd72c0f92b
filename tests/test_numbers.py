"""The dtypes of a run, the cards that it accepts, and how long its processes wait for each other."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from vlft.cli.main import main
from vlft.config.checks import REPORTING
from vlft.config.device import has_bf16, without_bf16
from vlft.config.machine import check_device, remark_on_numbers
from vlft.config.training import TrainFlags
from vlft.errors import ConfigError

SAID = "--fp16 true is not supported: Qwen's models are trained in bf16, and their activations overflow float16"


@pytest.fixture
def card(monkeypatch):
    """Makes torch see one card of a name and a compute capability; emulated bf16 works on all of them."""

    def seen(name: str, major: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: name)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
        monkeypatch.setattr(torch.cuda, "_check_bf16_tensor_supported", lambda device: True)
        monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # it would initialise the device
        monkeypatch.setattr(TrainFlags, "n_gpu", 1)

    return seen


def checked(args: TrainFlags) -> None:
    check_device(args, "auto")


@pytest.mark.parametrize(("name", "major", "bf16"), [("Tesla T4", 7, False), ("NVIDIA A10G", 8, True)])
def test_bf16_by_default_only_where_the_card_has_it(card, tmp_path, name, major, bf16):
    card(name, major)
    assert has_bf16() == bf16
    args = TrainFlags(output_dir=str(tmp_path))
    assert (args.bf16, args.half) == (bf16, torch.bfloat16 if bf16 else None)
    checked(args)
    remark = remark_on_numbers(args)
    assert remark is None if bf16 else remark.startswith("Tesla T4 has no bf16, so this run computes in float32")


def test_emulated_bf16_is_refused_by_the_name_of_the_card(card, tmp_path):
    card("Tesla V100-SXM2-32GB", 7)
    args = TrainFlags(output_dir=str(tmp_path), bf16=True)
    with pytest.raises(ConfigError, match=r"--bf16 true: Tesla V100-SXM2-32GB has no bf16 .* set --bf16 false"):
        checked(args)
    check_device(args, "auto", launched=False)  # a plan for another machine
    card("NVIDIA A10G", 8)
    checked(args)


def test_without_a_gpu_nothing_is_remarked(tmp_path):
    args = TrainFlags(output_dir=str(tmp_path), bf16=False)
    assert not has_bf16()
    assert without_bf16() is None
    assert remark_on_numbers(args) is None


@pytest.mark.parametrize("verb", ["train", "plan"])
def test_fp16_is_refused(capsys, base, mixed_json, media, tmp_path, verb):
    argv = [verb, "--model_id", base, "--data_path", mixed_json, "--image_folder", media, "--fp16", "true"]
    assert main([*map(str, argv), *(["--output_dir", str(tmp_path / "run")] if verb == "train" else [])]) == 1
    assert SAID in capsys.readouterr().err


@pytest.mark.parametrize(("stall", "wait"), [(1800, 7500), (900, 3900), (60, 1800), (0, 1800)])
def test_torch_waits_longer_than_a_report_takes_to_come(tmp_path, stall, wait):
    """Also while a checkpoint is saved, which may take longer."""
    args = TrainFlags(output_dir=str(tmp_path), stall_timeout=stall)
    assert args.ddp_timeout == wait
    assert args.ddp_timeout_delta.total_seconds() == wait
    assert stall * args.saving_patience + REPORTING <= wait
    assert args.saving_patience == 4
    checked(args)


def test_a_wait_that_is_given(tmp_path, capsys):
    args = TrainFlags(output_dir=str(tmp_path), stall_timeout=1800, ddp_timeout=3600)
    assert 1 < args.saving_patience < 2  # the report is printed before torch ends the run
    argv = ["plan", "--model_id", "some/base", "--data_path", __file__, "--ddp_timeout", "1800"]
    assert main(argv) == 1
    said = capsys.readouterr().err
    assert "--ddp_timeout 1800 would end" in said
    assert "--stall_timeout 1800 can report which one. Set it to at least 2100" in said
    assert main([*argv, "--stall_timeout", "0", "--ddp_timeout", "0"]) == 1
    assert "would end" not in capsys.readouterr().err
