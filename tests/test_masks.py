"""Turns and spans that a row masks, with the keys of every kit: what is trained, and which rows are refused."""

from __future__ import annotations

import json

import pytest
import torch
from build import FAMILY, write_json

from vlft.answering import question_of
from vlft.cli.main import main
from vlft.data.costs.cache import key_of
from vlft.data.dataset import cost_of
from vlft.data.encode import UNTRAINED
from vlft.data.rows.records import parse_record
from vlft.errors import DataError

TEXT = "I'm doing very well, thank you!"  # from axolotl's documentation


def parse(raw):
    return parse_record(raw, file="t.json", index=0, image_folder="pics", family=FAMILY)


def talk(first=None, last=None, asked=None, **keys):
    """Two questions, each with an answer; keys for the answers and for the first question."""
    return {
        **keys,
        "conversations": [
            {"from": "human", "value": "Hi", **(asked or {})},
            {"from": "gpt", "value": "Bad", **(first or {})},
            {"from": "human", "value": "How are you?"},
            {"from": "gpt", "value": TEXT, **(last or {})},
        ],
    }


def trained(encoder, raw):
    """Return the trained parts as text, decoded from the tokens of the encoder."""
    row = encoder.encode(parse(raw))
    assert cost_of(row) == encoder.measure(parse(raw))
    runs, ids = [], []
    for token, label in zip([*row.input_ids_T.tolist(), 0], [*row.labels_T.tolist(), UNTRAINED], strict=True):
        if label != UNTRAINED:
            ids.append(token)
        elif ids:
            runs.append(encoder.processor.tokenizer.decode(ids))
            ids = []
    return runs


BOTH = ["Bad<|im_end|>", f"{TEXT}<|im_end|>"]
MASKS = {
    "LLaMA-Factory v1": {"loss_weight": 0.0},
    "ms-swift, loss": {"loss": False},
    "ms-swift, loss_scale": {"loss_scale": 0},
    "axolotl": {"train": False},
    "axolotl, another name": {"training": False},
    "OpenAI": {"weight": 0},
    "two that agree": {"weight": 0, "loss": False},
    "axolotl, spans of none": {"train_detail": [{"begin_offset": 0, "end_offset": 2, "train": False}]},
    "masked whole, whatever its spans say": {
        "train": False,
        "train_detail": [{"begin_offset": 0, "end_offset": 2, "train": True}],
    },
}


@pytest.mark.parametrize("keys", MASKS.values(), ids=MASKS)
def test_a_masked_answer_is_read_and_not_trained(keys, encoder):
    whole = encoder.encode(parse(talk()))
    row = encoder.encode(parse(talk(first=keys)))
    assert torch.equal(row.input_ids_T, whole.input_ids_T)
    assert trained(encoder, talk(first=keys)) == BOTH[1:]


@pytest.mark.parametrize(
    "keys",
    [{}, {"loss_weight": 1.0}, {"loss": True}, {"loss_scale": 1}, {"train": True}, {"weight": 1}, {"loss": None}],
)
def test_what_says_that_it_is_trained_is_trained(keys, encoder):
    assert trained(encoder, talk(first=keys, last=keys)) == BOTH


@pytest.mark.parametrize("keys", [{"train": False}, {"loss_weight": 0.0}, {"loss": False}, {"train_detail": []}])
def test_masks_of_questions_change_nothing(keys, encoder):
    raw = talk(asked=keys)
    raw["conversations"].insert(0, {"from": "system", "value": "Be brief.", **keys})
    assert trained(encoder, raw) == BOTH
    assert parse(raw).warnings == ()


def test_mask_history_of_llama_factory(encoder):
    assert trained(encoder, talk(mask_history=True)) == BOTH[1:]
    assert trained(encoder, talk(mask_history=False)) == BOTH


def spans(*some):
    return {"train_detail": [{"begin_offset": a, "end_offset": b, "train": t} for a, b, t in some]}


