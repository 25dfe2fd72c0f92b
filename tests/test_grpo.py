"""Runs of `vlft train --method grpo` from the command line to the files they leave. They need TRL."""

from __future__ import annotations

import importlib.util
import json
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from PIL import Image
from runs import killed_after_a_checkpoint, lines, weights
from safetensors.torch import load_file

from vlft.cli.main import main
from vlft.train.grpo.start import INSTALL, PACKAGES

if any(importlib.util.find_spec(name) is None for name in PACKAGES):
    pytest.skip(f"TRL is not installed: {INSTALL}", allow_module_level=True)

from trl import GRPOTrainer

from vlft.data.order import RowOrder
from vlft.demo.build_base import STORED
from vlft.families import QWEN3_5
from vlft.train.grpo.stock import PromptSampler
from vlft.train.grpo.trainer import GrpoTrainer


def row(name: str, question: str, answer: str, *pictures: str) -> dict:
    asked = {"from": "human", "value": "<image>" * len(pictures) + question}
    media = {"image": list(pictures)} if pictures else {}
    return {"id": name, **media, "conversations": [asked, {"from": "gpt", "value": answer}]}


#: Five rows: one picture, two, text alone, and a conversation of two questions.
ROWS = [
    row("one", "What is it?", "A temple.", "china.jpg"),
    row("two", "Compare.", "A flower and a cup.", "flower.jpg", "coffee.jpg"),
    row("text", "2+2?", "4"),
    {
        "id": "turns",
        "image": ["astronaut.jpg"],
        "conversations": [
            {"from": "human", "value": "<image>Who?"},
            {"from": "gpt", "value": "An astronaut."},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes."},
        ],
    },
    row("last", "And this?", "A cup.", "coffee.jpg"),
]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(ROWS))
    return path


@pytest.fixture
def words(base, rows, media, tmp_path):
    """The words of a quick run: language LoRA, two prompts a step, two completions of up to 6 tokens of a prompt."""

    def of(*more: str, name: str = "run", **changed: str) -> list[str]:
        flags = {
            "method": "grpo", "reward": "edit_ratio", "model_id": str(base), "data_path": str(rows),
            "image_folder": str(media), "output_dir": str(tmp_path / name), "num_generations": "2",
            "global_batch": "2", "max_completion_length": "6", "learning_rate": "1e-2", "lora_rank": "4",
            "save_strategy": "no",
        } | changed  # fmt: skip
        return ["train", *(word for flag, value in flags.items() for word in (f"--{flag}", value)), *more]

    return of


def test_a_run_trains_what_was_asked_and_merges(words, base, rows, media, tmp_path, capsys):
    towers = ("--vision", "lora", "--merger", "full", "--language", "lora", "--vision_lr", "5e-3", "--merger_lr", "0")
    assert main(words(*towers, reward=r"format:(?s).*[aeiou].*", lr_scheduler_type="constant")) == 0
    out, run = capsys.readouterr().out, tmp_path / "run"
    assert "rewards of the own answers of 5 rows: format 0.8" in out
    logged = lines(run)
    assert [line["step"] for line in logged] == [1, 2, 3]  # 5 rows, 2 a step
    for line in logged:
        assert line["lr"] == {"vision": 5e-3, "merger": 0.0, "merger_no_decay": 0.0, "language": 1e-2}
        assert line["samples"] == 4
        assert 0 <= line["reward"] == line["rewards/format/mean"] <= 1
        assert 0 < line["completions/mean_length"] <= 6
        assert line["supervised_tokens"] == 4 * line["completions/mean_length"]
        assert line["kl"] is None
    record = json.loads((run / "vlft.json").read_text())
    assert record["training"]["method"] == "grpo"
    assert record["training"]["grpo"]["num_generations"] == 2
    assert record["versions"]["trl"] == version("trl")
    flags = ["--method", "grpo", "--model_id", str(base), "--image_folder", str(media), "--index", "0-4", "--json"]
    assert main(["preview", str(rows), *flags]) == 0
    prompts = [len(one["input_ids"]) for one in json.loads(capsys.readouterr().out)["rows"]]
    assert record["training"]["lengths"] == {"asked": None, "longest": max(prompts) + 6}
    assert record["data"][0]["rows"] == record["data"][0]["trained"] == 5
    assert not list(run.glob("README.md"))
    trained = weights(run)
    for tower in ("visual.blocks", "language_model"):
        assert any(bool(value.any()) for name, value in trained.items() if tower in name and "lora_B" in name), tower
    stock = load_file(next(base.glob("*.safetensors")))
    mergers = {name: value for name, value in trained.items() if "merger" in name}
    assert mergers
    for name, value in mergers.items():  # its rate is 0
        (own,) = [one for key, one in stock.items() if key.endswith(name.partition("merger.")[2]) and "merger" in key]
        assert torch.equal(own, value), name
    assert main(["merge", str(run), str(tmp_path / "merged")]) == 0
    assert main(["train", "--config", str(run / "config.yaml"), "--output_dir", str(tmp_path / "again")]) == 0
    again = weights(tmp_path / "again")
    assert all(torch.equal(value, again[name]) for name, value in trained.items())


