"""Runs of `vlft train` on the tiny base: command lines, and what is left on disk. The fixture `train` runs one."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlft.train.folder import RunFolder


def arguments(base, mixed_json, media, out, *more: str) -> list[str]:
    """A quick run of 2 epochs, unpacked, and without dropout so that runs can be compared.

    An evaluation also asks rows for answers (`--report_rows`): two tokens each, which takes most of its time.
    """
    towers = more[1:6:2] if more[4:5] == ("--language",) else ("lora",)
    lora = ("--lora_dropout", "0", "--lora_rank", "4") if "lora" in towers else ()
    return [
        "train",
        *("--model_id", str(base), "--data_path", str(mixed_json), "--image_folder", str(media)),
        *("--output_dir", str(out), "--num_train_epochs", "2", "--learning_rate", "1e-3"),
        *(*lora, "--dataloader_num_workers", "0", "--save_strategy", "no", "--packing", "false"),
        *("--report_tokens", "2"),
        *more,
    ]


FULL = ("--vision", "full", "--merger", "full", "--language", "full")

VISION_LORA = ("--vision", "lora", "--merger", "lora", "--language", "lora")

STRATEGIES = [
    pytest.param((), id="ddp"),
    pytest.param(("--deepspeed", "zero2"), id="zero2"),
]

ZERO2 = ("--deepspeed", "zero2")


def lines(run: Path) -> list[dict]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run) if "loss" in line]


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = list(run.glob("*.safetensors"))
    assert len(files) == 1
    return load_file(files[0])


def assert_same(one: Path, other: Path, tolerance: float = 1e-4) -> None:
    a, b = weights(one), weights(other)
    assert set(a) == set(b)
    for name in a:
        assert (a[name] - b[name]).abs().max() <= tolerance * max(1.0, float(b[name].abs().max())), name
    assert losses(one) == pytest.approx(losses(other), rel=tolerance, abs=tolerance)


@contextlib.contextmanager
def killed_after_a_checkpoint() -> Iterator[None]:
    """A run in this process ends as soon as its first checkpoint is complete."""
    commit = RunFolder.commit_checkpoint

    def once(folder, name, skipped):
        commit(folder, name, skipped)
        raise KeyError("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunFolder, "commit_checkpoint", once)
        with pytest.raises(KeyError, match="killed"):
            yield


def split(batch: int, accumulation: int) -> tuple[str, ...]:
    return ("--per_device_train_batch_size", str(batch), "--gradient_accumulation_steps", str(accumulation))


#: The seven rows of text, pictures and videos make three packs.
PACKED = ("--packing", "true", "--pack_tokens", "400")


def record_of(
    folder: Path,
    *,
    steps: int,
    of: int,
    finished: bool = False,
    config: str = "seed: 42\n",
    loss: float = 2.0,
    **training,
) -> Path:
    """Write a run folder without training: record, config and one line for each step. A folder is written again."""
    from vlft.checkpoint import RunRecord, write_record
    from vlft.checkpoint.record import MEDIA_KEYS

    folder.mkdir(exist_ok=True)
    record = RunRecord(
        kind="adapter",
        base_model="base",
        base_revision=None,
        base_fingerprint="0123",
        model_type="qwen2_vl",
        towers={"vision": "frozen", "merger": "frozen", "language": "lora"},
        lora={"rank": 4, "alpha": 8, "dropout": 0.0, "target": "all"},
        media=dict.fromkeys(MEDIA_KEYS, 4),
        versions={"vlft": "1"},
        training={"finished": finished, "seed": 42, **training},
        data=[{"file": "train.json", "rows": 1, "trained": 1, "skipped": []}],
    )
    write_record(folder, record)
    (folder / "config.yaml").write_text(config)
    now = time.time()
    logged = (
        {"step": step, "loss": loss / step, "tokens": 100, "tokens_per_s": 50.0, "step_s": 2.0, "max_steps": of,
         "time": now - 2 * (steps - step), "lr": {"language": 1e-4}}
        for step in range(1, steps + 1)
    )  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logged))
    return folder
