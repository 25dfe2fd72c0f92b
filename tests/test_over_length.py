"""Rows over the limit are refused, skipped, shrunk, or lose their last media; measuring and encoding agree."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from build import FAMILY, row, write_json

from vlft.cli.main import main
from vlft.config.recipe import Fit
from vlft.data.costs.cache import scan_costs
from vlft.data.encode import Encoder
from vlft.data.files.index import index_rows
from vlft.data.media.read import recipe_for
from vlft.data.pieces import KIND_TEXT
from vlft.data.rows.records import parse_record
from vlft.data.sample import Image
from vlft.errors import DataError

STORY = {
    "id": "story",
    "image": ["china.jpg", "flower.jpg", "coffee.jpg"],
    "video": "clip.mp4",
    "conversations": [
        {"from": "human", "value": "<image>\nThen <image> and <video>"},
        {"from": "gpt", "value": "A story."},
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": "It goes on."},
    ],
}
SHORT = row("What is <image>?", "A temple.", image="china.jpg", id="short")
WORDS = row("Say a lot.", "word " * 25, id="words")


def parse(raw, media):
    return parse_record(raw, file="t.json", index=0, image_folder=str(media), family=FAMILY)


@pytest.fixture(scope="module")
def story(media):
    return parse(STORY, media)


def fitting(encoder, how, tokens, patches=None) -> Encoder:
    return replace(encoder, recipe=replace(encoder.recipe, fit=Fit(how=how, tokens=tokens, patches=patches)))


@pytest.fixture(scope="module")
def whole(encoder, story):
    return encoder.measure(story)


@pytest.mark.parametrize("how", ["shrink", "drop_media"])
@pytest.mark.parametrize("share", [0.99, 0.8, 0.6, 0.45])
@pytest.mark.parametrize("unit", ["tokens", "patches"])
def test_it_fits_and_measuring_says_what_encoding_gives(encoder, story, whole, how, share, unit):
    tokens = int(whole.tokens * share) if unit == "tokens" else whole.tokens
    patches = int(whole.patches * share) if unit == "patches" else None
    ours = fitting(encoder, how, tokens, patches)
    cost, made = ours.measure(story), ours.encode(story)
    assert cost.tokens <= tokens
    assert patches is None or cost.patches <= patches
    assert (cost.tokens, cost.patches) == (len(made.input_ids_T), sum(m.grid.patches for m in made.media))
    assert cost.changed == made.changed
    assert cost.changed.startswith("shrunk" if how == "shrink" else "dropped")
    assert cost.changed.endswith(f"{cost.tokens:,} tokens instead of {whole.tokens:,}")
    assert ours.measure(story) == cost
    # All text is present and all answers are trained, in every way of treating the pictures.
    full = encoder.encode(story)
    assert made.labels_T[made.labels_T >= 0].tolist() == full.labels_T[full.labels_T >= 0].tolist()
    assert encoder.encode(ours.as_trained(story)).input_ids_T.tolist() == made.input_ids_T.tolist()
    if how == "shrink":
        assert len(made.media) == 4
        fullest = max(cost.tokens / tokens, cost.patches / patches if patches else 0)
        assert fullest > 0.75  # as much of the pictures as fits
    else:
        kept = len(made.media)
        assert all(torch.equal(a.pixels, b.pixels) for a, b in zip(made.media, full.media[:kept], strict=True))
        vision = sum(m.grid.tokens(2) for m in made.media)
        assert int((made.kinds_T != KIND_TEXT).sum()) == vision
        assert made.text.count("<|vision_start|>") == kept < 4
        one_more = [m.grid for m in full.media[: kept + 1]]
        left = whole.tokens - sum(m.grid.tokens(2) + 2 for m in full.media[kept + 1 :])
        assert left > tokens or (patches is not None and sum(grid.patches for grid in one_more) > patches)


def test_a_row_that_fits_is_as_it_was(encoder, media, whole):
    sample = parse(SHORT, media)
    ours = fitting(encoder, "shrink", whole.tokens)
    assert ours.as_trained(sample) is sample
    assert ours.measure(sample) == encoder.measure(sample)
    assert ours.encode(sample).changed == ""


def test_pixels_go_down_evenly_and_never_below_their_least(encoder, story, whole):
    for share in (0.7, 0.4):
        made = fitting(encoder, "shrink", int(whole.tokens * share)).as_trained(story)
        most = {m.overrides.max_pixels for m in made.media if isinstance(m, Image)}
        assert len(most) == 1  # one budget for all of the row's pictures
        for medium in made.media:
            own = recipe_for(medium, encoder.recipe)
            assert own.image_max_pixels >= own.image_min_pixels
            assert own.video_max_pixels >= own.video_min_pixels


@pytest.mark.parametrize("how", ["shrink", "drop_media"])
def test_what_cannot_be_made_to_fit_is_refused(encoder, story, media, how):
    for sample, tokens in ((story, 20), (parse(WORDS, media), 100)):
        ours = fitting(encoder, how, tokens, 10**6)
        for do in (ours.measure, ours.encode):
            with pytest.raises(DataError) as caught:
                do(sample)
            bad = caught.value.row
            assert bad.too_long
            words = "at its minimum pixels" if how == "shrink" else "the text of the row alone"
            assert words in bad.reason
            assert f"{tokens} tokens and 1,000,000 patches are allowed" in bad.reason


def test_changes_are_kept_with_the_costs(encoder, media, whole, tmp_path):
    path = write_json(tmp_path / "rows.json", [SHORT, STORY])
    rows = index_rows([str(path)], image_folder=str(media), family=FAMILY)

    def costs(how: str) -> list:
        ours = fitting(encoder, how, whole.tokens // 2)
        return list(scan_costs(rows, ours, workers=0, folder=tmp_path / "kept", note=pytest.fail))

    first = costs("shrink")
    (entry,) = (tmp_path / "kept").iterdir()
    written = entry.read_bytes()
    again = costs("shrink")
    assert again == first
    assert [bool(cost.changed) for cost in again] == [False, True]
    assert entry.read_bytes() == written
    assert costs("drop_media") != first  # other settings, other costs


# ------------------------------------------------------------------------------------------------------- by the CLI


@pytest.fixture(scope="module")
def flags(tmp_path_factory, base, media, encoder, whole):
    path = write_json(tmp_path_factory.mktemp("long") / "t.json", [SHORT, STORY, WORDS])
    limit = whole.tokens * 2 // 3
    assert encoder.measure(parse(WORDS, media)).tokens < limit
    return [str(path), "--image_folder", str(media), "--model_id", str(base), "--max_length", str(limit)]


def test_check_data_and_preview_tell_what_is_trained(capsys, flags):
    assert main(["check-data", *flags, "--json"]) == 1
    (bad,) = json.loads(capsys.readouterr().out)["bad"]
    assert (bad["index"], bad["too_long"]) == (1, True)
    assert "--over_length" in bad["reason"]
    for how, word in (("shrink", "shrunk pictures to at most"), ("drop_media", "dropped the last")):
        assert main(["check-data", *flags, "--json", "--over_length", how]) == 0
        (warned,) = json.loads(capsys.readouterr().out)["warnings"]
        assert (warned["index"], warned["field"]) == (1, "row")
        assert word in warned["reason"]
        assert main(["preview", *flags, "--json", "--over_length", how, "--index", "1"]) == 0
        shown = json.loads(capsys.readouterr().out)
        assert shown["tokens"] <= int(flags[-1])
        assert [w["reason"] for w in shown["warnings"]] == [warned["reason"]]
        assert (len(shown["media"]) < 4) == (how == "drop_media")


def train(out, flags, *more):
    quick = ["--max_steps", "1", "--use_cpu", "true", "--dataloader_num_workers", "0", "--save_strategy", "no"]
    small = ["--lora_rank", "2", "--global_batch", "3", "--output_dir", str(out)]
    return main(["train", "--data_path", *flags, *small, *quick, *more])


def test_a_run_accounts_for_what_it_changed(capsys, tmp_path, flags):
    assert train(tmp_path / "run", flags, "--over_length", "shrink") == 0
    assert "1 shrunk to fit (--over_length)" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "vlft.json").read_text())
    (entry,) = record["data"]
    assert (entry["rows"], entry["trained"], entry["skipped"]) == (3, 3, [])
    assert (entry["shrunk"], entry["lost_media"]) == (1, 0)
    ((changed),) = entry["changed"]
    assert (changed["index"], changed["id"]) == (1, "story")
    assert changed["change"].startswith("shrunk pictures to at most")
    assert train(tmp_path / "run", flags, "--over_length", "drop_media") == 1
    assert "its over_length is shrink, this run's is drop_media" in capsys.readouterr().err


def test_skip_leaves_out_long_rows_and_no_others(capsys, tmp_path, flags):
    assert main(["plan", "--data_path", *flags, "--over_length", "skip", "--json"]) == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert (file["rows"], file["trained"], file["skipped"]) == (3, 2, 1)
    broken = write_json(tmp_path / "b.json", [SHORT, STORY, row(answer="")])
    assert main(["plan", "--data_path", str(broken), *flags[1:], "--over_length", "skip"]) == 1
    said = capsys.readouterr().err
    assert "1 of 3 rows cannot be trained" in said
    assert "the answer is empty" in said


def test_texts_around_a_dropped_picture_do_not_run_into_each_other(encoder, media):
    sample = parse(row("One.\n<image>\nTwo.\n<image>\nThree?", "So.", image=["china.jpg", "coffee.jpg"]), media)
    least = encoder.measure(parse(row("One.\nTwo.\nThree?", "So."), media)).tokens
    text = fitting(encoder, "drop_media", least, 10**6).encode(sample).text
    assert "One.\nTwo.\nThree?" in text
