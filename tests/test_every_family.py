"""The same rows through every verb, for each model family: checked, planned, trained, merged, asked."""

from __future__ import annotations

import json

import pytest
import torch
from runs import FULL, PACKED, VISION_LORA, arguments, losses, weights

from vlft.cli.main import main
from vlft.families import FAMILIES, QWEN2_VL

NEW = [family for family in FAMILIES.values() if family is not QWEN2_VL]


def said(capsys, *argv: object) -> dict:
    """The JSON that a verb prints."""
    capsys.readouterr()
    assert main([str(word) for word in (*argv, "--json")]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", NEW, ids=lambda family: family.model_type)
def test_from_rows_to_an_answer(family, base_of, mixed_json, media, tmp_path, capsys):
    base, run, merged = base_of(family), tmp_path / "run", tmp_path / "merged"
    data = (mixed_json, "--image_folder", media, "--model_id", base)

    checked = said(capsys, "check-data", *data)
    assert (checked["ok"], checked["bad"]) == (7, [])
    found = said(capsys, "preview", *data, "--index", "0-6")["rows"]
    plan = said(capsys, "plan", "--data_path", *data, *VISION_LORA, *PACKED)
    assert plan["rows"] == 7
    assert plan["tokens"] == sum(len(row["input_ids"]) for row in found if "samples" not in row) + sum(
        len(sample["input_ids"]) for row in found for sample in row.get("samples", ())
    )

    assert main(arguments(base, mixed_json, media, run, *VISION_LORA, *PACKED)) == 0
    assert losses(run)[-1] < losses(run)[0]
    result = said(capsys, "merge", run, merged)
    assert result["max_logit_diff"] < 1e-3
    before, after = weights(base), weights(merged)
    assert {name: (t.shape, t.dtype) for name, t in after.items()} == {
        name: (t.shape, t.dtype) for name, t in before.items()
    }
    assert main(["report", str(run)]) == 0

    capsys.readouterr()
    asked = ("What is it?", "--image", media / "china.jpg", "--max_new_tokens", "4")
    for model in (run, merged):
        assert main(["chat", str(model), *map(str, asked)]) == 0
    one, other = capsys.readouterr().out.splitlines()[-2:]
    assert one == other


@pytest.mark.parametrize("family", [f for f in NEW if "experts" not in f.features], ids=lambda f: f.model_type)
def test_a_full_run_is_a_model_of_plain_transformers(family, base_of, mixed_json, media, tmp_path):
    import transformers

    base, run = base_of(family), tmp_path / "run"
    assert main(arguments(base, mixed_json, media, run, *FULL, *PACKED, "--num_train_epochs", "1")) == 0
    before, after = weights(base), weights(run)
    assert set(before) == set(after)
    same = [name for name in before if torch.equal(before[name], after[name])]
    assert same == [], "every parameter trains"
    _, info = getattr(transformers, family.model_class).from_pretrained(run, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
