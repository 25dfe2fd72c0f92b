"""`--cache_vision_features`: what a frozen vision tower computes is stored once, and read bit for bit from then on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from launch import vlft as vlft_process
from mishaps import before_each_loss
from runs import PACKED, arguments, losses, weights

from vlft.cli.main import main
from vlft.data.media import decode as decoder
from vlft.families import FAMILIES
from vlft.model import adapt

#: Row of `MIXED_ROWS` -> its stills and its videos.
STILLS = {0: ["china"], 1: ["flower", "astronaut"], 4: ["coffee"]}
VIDEOS = {2: ["clip"], 4: ["clip"], 5: ["frames"]}
SAVING = ("--save_strategy", "steps", "--save_steps", "2")


@pytest.fixture
def trained(base_of, mixed_json, media, tmp_path, capsys):
    """Train the tiny base of a family; returns the run folder and what it printed on both streams."""

    def run(*more: str, name: str, family: str = "qwen2_vl") -> tuple[Path, str]:
        capsys.readouterr()
        out = tmp_path / name
        assert main(arguments(base_of(FAMILIES[family]), mixed_json, media, out, *more)) == 0
        printed = capsys.readouterr()
        return out, printed.out + printed.err

    return run


@pytest.fixture
def cache(tmp_path):
    return flags(tmp_path / "cache")


def flags(folder: Path, *more: str) -> tuple[str, ...]:
    return ("--cache_vision_features", "true", "--vision_cache", str(folder), *more)


def names_of(batch) -> list[str]:
    """The media of a micro-batch, in the tower's order."""
    rows = [index for _, index in batch["rows"]]
    return [name for kind in (STILLS, VIDEOS) for row in rows for name in kind.get(row, ())]


@pytest.fixture
def seen(monkeypatch):
    """Two dicts, medium -> bits: what the tower first returned for it, and what a loader read for it."""
    computed: dict[str, torch.Tensor] = {}
    read: dict[str, torch.Tensor] = {}
    current: list = []

    def look(trainer, batch) -> None:
        if not current:
            live = trainer.accelerator.unwrap_model(trainer.model)
            adapt.watch_features(live, lambda found: split(computed, found.stack_LNH))
        current[:] = [batch]
        if "cached" in batch:
            sizes = [computed[name].shape[1] for name in names_of(batch)]
            parts = batch["cached"]["features"].split(sizes, dim=1)
            read.update(zip(names_of(batch), parts, strict=True))

    def split(into, stack_LNH) -> None:
        counts = [count for _, count in current[0].get("feature_keys", ())]
        parts = stack_LNH.split(counts, dim=1) if counts else ()
        for name, part in zip(names_of(current[0]) if counts else (), parts, strict=True):
            into.setdefault(name, part.clone())

    before_each_loss(monkeypatch, look)
    return computed, read


@pytest.mark.parametrize(
    ("family", "more"),
    [("qwen2_vl", ()), ("qwen3_vl", (*PACKED, "--dataloader_num_workers", "1"))],
    ids=["qwen2_vl", "qwen3_vl packed"],
)
def test_the_second_epoch_reads_the_bits_that_the_first_computed(trained, cache, seen, family, more):
    computed, read = seen
    cached, printed = trained(*more, *cache, family=family, name="cached")
    assert "7 pictures and videos were taken from it, 7 were computed, and 6 of them stored" in printed
    assert sorted(read) == sorted(computed) == ["astronaut", "china", "clip", "coffee", "flower", "frames"]
    for name, bits in read.items():
        assert bits.dtype == computed[name].dtype
        assert torch.equal(bits, computed[name]), name
    plain, _ = trained(*more, family=family, name="plain")
    assert losses(cached) == pytest.approx(losses(plain), abs=2e-5)