@pytest.mark.parametrize(
    ("some", "want"),
    [
        # Both ends are inclusive: axolotl's own example.
        ([(0, 8, False), (9, 18, True), (19, 30, False)], [" very well"]),
        ([(9, 18, True)], [" very well"]),
        ([(0, 30, True)], [f"{TEXT}<|im_end|>"]),
        ([(0, 18, False), (19, 30, True)], [", thank you!<|im_end|>"]),
        ([(0, 8, True), (19, 30, True)], ["I'm doing", ", thank you!<|im_end|>"]),
    ],
)
def test_spans_train_their_characters_only(some, want, encoder):
    got = trained(encoder, talk(first={"loss": False}, last=spans(*some)))
    # The tiny base's tokens may be smaller than a word, never larger than a span.
    assert got == want


@pytest.mark.parametrize("text", ["naïve 🙂 café", "\n a  b\n", "日本語の文"])
def test_a_token_is_trained_only_if_all_of_its_characters_are(text, encoder):
    """A span that is one character shorter loses exactly the tokens with that character, by the tokenizer's offsets."""
    tokenizer = encoder.processor.tokenizer
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    for cut in range(1, len(text)):
        raw = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": text}]}
        raw["conversations"][1] |= spans((0, cut - 1, True))
        want = sum(last <= cut for _, last in offsets)
        if not want:
            with pytest.raises(DataError, match="no token is entirely inside a trained span"):
                encoder.measure(parse(raw))
            continue
        row = encoder.encode(parse(raw))
        assert int((row.labels_T != UNTRAINED).sum()) == want
        assert encoder.measure(parse(raw)).supervised == want


REFUSED = {
    "half a weight": (talk(first={"weight": 0.5}), "conversations[1].weight", "is 0.5"),
    "a negative weight": (talk(first={"loss_weight": -1}), "conversations[1].loss_weight", "is -1"),
    "a word": (talk(first={"loss": "no"}), "conversations[1].loss", "is a string. Write true or false"),
    "two that differ": (
        talk(first={"loss": True, "weight": 0}),
        "conversations[1].weight",
        "is 0, and loss is True: they differ",
    ),
    "everything": (talk({"train": False}, {"train": False}), "conversations", "every gpt turn is masked"),
    "a question that is to be trained": (
        talk(asked={"train": True}),
        "conversations[0].train",
        "it is a human turn: only answers are trained",
    ),
    "some of a question": (talk(asked=spans((0, 1, True))), "conversations[0].train_detail", "only answers"),
    "a row of no weight": (talk(loss_weight=0), "loss_weight", "is 0 on the whole row"),
    "training on questions": (talk(train_on_inputs=True), "train_on_inputs", "only answers are"),
    "masks by token": (talk(assistant_masks=[0, 1]), "assistant_masks", "Mask whole turns"),
    "spans that do not fit": (
        talk(last=spans((0, 31, True))),
        "conversations[3].train_detail",
        "ends at character 31, and the last character of the text is 30",
    ),
    "spans that run backwards": (talk(last=spans((5, 3, True))), "conversations[3].train_detail[0]", "from 5 to 3"),
    "spans that differ": (
        talk(last=spans((0, 5, True), (5, 9, False))),
        "conversations[3].train_detail",
        "character 5",
    ),
    "a span of half a character": (
        talk(last=spans((0, 1.5, True))),
        "conversations[3].train_detail[0].end_offset",
        "is 1.5",
    ),
    "a span without an end": (
        talk(last={"train_detail": [{"begin_offset": 0}]}),
        "conversations[3].train_detail[0]",
        "is not a span",
    ),
    "spans of parts": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": [{"type": "text", "text": "b"}] * 2, **spans((0, 0, True))},
            ]
        },
        "messages[1].train_detail",
        "needs a turn whose text is one string",
    ),
}


