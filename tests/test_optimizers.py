"""Every name of `--optim`: each group has its own rate, a resumed run ends the same, and plan knows the bytes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from runs import FULL, weights
from transformers.training_args import OptimizerNames

from vlft.cli.main import main
from vlft.config.kinds import missing
from vlft.config.table import OPTIM
from vlft.plan.estimate import ParameterBytes
from vlft.plan.optimizers import Trained, state_bytes
from vlft.train.trainer import VlftTrainer

#: `--optim`, with `--optim_args` after a colon, where they change the state.
OFTEN = ("adafactor", "adamw_8bit")  # on every run of the tests
ARGUMENTS = {"sgd": ("momentum=0.9",), "rmsprop": ("momentum=0.9", "centered=true"), "ademamix": ("t_alpha=10",)}
CASES = [
    f"{name}:{more}" for name in OPTIM.words if name not in OPTIM.refused for more in ("", *ARGUMENTS.get(name, ()))
]


def test_the_names_are_those_of_transformers():
    assert sorted(OPTIM.words) == sorted(one.value for one in OptimizerNames)


@pytest.fixture
def data(tmp_path):
    turns = [{"from": "human", "value": "Which one?"}, {"from": "gpt", "value": "This one."}]
    path = tmp_path / "text.json"
    path.write_text(json.dumps([{"conversations": turns} for _ in range(4)]))
    return path


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case.strip(":") in OFTEN else pytest.mark.grid) for case in CASES]
)
def test_it_resumes_to_the_same_weights_and_its_bytes_are_known(case, base, data, tmp_path, monkeypatch):
    optim, _, arguments = case.partition(":")
    if lacking := missing(OPTIM.needs.get(optim, ())):
        pytest.skip(lacking)
    live: list[VlftTrainer] = []
    monkeypatch.setattr(VlftTrainer, "before_loss", (lambda trainer, _: live.append(trainer),))
    argv = ["train", "--model_id", base, "--data_path", data, *FULL, "--max_steps", 2, "--save_strategy", "steps"]
    argv += ["--save_steps", 1, "--packing", "false", "--per_device_train_batch_size", 2, "--dataloader_num_workers", 0]
    argv += ["--optim", optim, "--vision_lr", "2e-3", "--learning_rate", "1e-3", "--weight_decay", "0.1"]
    argv += ["--lr_scheduler_type", "constant", *(["--optim_args", arguments] if arguments else [])]
    whole, again = tmp_path / "whole", tmp_path / "again"

    def train(out) -> None:
        assert main([*map(str, argv), "--output_dir", str(out)]) == 0
        groups = {g["name"]: (round(float(g["lr"]), 9), g["weight_decay"]) for g in live[-1].optimizer.param_groups}
        assert groups["vision"] == (2e-3, 0.1)
        assert groups["language"] == (1e-3, 0.1)
        assert groups["language_no_decay"] == (1e-3, 0)

    train(whole)
    tensors = ParameterBytes.of(live[-1].model).tensors
    assert _bytes(live[-1].optimizer) == state_bytes(optim, tensors, arguments)
    moved, start = weights(whole), weights(base)
    assert any(not torch.equal(moved[name], start[name]) for name in moved)
    # The second run finds the first one after its first step.
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoint-2")
    for file in again.glob("*.safetensors"):
        file.unlink()
    record = json.loads((again / "vlft.json").read_text())
    record["training"]["finished"] = False
    (again / "vlft.json").write_text(json.dumps(record))
    train(again)
    resumed = weights(again)
    assert {name for name in moved if not torch.equal(moved[name], resumed[name])} == set()


def _bytes(optimizer) -> int:
    """Bytes of all tensors of the state; shared tensors count once, and torchao's consist of several."""
    found = {}
    for state in optimizer.state.values():
        for value in filter(torch.is_tensor, state.values()):
            inner = [getattr(value, name) for name in value.__tensor_flatten__()[0]] if _wraps(value) else [value]
            found |= {id(one) if one.numel() == 0 else one.data_ptr(): one.nbytes for one in inner}
    return sum(found.values())


def _wraps(value: torch.Tensor) -> bool:
    return hasattr(value, "__tensor_flatten__")


def test_embeddings_keep_32_bits_as_in_transformers_and_nothing_outlives_the_run(base, data, tmp_path, monkeypatch):
    import bitsandbytes

    kept = bitsandbytes.optim.GlobalOptimManager.get_instance()
    before = len(kept.module_weight_config_triple), len(kept.pid2config)
    live: list[VlftTrainer] = []
    monkeypatch.setattr(VlftTrainer, "before_loss", (lambda trainer, _: live.append(trainer),))
    argv = ["train", "--model_id", base, "--data_path", data, *FULL, "--max_steps", 1, "--save_strategy", "no"]
    argv += ["--optim", "lion_8bit", "--output_dir", tmp_path / "run", "--dataloader_num_workers", 0]
    assert main(list(map(str, argv))) == 0
    embedding = live[-1].model.get_input_embeddings().weight
    optimizer = live[-1].optimizer
    assert embedding.numel() >= 4096
    assert optimizer.state[embedding]["state1"].dtype == torch.float32
    others = [one for one in optimizer.state if one is not embedding and one.numel() >= 4096]
    assert {optimizer.state[one]["state1"].dtype for one in others} == {torch.uint8}
    assert (len(kept.module_weight_config_triple), len(kept.pid2config)) == before


@pytest.mark.parametrize(
    ("optim", "bytes_per_weight"),
    [("adamw_torch", 8), ("adamw_8bit", 2 + 8 / 256), ("lion_8bit", 1 + 4 / 256), ("ademamix_8bit", 3 + 12 / 256),
     ("adamw_torch_4bit", 1 + 8 / 256), ("adamw_torch_8bit", 2 + 8 / 256), ("adafactor", 2 * 4 / 4096)],
)  # fmt: skip
def test_bytes_of_a_large_matrix(optim, bytes_per_weight):
    one = Trained(shape=(4096, 4096))
    assert state_bytes(optim, {one: 3}) / (3 * one.size) == pytest.approx(bytes_per_weight, rel=1e-3)


def test_a_bit_more_or_less_than_a_block():
    """Against a live optimizer: the smallest quantised tensor, the largest that is not, and parts of a block."""
    import bitsandbytes

    for size in (4095, 4096, 4097, 5000):
        weight = torch.nn.Parameter(torch.zeros(size))
        weight.grad = torch.ones(size)
        optimizer = bitsandbytes.optim.AdamW([weight], optim_bits=8)
        optimizer.step()
        assert _bytes(optimizer) == state_bytes("adamw_8bit", {Trained(shape=(size,)): 1}), size