def test_a_later_run_neither_decodes_nor_calls_the_tower(trained, cache, mixed_json, monkeypatch):
    evaluated = ("--eval_path", str(mixed_json), "--eval_strategy", "epoch", "--report_rows", "0")
    first, _ = trained(*cache, *evaluated, name="first")
    calls = []
    monkeypatch.setattr(decoder, "decode", lambda media, recipe: calls.append(media))
    before_each_loss(monkeypatch, lambda trainer, batch: calls.append(batch) if len(batch["still_pixels"]) else None)
    later, printed = trained(*cache, *evaluated, "--num_train_epochs", "1", name="later")
    assert calls == []
    assert "14 pictures and videos were taken from it, 0 were computed" in printed
    assert "this run has one" in printed  # epoch
    assert losses(later)[0] == pytest.approx(losses(first)[0], abs=1e-5)


#: Step 2 is before the first checkpoint, step 5 in the second epoch.
@pytest.mark.parametrize("kills", [(5,), pytest.param((2, 5), marks=pytest.mark.grid)])
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(trained, base_of, mixed_json, media, tmp_path, kills):
    """Both begin with an empty cache. The clip is in two rows: both runs must store the features of the same one."""
    more = (*PACKED, *SAVING)
    whole, printed = trained(*more, *flags(tmp_path / "one"), name="whole")
    assert "7 pictures and videos were taken from it, 7 were computed" in printed
    out = tmp_path / "killed"
    argv = arguments(base_of(FAMILIES["qwen2_vl"]), mixed_json, media, out, *more, *flags(tmp_path / "two"))
    for step in kills:
        (killed,) = vlft_process(argv, out=tmp_path, kill_in_step=step)
        assert killed.status == -9, killed.output[-3000:]
    assert main(argv) == 0
    a, b = weights(out), weights(whole)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert losses(out) == losses(whole)


def test_a_full_folder_is_noted_once_and_training_continues(trained, tmp_path):
    small = flags(tmp_path / "small", "--vision_cache_gb", "0.00002")
    cached, printed = trained(*small, name="cached")
    assert printed.count("full, at ") == 1
    assert sum(file.stat().st_size for file in (tmp_path / "small").rglob("*") if file.suffix) <= 20_000
    assert len(losses(cached)) == 14


def test_a_plan_says_what_the_cache_takes_and_saves(capsys, base_of, mixed_json, media, tmp_path, trained, seen):
    computed, _ = seen
    cache = flags(tmp_path / "cache")
    trained(*cache, "--num_train_epochs", "1", name="run")
    clip = computed["clip"]
    held = sum(file.stat().st_size for file in (tmp_path / "cache").rglob("*.features"))
    base = base_of(FAMILIES["qwen2_vl"])
    argv = ["plan", "--model_id", base, "--data_path", mixed_json, "--image_folder", media, "--bf16", "false", *cache]
    assert main([*map(str, argv), "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)["vision_cache"]
    assert planned["fits"]
    assert planned["bytes"] - held == clip.nbytes  # the clip is in two rows, and is stored once
    assert 0.1 < planned["saved"] < 0.9
    assert main([*map(str, argv), "--vision_cache_gb", "0.00001"]) == 0
    assert "more than --vision_cache_gb 1e-05" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--cache_vision_features", "true", "--vision", "lora"), "--vision is lora, so the features of a picture"),
        (("--cache_vision_features", "true", "--merger", "full"), "--merger is full, so the features of a picture"),
        (("--vision_cache", "cache"), "--vision_cache cache has no effect without --cache_vision_features"),
        (("--vision_cache_gb", "3"), "--vision_cache_gb 3.0 has no effect without --cache_vision_features"),
        (("--cache_vision_features", "true", "--vision_cache_gb", "0"), "--vision_cache_gb is 0, must be more than 0"),
        (("--cache_vision_features", "true", "--vision_cache_gb", "-2"), "--vision_cache_gb is -2, must be more than"),
        (("--cache_vision_features", "true", "--vision_cache", "{file}"), "is a file"),
        (
            ("--cache_vision_features", "true", "--vision_cache", "/proc/1/x"),
            "/proc/1/x: /proc/1 is not",
        ),
    ],
)
def test_what_is_refused(base_of, mixed_json, media, tmp_path, capsys, more, says):
    (tmp_path / "file").write_text("")
    more = tuple(word.format(file=tmp_path / "file") for word in more)
    assert main(arguments(base_of(FAMILIES["qwen2_vl"]), mixed_json, media, tmp_path / "run", *more)) == 1
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run" / "vlft.json").exists()
