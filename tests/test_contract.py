"""The contract: the JSON of each verb, the files of a run folder, the keys of vlft.json and metrics.jsonl.

Other programs read these. A key may be added here, but no key may be removed or change its type. `test_bench` tests
`vlft bench`.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest
from conftest import HAS_VIDEOS, row
from runs import arguments

from vlft.cli.main import main


def lost(frozen, found, at: str = "") -> list[str]:
    """Return the keys of a frozen shape that a JSON value lacks, or has with another type.

    A frozen shape is a type, a tuple of types, a list of one shape for every entry, or a mapping of key -> shape.
    """
    if isinstance(frozen, dict):
        if not isinstance(found, dict):
            return [f"{at}: no mapping"]
        every = [(one, found.get(key, KeyError), f"{at}.{key}") for key, one in frozen.items()]
        return [fault for one in every for fault in lost(*one)]
    if isinstance(frozen, list):
        if not isinstance(found, list):
            return [f"{at}: no list"]
        return [fault for i, one in enumerate(found) for fault in lost(frozen[0], one, f"{at}[{i}]")]
    return [] if isinstance(found, frozen) else [f"{at}: {found!r} is no {frozen}"]


NUMBER, NULL, INTS, FLOATS = (int, float), type(None), [int], [(int, float)]
REASON = {"field": str, "reason": str}
TOWERS = ("vision", "merger", "language")
BAD = {"file": str, "index": int, "id": (str, NULL), **REASON}
CHECK_DATA = {"rows": int, "ok": int, "bad": [BAD], "warnings": [BAD]}
PREVIEW = {
    **{"id": str, "input_ids": INTS, "labels": INTS, "position_ids": [INTS], "text": str},
    **{"image_grid_thw": [INTS], "video_grid_thw": [INTS]},
}
PLAN = {
    "groups": [{"name": str, "parameters": int, "trainable": bool, "lr": (float, NULL)}],
    **{"rows": int, "steps_per_epoch": int, "tokens": int, "packs": int},
}
MERGE = {"dtype": str, "towers": dict.fromkeys(TOWERS, str), "max_logit_diff": float, "tensors": int, "out": str}
RECORD = {
    **{"format": int, "kind": str, "base_model": str, "base_revision": (str, NULL), "base_fingerprint": str},
    **{"model_type": str, "towers": dict.fromkeys(TOWERS, str), "versions": {"vlft": str, "transformers": str}},
    "media": {
        **dict.fromkeys(("image_min_pixels", "image_max_pixels", "video_min_pixels", "video_max_pixels"), int),
        **{"fps": NUMBER, "nframes": (int, NULL), "video_max_frames": int},
    },
    "data": [{"file": str, "rows": int, "trained": int, "skipped": [{"index": int, "id": (str, NULL), **REASON}]}],
}
METRICS = {
    **dict.fromkeys(("step", "tokens", "supervised_tokens", "images", "samples"), int),
    **dict.fromkeys(("epoch", "loss", "grad_norm", "step_s", "data_wait_s"), NUMBER),
    **dict.fromkeys(("tokens_per_s", "padding_fraction", "peak_gb"), NUMBER),
    **{"lr": {"language": float}, "mfu": (float, NULL)},
}
PROCESSOR = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "vlft.json")
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
#: The first line of answers.jsonl: the rows that the model answers. The lines after it hold the answers.
TURN = {"role": str, "text": str}
ANSWERS = {"step": int, "rows": [{"file": str, "index": int, "id": (str, NULL), "right": str, "turns": [TURN]}]}


def document(*argv: object, status: int = 0):
    """Return the document that a verb prints with --json, which must be all of stdout."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        assert main([*map(str, argv), "--json"]) == status, err.getvalue()
    return json.loads(out.getvalue())


@pytest.fixture(scope="module")
def run(tmp_path_factory, base, mixed_json, media) -> Path:
    """A finished LoRA run of three steps with a checkpoint and an evaluation."""
    out = tmp_path_factory.mktemp("contract") / "run"
    more = ["--max_steps", "3", "--save_strategy", "steps", "--save_steps", "2"]
    more += ["--eval_path", str(mixed_json), "--eval_strategy", "steps", "--eval_steps", "2"]
    assert main(arguments(base, mixed_json, media, out, *more)) == 0
    return out


@pytest.fixture
def where(base, media) -> list:
    return ["--model_id", base, "--image_folder", media]


def test_the_walk_sees_what_is_lost():
    frozen = {"a": int, "b": [{"c": (str, NULL)}]}
    assert lost(frozen, {"a": 1, "b": [{"c": None, "more": 1}, {"c": "x"}], "new": 2}) == []
    assert lost(frozen, {"a": "1", "b": [{"c": "x"}, {}]}) == [
        f".a: '1' is no {int}",
        f".b[1].c: {KeyError} is no {(str, NULL)}",
    ]


def test_check_data(where, tmp_path):
    data = tmp_path / "bad.json"
    missing = row("It is.", "<image>What?", image="missing.jpg", id="x")
    data.write_text(json.dumps([missing, {**row("Hello.", "Hi."), "audios": []}, {**row("Hello.", "Hi."), "odd": 1}]))
    found = document("check-data", data, *where, "--workers", 0, status=1)
    assert lost(CHECK_DATA, found) == []
    assert (found["rows"], len(found["bad"])) == (3, 1)


def test_preview(where, mixed_json):
    one = document("preview", mixed_json, *where, "--index", 2 * HAS_VIDEOS)
    assert lost(PREVIEW, one) == []
    assert len(one["input_ids"]) == len(one["labels"]) == len(one["position_ids"][2])
    several = document("preview", mixed_json, *where, "--index", "0,1")
    assert lost({"rows": [PREVIEW]}, several) == []
    assert len(several["rows"]) == 2


def test_plan(where, mixed_json):
    found = document("plan", "--data_path", mixed_json, *where)
    assert lost(PLAN, found) == []
    assert {group["name"] for group in found["groups"]} >= {"language", "vision_frozen"}


def test_merge(run, tmp_path):
    found = document("merge", run / "checkpoint-2", tmp_path / "merged")
    assert lost(MERGE, found) == []
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert files >= {"model.safetensors", "config.json", *PROCESSOR}


def test_a_run_folder(run):
    for folder in (run, run / "checkpoint-2"):
        assert {file.name for file in folder.iterdir()} >= {*PROCESSOR, *ADAPTER}
        assert lost(RECORD, json.loads((folder / "vlft.json").read_text())) == []
    assert {file.name for file in run.iterdir()} >= {
        *("config.yaml", "metrics.jsonl", "answers.jsonl", "report.html"),
        *("checkpoint-2", "checkpoint-3"),
    }
    assert {file.name for file in (run / "checkpoint-2").iterdir()} >= {"optimizer.pt", "trainer_state.json"}


def test_lines_of_a_run(run):
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained, evaluated = ([line for line in every if key in line] for key in ("loss", "eval_loss"))
    assert len(trained) == 3
    assert lost([METRICS], trained) == []
    assert evaluated
    assert not [line for line in evaluated if "loss" in line]
    assert lost([{"step": int, "epoch": NUMBER, "eval_loss": float}], evaluated) == []
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert answers
    assert lost(ANSWERS, answers[0]) == []