def test_rows_that_grpo_cannot_take_are_skipped_and_counted(words, media, tmp_path, capsys):
    file = tmp_path / "some.json"
    clip = row("clip", "<video>What?", "It slides.") | {"video": "clip.mp4"}
    file.write_text(json.dumps([clip, row("long", "long " * 100, "4"), *ROWS[:2], row("none", "2+2?", "")]))
    more = ("--on_bad_row", "skip", "--over_length", "skip", "--max_steps", "1", "--max_length", "500")
    more += ("--image_max_pixels", str(28 * 28 * 12))
    assert main(words(*more, data_path=str(file), max_completion_length="20")) == 0, capsys.readouterr().err
    (entry,) = json.loads((tmp_path / "run" / "vlft.json").read_text())["data"]
    skipped = {one["id"]: one["reason"] for one in entry["skipped"]}
    assert entry["rows"] == 5 == entry["trained"] + len(skipped)
    assert "takes pictures only" in skipped["clip"]
    assert "a completion may have 20 (--max_completion_length)" in skipped["long"]


def test_full_weights_train(words, tmp_path):
    full = ("--language", "full", "--vision", "frozen", "--max_steps", "1")
    flags = words(*full)
    place = flags.index("--lora_rank")
    del flags[place : place + 2]
    assert main(flags) == 0
    assert (tmp_path / "run" / "config.json").exists()


def test_the_model_sees_what_the_served_processor_makes_of_the_row(words, media, tmp_path, monkeypatch):
    seen: dict[str, tuple] = {}
    stock = GrpoTrainer._generate_single_turn
    forward = GrpoTrainer._get_per_token_logps_and_entropies

    def generate(trainer, ids, pictures, fields, many, *more):
        seen["generate"] = ids, pictures, fields
        return stock(trainer, ids, pictures, fields, many, *more)

    def score(trainer, model, ids, mask, *more, **kwargs):
        seen.setdefault("score", (ids, mask, kwargs))
        return forward(trainer, model, ids, mask, *more, **kwargs)

    monkeypatch.setattr(GrpoTrainer, "_generate_single_turn", generate)
    monkeypatch.setattr(GrpoTrainer, "_get_per_token_logps_and_entropies", score)
    pixels = ("--image_max_pixels", str(28 * 28 * 12), "--max_steps", "1", "--per_device_train_batch_size", "10")
    assert main(words(*pixels, global_batch="5")) == 0

    from transformers import AutoProcessor

    served = AutoProcessor.from_pretrained(tmp_path / "run")  # as any server opens the run
    ids, pictures, fields = seen["generate"]
    expected, patches, grids = {}, [], []
    for one in ROWS:
        paths, turns = iter(one.get("image", [])), []
        for turn in one["conversations"][:-1]:
            image = [
                {"type": "image", "image": Image.open(media / next(paths))} for _ in range(turn["value"].count("<i"))
            ]
            text = {"type": "text", "text": turn["value"].replace("<image>", "")}
            turns.append({"role": "user" if turn["from"] == "human" else "assistant", "content": [*image, text]})
        made = served.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        expected[tuple(made["input_ids"][0].tolist())] = made
    assert {tuple(one) for one in ids} == set(expected)
    for one, some in zip(ids, pictures, strict=True):
        made = expected[tuple(one)]
        assert len(some) == len(made.get("image_grid_thw", ()))
        if some:
            patches.append(made["pixel_values"])
            grids.append(made["image_grid_thw"])
    torch.testing.assert_close(fields["pixel_values"], torch.cat(patches), rtol=0, atol=2e-6)
    assert torch.equal(fields["image_grid_thw"], torch.cat(grids))
    scored, mask, kwargs = seen["score"]
    kept = [tuple(one[keep.bool()].tolist()) for one, keep in zip(scored, mask, strict=True)]
    assert all(any(one[: len(prompt)] == prompt for prompt in expected) for one in kept)
    assert sorted(kwargs["image_grid_thw"].tolist()) == sorted(torch.cat(grids).tolist())


THOUGHT = "<think>\nhm\n</think>\n\n"