@pytest.mark.parametrize(("raw", "field", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(raw, field, reason):
    with pytest.raises(DataError) as caught:
        parse(raw)
    assert caught.value.row.field == field
    assert reason in caught.value.row.reason


def test_a_span_may_not_cut_a_box(encoder):
    raw = {
        "image": "china.jpg",
        "objects": {"bbox": [[1, 2, 3, 4]]},
        "conversations": [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "At <bbox>."}],
    }
    raw["conversations"][1] |= spans((0, 5, True))
    sample = parse(raw)
    with pytest.raises(DataError, match="begins or ends inside a box"):
        encoder._with_boxes(sample, ())


def test_costs_of_masked_rows_are_kept_apart():
    keys = [
        key_of(parse(raw), lambda path: (0, 0)) for raw in (talk(), talk({"loss": False}), talk(last=spans((0, 9, 1))))
    ]
    assert len(set(keys)) == 3


def test_a_report_asks_for_a_trained_answer():
    assert [turn.field for turn in question_of(parse(talk(last={"loss": False}))).turns] == ["conversations[0]"]
    assert len(question_of(parse(talk())).turns) == 3


def test_preview_and_check_count_what_is_trained(capsys, tmp_path, base):
    path = write_json(tmp_path / "rows.json", [talk(), talk(first={"train": False})])
    assert main(["preview", str(path), "--model_id", str(base), "--index", "0,1", "--json"]) == 0
    whole, masked = json.loads(capsys.readouterr().out)["rows"]
    assert whole["input_ids"] == masked["input_ids"]
    assert 0 < masked["supervised"] < whole["supervised"]
    assert main(["check-data", str(path), "--model_id", str(base), "--workers", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tokens"]["supervised"] == whole["supervised"] + masked["supervised"]
    assert found["warnings"] == []  # not the same rows


# ---- what nothing else says


@pytest.mark.parametrize(
    ("turn", "trained"),
    [
        ({"content": "xy", "train_detail": []}, "all"),
        ({"content": "xy", "train_detail": [{"begin_offset": 0.0, "end_offset": 0.0, "train": True}]}, "some"),
    ],
)
def test_spans_as_tables_write_them(turn, trained):
    sample = parse({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **turn}]})
    assert sample.turns[1].trained == trained


def test_only_the_completion_of_a_prompt_is_trained():
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "mid"}
    sample = parse({"prompt": [asked, said, asked], "completion": [{"role": "assistant", "content": "A cat."}]})
    assert [turn.trained for turn in sample.turns] == ["none", "none", "none", "all"]
    with pytest.raises(DataError, match=r"prompt\[1\].*ends in an answer"):
        parse({"prompt": [asked, said], "completion": [{"role": "assistant", "content": "A cat."}]})


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"weight": 0, "messages": "x"}, "weight: is 0 on the whole row"),
        ({"training": False, "messages": "x"}, "training: is False on the whole row"),
        ({"messages": [{"type": "text", "text": "x", "loss_weight": 0}]}, "loss_weight: is 0 on a part"),
    ],
)
def test_masks_that_stand_where_none_is_read(row, says):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": row["messages"]}]
    with pytest.raises(DataError, match=says):
        parse({**row, "messages": turns})


def test_an_unknown_key_that_is_false_is_a_warning():
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "A", "message_training": False}]
    assert (
        parse({"conversations": turns}).warnings[0][0],
        parse({"conversations": turns}).warnings[0][1][:31],
    ) == ("conversations[1].message_training", "is not read: the key is unknown")


@pytest.mark.parametrize("text", ['<img src="m/cat.jpg">\nq', "![cat](m/cat.jpg)\nq"])
def test_a_picture_of_a_page_is_a_warning_where_nothing_is_shown(text):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "A"}]
    assert "write <image> and name the file" in parse({"conversations": turns}).warnings[0][1]
    shown = [{"from": "human", "value": f"<image>{text}"}, turns[1]]
    assert parse({"conversations": shown, "image": "cat.jpg"}).warnings == (), text
