"""Preference rows from a `Sample` to a batch: each answer as the stock processor and model have it after the prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from build import row, write_image
from conftest import HAS_PYAV
from stock import messages_of, stock, stock_positions
from test_family_rows import encoder_of, parsed

from vlft.answering import seconds_remark
from vlft.data.dataset import cost_of
from vlft.data.encode import UNTRAINED
from vlft.data.sample import Text, Turn
from vlft.families import FAMILIES
from vlft.model.load import load_base

ROWS = {
    "text": row("2+2?", "4"),
    "pictures": row("<image>and<image>\nCompare.", "Both.", image=["wide.png", "tall.png"]),
    "video": row("<video>What?", "It slides.", video="clip.mp4"),
    "mixed": row("<image>3 <video><image> <video>?", "All.", image=["wide.png", "tall.png"],
                 video=["clip.mp4", ["wide.png"] * 5]),
    "turns": {
        "image": "tall.png",
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "1?"}, {"from": "gpt", "value": "One."},
            {"from": "human", "value": "<image>Sûr ? 写"}, {"from": "gpt", "value": "Yes."},
        ],
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, media):
    import shutil

    folder = tmp_path_factory.mktemp("pairs")
    write_image(folder / "wide.png", 400, 90)
    write_image(folder / "tall.png", 101, 307, name="flower")
    if HAS_PYAV:
        shutil.copy(media / "clip.mp4", folder)
    return folder


def rejecting(sample, *answers: str):
    """The row as a preference row."""
    turns = [Turn(role="assistant", parts=(Text(text=one),), field=f"rejected[{i}]") for i, one in enumerate(answers)]
    return replace(sample, rejected=tuple(turns))


def plain_rows(sample) -> list:
    """The whole conversation with each answer, the chosen one first."""
    plain = replace(sample, rejected=())
    return [plain, *(replace(plain, turns=(*plain.turns[:-1], turn)) for turn in sample.rejected)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def encoder(base_of, family):
    return encoder_of(base_of(family), family)


@pytest.fixture(scope="module")
def model(base_of, family):
    return load_base(base_of(family), family)


@pytest.mark.parametrize("name", ROWS)
def test_each_answer_follows_the_prompt_as_in_the_stock_row(encoder, model, folder, family, name, monkeypatch):
    monkeypatch.setenv("FORCE_QWENVL_VIDEO_READER", "decord")
    sample = rejecting(parsed(ROWS[name], folder, family), "Neither of them, I think.", "\n\nNo.")
    ours = encoder.encode(sample)
    prompt, *answers = ours.branches
    assert sum(ours.branches) == len(ours.input_ids_T)
    start = prompt
    for whole, count in zip(plain_rows(sample), answers, strict=True):
        theirs = stock(whole, encoder)
        own = [*range(prompt), *range(start, start + count)]
        if not whole.turns[-1].parts[0].text.startswith("\n"):  # stock merges the line break before it
            assert ours.input_ids_T[own].tolist() == theirs["input_ids"][0].tolist()
            assert ours.kinds_T[own].tolist() == theirs["mm_token_type_ids"][0].tolist()
            if "second_per_grid_ts" not in theirs or not seconds_remark(model, encoder.recipe):
                assert torch.equal(ours.positions_3T[:, own], stock_positions(theirs, model))
        labels = ours.labels_T[start : start + count]
        trained = encoder.processor.tokenizer.decode(labels[labels != UNTRAINED])
        text = encoder.processor.apply_chat_template(messages_of(whole, encoder.recipe), tokenize=False)
        assert text.endswith(trained + "\n")
        assert trained.strip() == whole.turns[-1].parts[0].text.strip() + "<|im_end|>"  # some templates trim answers
        start += count
    assert (ours.labels_T[:prompt] == UNTRAINED).all()
    tokens = encoder.tokens(sample)
    for key in ("input_ids_T", "labels_T", "kinds_T", "positions_3T"):
        assert getattr(tokens, key).tolist() == getattr(ours, key).tolist(), key
    assert tokens.branches == ours.branches
    cost = encoder.measure(sample)
    assert cost == cost_of(ours)
    assert cost.branches == ours.branches
    copies = 3 if "recurrent" in family.features else 1
    assert cost.tokens == prompt * copies + sum(answers)
    assert encoder.samples(sample) == (sample,)