@pytest.mark.parametrize(
    ("own", "thinking", "written"), [(THOUGHT, "auto", "hm\n"), ("", "on", "\n"), (THOUGHT, "off", None)]
)
def test_rewards_see_the_thoughts_that_a_prompt_begins(own, thinking, written, words, base_of, tmp_path, capsys):
    seen = tmp_path / "seen"
    (tmp_path / "see.py").write_text(
        "import json\n"
        "def see(completions, answer, full_answer, **columns):\n"
        f"    with open({str(seen)!r}, 'a') as file:\n"
        "        file.write(json.dumps([[one[0]['content'] for one in completions], answer, full_answer]) + '\\n')\n"
        "    return [float(place) for place, _ in enumerate(completions)]\n"
    )
    file = tmp_path / "thoughts.json"
    file.write_text(json.dumps([row("a", "2+2?", own + "4"), row("b", "3+3?", own + "6")]))
    flags = {"model_id": str(base_of(QWEN3_5)), "data_path": str(file), "thinking": thinking, "max_steps": "1"}
    assert main(words("--reward", "exact_match", f"{tmp_path / 'see.py'}:see", **flags)) == 0
    assert "rewards of the own answers of 2 rows: exact_match 1, see 1.5" in capsys.readouterr().out
    start, step = map(json.loads, seen.read_text().splitlines())
    block = "" if written is None else f"<think>\n{written}</think>\n\n"
    twice = ["4", "4", "6", "6"]  # an answer is repeated as often as a prompt has completions
    assert start == [[block + one for one in twice], twice, [own + one for one in twice]]
    assert len(step[0]) == 4
    assert all(one.startswith("<think>\n") is (written is not None) for one in step[0])


def test_every_row_is_trained_in_an_epoch():
    order = RowOrder(rows=7, rows_per_step=3, accumulation=2, seed=1, group=4)
    sampler = PromptSampler(order)
    drawn = list(sampler)
    assert len(drawn) == len(sampler) == 3 * 2 * 3 * 4
    steps = [drawn[place : place + 24] for place in range(0, len(drawn), 24)]
    assert all(step[:12] == step[12:] and set(Counter(step[:12]).values()) == {4} for step in steps)
    assert Counter(row for step in steps for row in step[:12:4]) == Counter([*range(7), *order.epoch(0)[:2]])
    sampler.set_epoch(1)
    assert list(sampler) != drawn


