"""`vlft plan` of preference rows: their parts, the reference, memory and hours. The rows are those of the guide."""

from __future__ import annotations

import json

import numpy as np
import pytest
from pairs import collator_of, encoder_of
from plans import plan, plan_and_text

from vlft.cli.main import main
from vlft.config.row_flags import RowFlags
from vlft.data.costs.columns import Costs
from vlft.data.rows.records import parse_record
from vlft.demo.pairs import write_pairs
from vlft.families import FAMILIES
from vlft.setup.pairs import segments_of

ROWS = 10


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A file of preference rows; the first one has three answers."""
    file = write_pairs(tmp_path_factory.mktemp("pairs"), "train", ROWS)
    rows = json.loads(file.read_text())
    rows[0]["rejected"] = [rows[0]["rejected"], "red."]
    file.write_text(json.dumps(rows))
    return file


@pytest.fixture(scope="module")
def flags(base_of, pairs):
    base = base_of(FAMILIES["qwen2_vl"])
    return ["--method", "dpo", "--model_id", base, "--data_path", pairs, "--dataloader_num_workers", 0]


def encoded_rows(base, family, file):
    encoder = encoder_of(base, family)
    rows = [
        parse_record(raw, file="t", index=i, image_folder=str(file.parent), family=family, flags=RowFlags(pairs=True))
        for i, raw in enumerate(json.loads(file.read_text()))
    ]
    return encoder, rows


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen3_5"])
def test_segments_are_those_of_a_batch(base_of, pairs, model_type):
    """Also after the columns of costs, with rows of two and of three answers and a plain one."""
    family = FAMILIES[model_type]
    encoder, rows = encoded_rows(base_of(family), family, pairs)
    costs = Costs.of([encoder.measure(row) for row in rows])
    batch = collator_of(encoder)([encoder.encode(row) for row in rows])
    segments = [segment for cost in costs for segment in segments_of(cost)]
    assert tuple(queries for queries, _ in segments) == batch["lengths"]
    keys = batch["branches"]["key_lengths"] if "branches" in batch else batch["lengths"]
    assert tuple(keys_of for _, keys_of in segments) == keys
    assert costs.take(np.array([3, 0]))[1].branches == costs[0].branches == encoder.encode(rows[0]).branches
    assert len(costs[0].branches) == 4
    assert len(costs[1].branches) == 3


def test_what_a_person_reads(capsys, base_of, flags, pairs):
    family = FAMILIES["qwen2_vl"]
    encoder, rows = encoded_rows(base_of(family), family, pairs)
    parts = [encoder.encode(row).branches for row in rows]
    found, text = plan_and_text(capsys, *flags, "--eval_path", pairs, "--eval_strategy", "epoch")
    counts = found["pairs"]
    assert (counts["rows"], counts["answers"]) == (ROWS, 2 * ROWS + 1)
    assert counts["prompt_tokens"] == sum(part[0] for part in parts)
    assert counts["chosen_tokens"] == sum(part[1] for part in parts)
    assert counts["rejected_tokens"] == sum(sum(part[2:]) for part in parts)
    assert found["tokens"] == sum(map(sum, parts))
    assert f"pairs: {ROWS} rows with {2 * ROWS + 1} answers; tokens of prompts {counts['prompt_tokens']:,} " in text
    added = f"{2 * counts['reference_share']:.2f} epochs"
    assert f"reference: one pass without gradients over {2 * ROWS} rows before the first step, which takes as" in text
    assert added in text
    assert "note: --learning_rate 5e-06 is the default of --method dpo" in text
    assert found["groups"][2]["lr"] == 5e-6
    assert found["epochs"] == 1


def test_the_reference_is_a_third_of_a_full_training(capsys, flags):
    full = ["--vision", "full", "--merger", "full", "--language", "full"]
    assert plan(capsys, *flags, *full)["pairs"]["reference_share"] == pytest.approx(1 / 3, abs=0.02)
    _, text = plan_and_text(capsys, *flags, "--reference", "live", "--learning_rate", "1e-4")
    assert "reference: live, in each step: " in text
    assert "is the default of --method" not in text
    for argv in (["--reference", "none"], ["--method", "simpo"]):
        assert "reference: " not in plan_and_text(capsys, *flags, *argv)[1]
    assert plan(capsys, *flags[2:], "--data_path", "data/demo.json", "--image_folder", "data/media")["pairs"] is None


def test_memory_and_hours_are_those_of_a_real_step(capsys, flags):
    argv = [*flags, "--vision", "lora", "--merger", "lora", "--measure", "--gradient_checkpointing", "false"]
    found = plan(capsys, *argv)
    memory, share = found["memory"], found["pairs"]["reference_share"]
    real, told = memory["measured"], memory["measured_estimate"]
    for part in ("vision", "merger", "language"):
        assert told[part] == pytest.approx(real[part], rel=0.1, abs=10_000), part
    assert memory["language"] == pytest.approx(real["language"], rel=0.1, abs=10_000), "of the largest micro-batch"
    assert memory["micro_batch"]["tokens"] == real["tokens"] == found["tokens"]
    assert memory["hours"] == pytest.approx((1 + share) * real["tokens"] / real["tokens_per_s"] / 3600, rel=1e-6)


def test_hours_on_a_card(capsys, flags):
    found, text = plan_and_text(capsys, *flags, "--gpu", "h100")
    memory, share = found["memory"], found["pairs"]["reference_share"]
    assert memory["hours"] == pytest.approx((1 + share) * found["tokens"] / memory["tokens_per_s"] / 3600, rel=1e-6)
    assert memory["rate"] == "predicted"
    assert " of steps and reference at " in text


def test_bench_trains_on_answers_to_learn(capsys, flags):
    assert main(["bench", "train", *map(str, flags)]) == 1
    assert "--method dpo: vlft bench train compares with a stock trainer" in capsys.readouterr().err
