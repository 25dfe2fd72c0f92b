"""The recipe of a row: the cost cache, the run record, resuming, chat and serving notice a change of each field."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
from build import row, write_json

from vlft.answering import opened
from vlft.chat import open_model
from vlft.checkpoint import RunRecord, read_record, write_record
from vlft.checkpoint.record import MEDIA_KEYS
from vlft.cli import help
from vlft.cli.main import main
from vlft.config import flags, parse, recipe, table
from vlft.config.kinds import Number
from vlft.config.recipe import COSTLESS, SERVED, Fit, Recipe, flags_of
from vlft.config.row_flags import RowFlags, flag
from vlft.data.costs.cache import scan_costs
from vlft.data.files.index import index_rows
from vlft.demo.tiny import tiny_processor
from vlft.errors import CheckpointError, ConfigError
from vlft.families import FAMILIES
from vlft.setup import base as base_of
from vlft.train.record import refuse_other_run

RECIPE = Recipe.of(tiny_processor(), RowFlags(max_length=1000), columns=("none",))
OTHER = {
    "nframes": 8,
    "over_length": "skip",
    "box_format": "0-1",
    "missing_tags": "first",
    "fit": Fit(how="shrink", tokens=900, patches=None),
    "columns": ("answer=a",),
}


def changed(name: str) -> Recipe:
    """Return `RECIPE` with one field changed."""
    now = getattr(RECIPE, name)
    made = OTHER.get(name, now + 2 if isinstance(now, int | float) else "0123")
    assert made != now
    return replace(RECIPE, **{name: made})


def recorded(by: Recipe, folder: Path) -> RunRecord:
    """Write the record of a run with a recipe, and read it back."""
    settings = by.as_json()
    media = {name: settings.pop(name) for name in MEDIA_KEYS}
    lora = {"rank": 4, "alpha": 8, "dropout": 0.0, "target": "all"}
    towers = {"vision": "frozen", "merger": "frozen", "language": "lora"}
    training = {"finished": False, "asked": {}, "processes": 1, **settings, "data": "ab", "global_batch": 1}
    words = {
        "kind": "adapter",
        "base_model": "b",
        "base_revision": None,
        "base_fingerprint": "f",
        "model_type": "qwen2_vl",
    }
    record = RunRecord(**words, towers=towers, lora=lora, media=media, versions={}, training=training, data=[])
    folder.mkdir(exist_ok=True)
    write_record(folder, record)
    return read_record(folder)


@pytest.mark.parametrize("name", [one.name for one in fields(Recipe)])
def test_every_field_is_recorded_compared_and_told(tmp_path, name):
    other = changed(name)
    mine, theirs = recorded(RECIPE, tmp_path / "mine"), recorded(other, tmp_path / "theirs")
    refuse_other_run(mine, recorded(RECIPE, tmp_path / "same"), tmp_path)
    with pytest.raises(CheckpointError, match="belongs to another run") as caught:
        refuse_other_run(mine, theirs, tmp_path)
    for one in (RECIPE, other):
        for word in re.findall(r"[\w.]+", str(one.as_json()[name])):
            assert word.lower() in str(caught.value).lower()
    again = Recipe.of_run(tiny_processor(), theirs.settings)
    if name in {one.name for one in flags_of(Recipe)}:  # other fields come from the processor or the data files
        assert getattr(again, name) == getattr(other, name)
    assert (other.print == RECIPE.print) == (name in COSTLESS)


def test_costs_are_measured_again_for_another_recipe_only(encoder, tmp_path):
    path = write_json(tmp_path / "rows.json", [row("What?", "This.")])
    rows = index_rows([str(path)], image_folder=None, family=FAMILIES["qwen2_vl"])
    seen = set()
    for name in ["", *(one.name for one in fields(Recipe))]:
        now = replace(encoder, recipe=changed(name) if name else RECIPE)
        list(scan_costs(rows, now, workers=0, folder=tmp_path / "cache", note=pytest.fail))
        entries = set((tmp_path / "cache").glob("*.sqlite"))
        assert len(entries - seen) == (name not in COSTLESS), name
        seen = entries


def test_what_is_served_is_what_was_trained():
    """Settings are written into the processor's files, and transformers' classes read them back."""
    for name in SERVED:
        trained, processor = changed(name), tiny_processor()
        trained.serve(processor)
        for part in ("image_processor", "video_processor"):
            made = getattr(processor, part)
            setattr(processor, part, type(made)(**made.to_dict()))
        served = Recipe.of(processor)
        for one in SERVED:
            if not (one == "fps" and trained.nframes is not None):  # a processor has only one of the two
                assert getattr(served, one) == getattr(trained, one)


def test_another_tokenizer_or_template_is_another_recipe():
    processor = tiny_processor()
    processor.chat_template += " "
    assert Recipe.of(processor).chat_template != RECIPE.chat_template
    processor = tiny_processor()
    processor.tokenizer("as it was", padding="max_length", max_length=20, truncation=True)  # sets the tokenizer's state
    assert Recipe.of(processor).tokenizer == RECIPE.tokenizer
    processor.tokenizer.add_tokens("<new>")
    assert Recipe.of(processor).tokenizer != RECIPE.tokenizer


def test_an_update_of_transformers_does_not_make_it_another_run(tmp_path):
    mine, theirs = recorded(RECIPE, tmp_path / "mine"), recorded(changed("tokenizer"), tmp_path / "theirs")
    refuse_other_run(mine, replace(theirs, versions={"transformers": "5.17.0"}), tmp_path)


def test_length_is_what_the_model_allows():
    assert Recipe.of(tiny_processor(), longest=50).max_length == 50
    with pytest.raises(ConfigError, match=r"--max_length is 60; .* allow 1 to 50"):
        Recipe.of(tiny_processor(), RowFlags(max_length=60), longest=50)


@dataclass(frozen=True, kw_only=True)
class PretendedFlags(flags.DataFlags):
    image_gamma: float = flag(1.0, "a pretended flag that decides pixels")


@dataclass(frozen=True, kw_only=True)
class PretendedRowFlags(RowFlags):
    image_gamma: float = flag(1.0, "a pretended flag that decides pixels")


@dataclass(frozen=True, kw_only=True)
class PretendedRecipe(Recipe):
    image_gamma: float = flag(1.0, "a pretended flag that decides pixels")


def test_a_new_flag_reaches_all_that_have_to_notice(base, tmp_path, monkeypatch, capsys):
    """The flag is declared as a flag, in the recipe and in the table, and nowhere else."""
    monkeypatch.setattr(help, "_holds", lambda: False)  # the stored texts lack the flag
    monkeypatch.setattr(parse, "DataFlags", PretendedFlags)
    monkeypatch.setattr(parse, "OWN", (PretendedFlags, *parse.OWN[1:]))
    monkeypatch.setattr(recipe, "RowFlags", PretendedRowFlags)
    for module in (base_of, opened):
        monkeypatch.setattr(module, "Recipe", PretendedRecipe)
    monkeypatch.setattr(table, "OF_TRAIN", table.OF_TRAIN | {"image_gamma": Number(low=0, high=10)})
    monkeypatch.setenv("VLFT_COST_CACHE", str(tmp_path / "cache"))
    data, run = write_json(tmp_path / "rows.json", [row("What?", "This.")]), tmp_path / "run"
    argv = ["train", "--model_id", str(base), "--data_path", str(data), "--output_dir", str(run), "--use_cpu", "true"]
    argv += ["--max_steps", "1", "--dataloader_num_workers", "0", "--report_to", "none", "--lora_rank", "2"]
    assert main([*argv, "--image_gamma", "1.25"]) == 0
    assert json.loads((run / "vlft.json").read_text())["training"]["image_gamma"] == 1.25
    assert open_model(run, device="cpu").encoder.recipe.image_gamma == 1.25
    assert main([*argv, "--image_gamma", "1.5"]) == 1
    assert "belongs to another run: its image gamma is 1.25, this run's is 1.5" in capsys.readouterr().err
    assert len(list((tmp_path / "cache").glob("*.sqlite"))) == 2


#: The keys of vlft.json before there was a recipe.
OLD = {
    "seed",
    "global_batch",
    "packing",
    "asked",
    "processes",
    "max_length",
    "box_format",
    "over_length",
    "missing_tags",
}
OLD |= {"data", "columns", "mix", "rows", "drawn", "learning_rates", "weight_decay", "optim", "optimizer", "deepspeed"}
OLD |= {"finished", "lr_scheduler_type", "warmup_steps"}


def test_a_run_of_an_older_version_resumes_and_chats(base, tmp_path, capsys):
    data, run = write_json(tmp_path / "rows.json", [row("What?", "This.")]), tmp_path / "run"
    argv = ["train", "--model_id", str(base), "--data_path", str(data), "--output_dir", str(run), "--use_cpu", "true"]
    argv += ["--max_steps", "1", "--dataloader_num_workers", "0", "--report_to", "none", "--lora_rank", "2"]
    assert main([*argv, "--image_max_pixels", "12544"]) == 0
    record = json.loads((run / "vlft.json").read_text())
    assert set(record["media"]) == set(MEDIA_KEYS)  # older versions accept no other keys
    assert set(record["training"]) >= OLD
    of_now = open_model(run, device="cpu").encoder.recipe
    older = OLD - {"over_length", "missing_tags", "box_format", "columns", "mix", "drawn", "deepspeed"}
    for known in (OLD, older):
        kept = {name: value for name, value in record["training"].items() if name in known}
        (run / "vlft.json").write_text(json.dumps(record | {"training": kept}))
        assert main([*argv, "--image_max_pixels", "12544"]) == 0
        assert "this run is finished" in capsys.readouterr().out
        assert open_model(run, device="cpu").encoder.recipe == of_now
    assert main([*argv, "--image_max_pixels", "12544", "--missing_tags", "first"]) == 1
    assert "its missing_tags is error, this run's is first" in capsys.readouterr().err