def test_a_killed_run_resumes_to_the_same_weights(words, tmp_path, capsys):
    flags = {"save_strategy": "steps", "save_steps": "2", "num_train_epochs": "2", "beta": "0.1"}
    assert main(words(name="whole", **flags)) == 0
    with killed_after_a_checkpoint():
        main(words(name="killed", **flags))
    assert main(words(name="killed", **flags)) == 0
    one, other = (weights(tmp_path / name) for name in ("whole", "killed"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    same = ("step", "epoch", "loss", "reward", "kl", "tokens", "grad_norm", "lr")
    first, second = ([{name: line[name] for name in same} for line in lines(tmp_path / n)] for n in ("whole", "killed"))
    assert first == second
    assert first[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert first[-1]["kl"] > 0
    assert main(words(name="killed", **{**flags, "num_generations": "4"})) == 1
    capsys.readouterr()
    assert main(words(name="killed", **{**flags, "beta": "0.2"})) == 1
    assert "its settings of --method grpo are beta 0.1, this run's are beta 0.2" in capsys.readouterr().err


def test_the_reference_takes_parts_and_rewards_log_metrics(words, tmp_path, monkeypatch):
    sizes = []
    stock = GRPOTrainer._get_per_token_logps_and_entropies

    def forward(trainer, model, ids, *more, **kwargs):
        sizes.append(len(ids))
        return stock(trainer, model, ids, *more, **kwargs)

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", forward)
    file = tmp_path / "log.py"
    file.write_text(
        "def log(completions, log_metric, log_extra, **columns):\n"
        "    log_metric('mine/length', 3)\n"
        "    log_metric('mine/length', 4)\n"
        "    log_extra('text', ['x' for _ in completions])\n"
        "    return [float(place) for place, _ in enumerate(completions)]\n"
    )
    flags = {"beta": "0.1", "global_batch": "5", "per_device_train_batch_size": "2", "max_steps": "1"}
    assert main(words(reward=f"{file}:log", **flags)) == 0
    assert sizes == [2] * 10  # the reference of 10 completions, then 5 micro-batches
    (line,) = lines(tmp_path / "run")
    assert line["reward/mine/length"] == 3.5
    assert line["kl"] == pytest.approx(0, abs=1e-6)  # the adapter is 0 at first: parts have the pixels of their rows


def test_entropy_is_a_mean_over_tokens_whatever_the_micro_batch(words, tmp_path):
    found = []
    for size in ("1", "2", "10"):
        flags = {"global_batch": "5", "per_device_train_batch_size": size, "max_steps": "1", "temperature": "2"}
        flags |= {"model_id": str(STORED), "max_completion_length": "24"}
        assert main(words(name=size, **flags)) == 0
        (line,) = lines(tmp_path / size)
        found.append((line["supervised_tokens"], line["entropy"]))
    (tokens, entropy), *others = found
    assert tokens < 10 * 24  # completions of different lengths
    assert all(one == (tokens, pytest.approx(entropy, rel=1e-4)) for one in others)


def test_functions_are_tried_as_in_a_step(words, tmp_path, capsys):
    file = tmp_path / "group.py"
    file.write_text(
        "import numpy\n"
        "def group(completions, trainer_state, prompts, **columns):\n"
        "    assert trainer_state.max_steps == 3, trainer_state\n"
        "    share = trainer_state.global_step / trainer_state.max_steps\n"
        "    lengths = numpy.array([len(one[0]['content']) for one in completions]).reshape(-1, 2)\n"
        "    assert all(one == two for one, two in zip(prompts[::2], prompts[1::2]))\n"
        "    return (lengths - lengths.mean(1, keepdims=True)).ravel() + share\n"
    )
    assert main(words(reward=f"{file}:group")) == 0, capsys.readouterr().err
    assert "rewards of the own answers of 5 rows: group 0" in capsys.readouterr().out


def test_out_of_memory_names_flags_of_grpo(words, monkeypatch, capsys):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", full)
    assert main(words()) == 1
    said = capsys.readouterr().err
    names = ["--per_device_train_batch_size", "--num_generations", "--max_completion_length", "--global_batch"]
    places = [said.index(name) for name in names]
    assert places == sorted(places)
    assert "deepspeed" not in said
    assert "0 tokens" not in said


def test_equal_rewards_are_said_aloud(words, capsys):
    assert main(words("--equal_rewards_steps", "2", reward="format:never this")) == 0
    out = capsys.readouterr().out
    assert out.count("warning: in the last 2 steps all 2 completions of a prompt had the same reward (mean 0)") == 1


def test_a_reward_that_fails_in_a_run_names_the_row(words, tmp_path, capsys):
    file = tmp_path / "late.py"
    file.write_text(
        "def reward(completions, trainer_state, answer, **columns):\n"
        "    late = trainer_state.global_step >= 1\n"
        "    return [None if late and place == 1 else 1.0 for place, _ in enumerate(completions)]\n"
    )
    flags = words("--save_steps", "1", reward=f"{file}:reward", save_strategy="steps")
    assert main(flags) == 1
    captured = capsys.readouterr()
    assert "late.py:reward, step 2: " in captured.err
    assert "rows.json[" in captured.err
    assert "returned None (NoneType)" in captured.err
    assert "Traceback" not in captured.err
    file.write_text("def reward(completions, **columns):\n    return [0.0 for _ in completions]\n")
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert "resuming from" in out
    assert f"warning: {file} has changed since the run began" in out


@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
def test_preview_shows_the_prompts_that_the_trainer_feeds(
    thinking, words, base_of, media, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ROWS))
    fed: set[tuple] = set()
    stock = GrpoTrainer._generate_single_turn

    def generate(trainer, ids, pictures, fields, many, *more):
        fed.update(map(tuple, ids))
        return stock(trainer, ids, pictures, fields, many, *more)

    monkeypatch.setattr(GrpoTrainer, "_generate_single_turn", generate)
    flags = {"model_id": str(base_of(QWEN3_5)), "data_path": str(file), "thinking": thinking, "max_steps": "1"}
    assert main(words(**flags, global_batch="5", max_completion_length="2")) == 0
    capsys.readouterr()
    same = ["--method", "grpo", "--model_id", flags["model_id"], "--image_folder", str(media), "--thinking", thinking]
    assert main(["preview", str(file), *same, "--index", "0-4", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)["rows"]
    assert {tuple(one["input_ids"]) for one in shown} == fed
    assert all(one["supervised"] == 0 and set(one["labels"]) == {-100} for one in shown)
    end = {"auto": "<think>\n\n</think>\n\n", "on": "<think>\n", "off": "<think>\n\n</think>\n\n"}[thinking]
    assert all(one["text"].endswith(f"<|im_start|>assistant\n{end}") for one in shown)
    assert main(["preview", str(file), *same, "--index", "3", "--html", str(tmp_path / "row.html")]) == 0
    text = capsys.readouterr().out
    assert "nothing of the row is trained" in text
    assert "⟦" not in text
    assert "Yes." not in text
    assert "nothing of the rows is trained" in (tmp_path / "row.html").read_text()
    plain = [str(file), "--method", "grpo", "--image_folder", str(media), "--index", "3"]  # without a base
    assert main(["preview", *plain]) == 0
    text = capsys.readouterr().out
    assert "nothing of the row is trained" in text
    assert "⟦" not in text
    assert "Yes." not in text
