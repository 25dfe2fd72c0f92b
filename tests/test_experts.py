"""What the log of a run says about experts: where they make the host wait."""

from __future__ import annotations

import pytest
import torch

from vlft.demo.tiny import tiny_config, tiny_processor
from vlft.families import FAMILIES
from vlft.model import experts
from vlft.model.load import empty_model

CPU, CUDA, BF16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
WAITS = "which waits for the device in each layer"


@pytest.fixture(scope="module")
def model():
    family = FAMILIES["qwen3_vl_moe"]
    return empty_model(tiny_config(tiny_processor(family), family), family)


@pytest.mark.parametrize(
    ("name", "dtype", "device", "generation", "said"),
    [
        ("grouped_mm", BF16, CUDA, 9, "grouped_mm"),
        ("grouped_mm", BF16, CUDA, 10, "grouped_mm"),
        ("grouped_mm", BF16, CUDA, 8, f"grouped_mm, {WAITS}: torch has no kernel for GPUs of generation 8"),
        ("grouped_mm", BF16, CUDA, 12, f"grouped_mm, {WAITS}: torch has no kernel for GPUs of generation 12"),
        (
            "grouped_mm", torch.float32, CUDA, 9,
            f"grouped_mm, {WAITS}: its weights are in float32, and torch has a kernel only for bf16",
        ),
        ("eager", BF16, CUDA, 9, f"eager, {WAITS}: it reads which experts are used"),
        ("grouped_mm", torch.float32, CPU, 0, "grouped_mm"),
    ],
)  # fmt: skip
def test_the_log_says_where_experts_wait(monkeypatch, model, name, dtype, device, generation, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    model.to(dtype).set_experts_implementation(name)
    assert experts.described(model, device) == said
