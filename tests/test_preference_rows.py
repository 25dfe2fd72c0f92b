"""Preference rows: the forms of all kits give the same row, and faults name the field and both values."""

from __future__ import annotations

import csv
import io
import json
import re
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from build import FAMILY, write_image, write_json
from pyarrow import parquet

from vlft.cli.main import main
from vlft.config.row_flags import RowFlags
from vlft.data.files.index import index_rows, parsed
from vlft.data.rows.forms import PAIR_FORMS
from vlft.data.rows.records import parse_record
from vlft.data.sample import Image, Text
from vlft.errors import DataError

PAIRS = RowFlags(pairs=True)


def parse(raw, flags=PAIRS):
    return parse_record(raw, file="t.json", index=0, image_folder="pics", family=FAMILY, flags=flags)


def brief(part):
    if isinstance(part, Text):
        return part.text
    return f"<{part.path}>" if isinstance(part, Image) else f"<{part.path or list(part.frames)}>"


def shape(turns):
    return [(turn.role, [brief(part) for part in turn.parts]) for turn in turns]


def refusal(raw, flags=PAIRS):
    with pytest.raises(DataError) as caught:
        parse(raw, flags)
    return caught.value.row


CAT = [("user", ["<pics/cat.jpg>", "What is it?"]), ("assistant", ["A cat."])]
DOG = [("assistant", ["A dog."])]


@pytest.mark.parametrize("form", PAIR_FORMS, ids=lambda form: "+".join(form.keys))
def test_the_examples_of_the_table_are_one_row(form):
    sample = parse(form.example)
    assert shape(sample.turns) == CAT
    assert shape(sample.rejected) == DOG
    assert sample.warnings == ()
    assert [turn.trained for turn in (*sample.turns, *sample.rejected)] == ["none", "all", "all"]


# ------------------------------------------------------------------------------------------------------------ shapes


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


HUMAN, ASKED = {"from": "human", "value": "<image>What is it?"}, "<image>What is it?"
PLAIN = {"image": "cat.jpg", "prompt": ASKED, "chosen": "A cat.", "rejected": "A dog."}
TRL = {"images": ["cat.jpg"], "prompt": [user("What is it?")], "chosen": [said("A cat.")], "rejected": [said("A dog.")]}
WHOLE = {"chosen": [user(ASKED), said("A cat.")], "rejected": [user(ASKED), said("A dog.")], "image": "cat.jpg"}
RANKED = {
    "image": "cat.jpg",
    "conversations": [HUMAN],
    "chosen": {"from": "gpt", "value": "A cat."},
    "rejected": {"from": "gpt", "value": "A dog."},
}
SWIFT = {"image": "cat.jpg", "messages": WHOLE["chosen"], "rejected_response": "A dog."}
BOTH = {"chosen": "A cat.", "rejected": "A dog."}

SAME = {
    "TRL's parts": {**TRL, "prompt": [user([{"type": "image"}, {"type": "text", "text": "What is it?"}])]},
    "one question beside whole conversations (ultrafeedback)": {**WHOLE, "prompt": ASKED, "messages": WHOLE["chosen"]},
    "the prompt beside whole conversations": {**WHOLE, "prompt": [user(ASKED)]},
    "one of the two whole": {**PLAIN, "chosen": WHOLE["chosen"]},
    "the chosen answer also ends the messages": {
        **WHOLE,
        "messages": WHOLE["chosen"],
        "chosen": "A cat.",
        "rejected": "A dog.",
    },
    "LLaMA-Factory in a CSV": {
        **RANKED,
        **{key: json.dumps(RANKED[key]) for key in ("conversations", "chosen", "rejected")},
    },
    "older datasets": {**WHOLE, "chosen": {"role": ["user", "assistant"], "content": [ASKED, "A cat."]}},
    "columns of other rows": {
        **SWIFT,
        "chosen": None,
        "rejected": None,
        "rejected_messages": [],
        "rejected_images": [],
    },
    "the same pictures": {**SWIFT, "rejected_images": ["cat.jpg"]},
    "rejected messages": {
        **SWIFT,
        "rejected_response": None,
        "rejected_messages": [user("What is it?"), said("A dog.")],
    },
    "RLHF-V parsed": {
        "image": "cat.jpg",
        "text": {"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."},
    },
    "alpaca": {
        "image": "cat.jpg",
        "instruction": "<image>",
        "input": "What is it?",
        "chosen": "A cat.",
        "rejected": "A dog.",
    },
}


@pytest.mark.parametrize("name", SAME)
def test_other_ways_to_write_it(name):
    sample = parse(SAME[name])
    assert shape(sample.turns) == CAT
    assert shape(sample.rejected) == DOG
    assert sample.warnings == ()


SEVERAL = {
    "strings": {**PLAIN, "rejected": ["A dog.", "A cow."]},
    "turns": {**RANKED, "rejected": [RANKED["rejected"], {"from": "gpt", "value": "A cow."}]},
    "lists of turns": {**TRL, "rejected": [[said("A dog.")], [said("A cow.")]]},
    "whole conversations": {**WHOLE, "rejected": [WHOLE["rejected"], [user(ASKED), said("A cow.")]]},
    "ms-swift": {**SWIFT, "rejected_response": ["A dog.", "A cow."]},
}


@pytest.mark.parametrize("name", SEVERAL)
def test_several_rejected_answers(name):
    sample = parse(SEVERAL[name])
    assert shape(sample.turns) == CAT
    assert shape(sample.rejected) == [*DOG, ("assistant", ["A cow."])]
    assert len({turn.field for turn in sample.rejected}) == 2


def test_only_the_last_answers_are_trained():
    answers = {"chosen": "Yes.", "rejected": "No."}
    before = [{"role": "system", "content": "Be brief."}, user(ASKED), said("A cat."), user("Sure?")]
    rows = [
        {"image": "cat.jpg", "chosen": [*before, said("Yes.")], "rejected": [*before, said("No.")]},
        {"image": "cat.jpg", "messages": [*before, said("Yes.")], "rejected_response": "No."},
        {"image": "cat.jpg", "messages": before, "chosen": said("Yes."), "rejected": said("No.")},
        {"image": "cat.jpg", "prompt": before, "chosen": "Yes.", "rejected": "No."},
        {"system": "Be brief.", "question": "Sure?", "history": [[ASKED, "A cat."]], **answers},
    ]
    rows[-1]["image"] = "cat.jpg"
    for sample in map(parse, rows):
        assert [turn.role for turn in sample.turns] == ["system", "user", "assistant", "user", "assistant"]
        assert [turn.trained for turn in sample.turns] == ["none"] * 4 + ["all"]
        assert [turn.trained for turn in sample.rejected] == ["all"]


def test_answers_that_look_like_turns_in_json_are_text():
    boxes = '[{"bbox_2d": [1, 2, 3, 4], "label": "cat"}]'
    sample = parse({**PLAIN, "chosen": boxes, "rejected": "{}"})
    assert shape(sample.turns)[-1] == ("assistant", [boxes])
    assert shape(sample.rejected) == [("assistant", ["{}"])]


def test_videos():
    sample = parse({"video": "a.mp4", "question": "What happens?", "chosen": "A jump.", "rejected": "A fall."})
    assert shape(sample.turns)[0] == ("user", ["<pics/a.mp4>", "What happens?"])
    sample = parse(
        {"videos": ["a.mp4"], **RANKED, "image": None, "conversations": [{**HUMAN, "value": "<video>What?"}]}
    )
    assert shape(sample.turns)[0] == ("user", ["<pics/a.mp4>", "What?"])


# ---------------------------------------------------------------------------------------------------------- refusals

BAD = {
    "equal": ({**PLAIN, "rejected": "A cat."}, "rejected", "is the same answer as chosen: 'A cat.' and 'A cat.'"),
    "equal, one of several": ({**PLAIN, "rejected": ["A dog.", "A cat."]}, "rejected[1]", "same answer as chosen"),
    "equal rejected ones": ({**PLAIN, "rejected": ["A dog.", "A dog."]}, "rejected[1]", "same answer as rejected[0]"),
    "equal beside messages": ({**SWIFT, "rejected_response": "A cat."}, "rejected_response", "as messages[1].content"),
    "empty chosen": ({**PLAIN, "chosen": ""}, "chosen", "the answer is empty"),
    "blank rejected": ({**PLAIN, "rejected": " \n"}, "rejected", "the answer is blank"),
    "empty in a turn": ({**RANKED, "rejected": {"from": "gpt", "value": ""}}, "rejected.value", "the answer is empty"),
    "no answers": ({**TRL, "rejected": []}, "rejected", "is empty. Write the answer"),
    "no chosen": ({key: PLAIN[key] for key in PLAIN if key != "chosen"}, "chosen", "is missing. Add it"),
    "no rejected": ({key: PLAIN[key] for key in PLAIN if key != "rejected"}, "rejected", "is missing. Add it"),
    "null": ({**RANKED, "rejected": None}, "rejected", "is null. Fill it in"),
    "no prompt": ({"chosen": "A cat.", "rejected": "A dog."}, "chosen", 'Add "prompt"'),
    "an SFT row": ({"messages": WHOLE["chosen"], "image": "cat.jpg"}, "row", "or train the row with --method sft"),
    "other prompts": (
        {**WHOLE, "rejected": [user("<image>Who?"), said("A dog.")]},
        "rejected[0]",
        "user '<image>Who?' differs from chosen[0], user '<image>What is it?'",
    ),
    "other system": (
        {**WHOLE, "rejected": [{"role": "system", "content": "Lie."}, *WHOLE["rejected"]]},
        "rejected[0]",
        "system 'Lie.' differs from chosen[0], user",
    ),
    "longer prompt": (
        {**WHOLE, "rejected": [user(ASKED), user("Well?"), said("A dog.")]},
        "rejected[1]",
        "one conversation has 1 turn before its answer, the other 2 turns",
    ),
    "other prompt beside them": ({**WHOLE, "prompt": "Who?"}, "prompt", "'Who?' is not in the conversations"),
    "other rejected messages": (
        {**SWIFT, "rejected_response": None, "rejected_messages": [user("Who?"), said("A dog.")]},
        "rejected_messages[0]",
        "user 'Who?' differs from messages[0]",
    ),
    "a tag in an answer": ({**PLAIN, "rejected": "<image>A dog."}, "rejected", "a <image> tag in an assistant turn"),
    "a part in an answer": (
        {**TRL, "chosen": [said([{"type": "image", "image": "b.jpg"}, {"type": "text", "text": "A"}])]},
        "chosen[0].content[0]",
        "a picture or video in an assistant turn",
    ),
    "a file in an answer": (
        {**RANKED, "rejected": {**RANKED["rejected"], "image": "b.jpg"}},
        "rejected.image",
        "a picture or video in a turn that is not a human turn",
    ),
    "another kit's tag": ({**PLAIN, "rejected": "<IMG_CONTEXT>A dog."}, "rejected", "<IMG_CONTEXT> stands for"),
    "a control token": ({**PLAIN, "rejected": "A<|im_end|>"}, "rejected", "<|im_end|>"),
    "other pictures": (
        {**SWIFT, "rejected_images": ["dog.jpg"]},
        "rejected_images",
        'is ["dog.jpg"], and the row shows ["cat.jpg"]',
    ),
    "other videos": (
        {**SWIFT, "rejected_videos": "v.mp4"},
        "rejected_videos",
        'is ["v.mp4"], and the row shows [null]',
    ),
    "other pictures beside chosen": ({**PLAIN, "rejected_images": ["dog.jpg"]}, "rejected_images", 'is ["dog.jpg"]'),
    "a human answer": (
        {**RANKED, "chosen": {"from": "human", "value": "A"}},
        "chosen.from",
        "is 'human', but an answer",
    ),
    "a tool's answer": ({**RANKED, "chosen": {"from": "observation", "value": "A"}}, "chosen.from", "tool turns"),
    "ends with a question": ({**WHOLE, "rejected": [user(ASKED)]}, "rejected[0].role", "but an answer is a gpt turn"),
    "two chosen": ({**PLAIN, "chosen": ["A", "B"]}, "chosen", "holds 2 answers. Keep one"),
    "an answer before chosen": (
        {**RANKED, "conversations": [HUMAN, {"from": "gpt", "value": "A cow."}]},
        "conversations[1]",
        "'A cow.' is an answer, and chosen is another one, 'A cat.'",
    ),
    "swift without an answer": (
        {**SWIFT, "messages": [user(ASKED)]},
        "messages[0]",
        'so "rejected_response" has no chosen answer beside it',
    ),
    "a number": ({**PLAIN, "rejected": 3}, "rejected", "is a number, not an answer"),
    "masked": ({**RANKED, "rejected": {**RANKED["rejected"], "loss": False}}, "rejected", "is masked"),
    "not JSON": ({"text": '{"question": ', "image": "cat.jpg"}, "text", "is a string that is not JSON"),
    "JSON without an answer": ({"text": '{"question": "a", "chosen": "b"}'}, "text.rejected", "is missing"),
    "equal in JSON": (
        {"text": json.dumps({"question": "a", "chosen": "b", "rejected": "b"})},
        "text.rejected",
        "same answer as text.chosen",
    ),
    "both conversations": ({**RANKED, "messages": [user("Who?")]}, "conversations", "and they differ"),
    "an object in an answer": (
        {**PLAIN, "rejected": "<bbox>", "objects": {"ref": [], "bbox": [[1, 2, 3, 4]]}},
        "rejected",
        "in the prompt of a preference row only",
    ),
    "marked bad": ({**PLAIN, "label": False}, "label", "it marks a bad answer"),
}


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    raw, field, why = BAD[name]
    row = refusal(raw)
    assert row.field == field
    assert why in row.reason


@pytest.mark.parametrize("form", PAIR_FORMS, ids=lambda form: "+".join(form.keys))
def test_without_the_method_rows_are_read_as_before_or_name_it(form):
    if "rejected_response" in form.keys or "rejected_messages" in form.keys:
        sample = parse(form.example, RowFlags())
        assert shape(sample.turns) == CAT
        assert sample.rejected == ()
        assert [(field, remark.split(":")[0]) for field, remark in sample.warnings] == [(form.keys[-1], "is not read")]
    else:
        assert "--method dpo" in refusal(form.example, RowFlags()).reason


# ------------------------------------------------------------------------------------------------- files of all kinds


@pytest.fixture
def photo(tmp_path, monkeypatch):
    monkeypatch.setenv("VLFT_MEDIA_CACHE", str(tmp_path / "cache"))
    return write_image(tmp_path / "data" / "cat.jpg")


def read(path, flags=PAIRS):
    rows = parsed(index_rows([str(path)], image_folder=None, family=FAMILY, flags=flags))
    assert rows.bad == ()
    return rows.samples


def test_parquet_of_rlaif_v_and_rlhf_v(photo, tmp_path):
    image = {"bytes": photo.read_bytes(), "path": "cat.jpg"}
    beside = {"ds_name": "RLAIF-V", "origin_dataset": "VQA", "origin_split": "{}", "idx": 3, "image_path": "cat.jpg"}
    answers = {"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    rlaif, rlhf = {"image": image, **answers, **beside}, {"image": image, "text": json.dumps(answers), **beside}
    for name, row in (("rlaif.parquet", rlaif), ("rlhf.parquet", rlhf)):
        parquet.write_table(pa.Table.from_pylist([row, row]), tmp_path / name)
        for sample in read(tmp_path / name):
            assert [turn.trained for turn in (*sample.turns, *sample.rejected)] == ["none", "all", "all"]
            assert shape(sample.turns)[1:] + shape(sample.rejected) == [CAT[1], *DOG]
            assert Path(sample.media[0].path).read_bytes() == photo.read_bytes()
            assert sample.warnings == ()


def test_arrow_tar_and_csv(photo, tmp_path):
    table = pa.Table.from_pylist(
        [{**RANKED, "image": {"bytes": photo.read_bytes(), "path": None}}, {"image": None, **HELLO}]
    )
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        row = {"prompt": "What is it?", "chosen": "A cat.", "rejected": ["A dog.", "A cow."]}
        for name, data in (("0.jpg", photo.read_bytes()), ("0.json", json.dumps(row).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with open(photo.parent / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([list(PLAIN), PLAIN.values()])
    arrow, tar, cells = read(tmp_path / "a.arrow"), read(tmp_path / "a.tar"), read(photo.parent / "a.csv")
    assert [len(sample.rejected) for sample in (*arrow, *tar, *cells)] == [1, 1, 2, 1]
    for sample in (arrow[0], tar[0], cells[0]):
        assert Path(sample.media[0].path).read_bytes() == photo.read_bytes()
        assert shape(sample.turns)[1:] + shape(sample.rejected)[:1] == [CAT[1], *DOG]


HELLO = {
    "conversations": [{"from": "human", "value": "Hi."}],
    "chosen": {"from": "gpt", "value": "Hello."},
    "rejected": {"from": "gpt", "value": "Go."},
}


# ------------------------------------------------------------------------------------------------------------- verbs


def run(capsys, *argv, status=0):
    assert main([str(word) for word in argv]) == status
    return capsys.readouterr()


def checked(capsys, tmp_path, rows, *argv, status=0):
    path = write_json(tmp_path / "data" / "rows.json", rows)
    said = ("check-data", path, "--method", "dpo", "--workers", "0", *argv)
    return run(capsys, *said, status=status).out


def pair(question, chosen, rejected):
    return {"prompt": question, "chosen": chosen, "rejected": rejected}


def test_swapped_answers_are_found_and_counted(capsys, tmp_path, photo):
    write_image(photo.parent / "dog.jpg", name="chelsea")
    shown, other = {**PLAIN, "prompt": "What is it?"}, {**PLAIN, "prompt": "What is it?", "image": "dog.jpg"}
    rows = [pair("Hi.", "Hello.", "Go."), shown, pair("Hi.", "Go.", "Hello."), pair("Bye.", "Go.", "Hello.")]
    rows += [{**other, "chosen": "A dog.", "rejected": "A cat."}, {**shown, "chosen": "A dog.", "rejected": "A cat."}]
    rows += [{**shown, "chosen": "A cow.", "rejected": ["A cat.", "A dog."]}, {**PLAIN, "rejected": "A cat."}]
    found = json.loads(checked(capsys, tmp_path, rows, "--json", status=1))
    assert [row["index"] for row in found["warnings"]] == [2, 5]
    assert "rows.json[0], with the other answer chosen" in found["warnings"][0]["reason"]
    assert found["pairs"] == {"pairs": 8, "longer_chosen": 1, "uneven": 0, "swapped": 2, "warnings": []}
    assert [row["index"] for row in found["bad"]] == [7]
    text = checked(capsys, tmp_path, rows, "--headers_only", status=1)
    assert "8 pairs of answers, the chosen one is longer in 12%; 2 rows swap the answers of an earlier row" in text


@pytest.mark.parametrize(("short", "told"), [(1, False), (2, True)])
def test_pairs_of_very_different_lengths_are_a_warning(capsys, tmp_path, short, told):
    rows = [pair(f"{i}?", "b" * 80, "a" * (10 if i < short else 11)) for i in range(3)]  # 8 times as long is above e^2
    text = checked(capsys, tmp_path, rows)
    assert ("the model may learn to prefer a length" in text) == told
    if told:
        assert "in 2 of 3 pairs one answer is more than 7 times as long" in text


def test_rows_that_differ_in_a_rejected_answer_do_not_repeat(capsys, tmp_path):
    rows = [pair("Hi.", "Hello.", "Go."), pair("Hi.", "Hello.", "No."), pair("Hi.", "Hello.", "Go.")]
    found = json.loads(checked(capsys, tmp_path, rows, "--json"))
    assert [(row["index"], row["reason"].split(" as ")[0]) for row in found["warnings"]] == [
        (2, "the same turns and pictures")
    ]


def test_fixed_rows_are_the_same_pairs(capsys, tmp_path, photo):
    bare = {"image": "cat.jpg", "messages": [user("What is it?"), said("A cat.")]}
    whole = {**bare, "rejected_messages": [user("What is it?"), said("A dog.")]}
    ranked = {**RANKED, "conversations": [{**HUMAN, "value": "What is it?"}]}
    rows = [whole, ranked, {**bare, "rejected_response": "A dog."}, {**PLAIN, "prompt": "What is it?"}, WHOLE]
    out = photo.parent / "fixed.jsonl"
    checked(capsys, tmp_path, rows, "--missing_tags", "first", "--fix", out)
    fixed = read(out)
    assert [shape(one.turns)[1:] + shape(one.rejected) for one in fixed] == [[CAT[1], *DOG]] * 5
    assert [len(one.media) for one in fixed] == [1] * 5


def test_the_report_counts_pairs(capsys, tmp_path):
    checked(capsys, tmp_path, [pair("Hi.", "Hello.", "Go.")], "--report", tmp_path / "look")
    assert json.loads((tmp_path / "look" / "report.json").read_text())["pairs"]["pairs"] == 1
    assert "chosen is longer" in (tmp_path / "look" / "report.html").read_text()


def test_preview_labels_both_answers(capsys, tmp_path, monkeypatch):
    path = write_json(tmp_path / "rows.json", [pair("What is it?", "A cat.", ["A dog.", "A cow."])])
    argv = ("preview", path, "--method", "dpo")
    out = run(capsys, *argv, "--html", tmp_path / "page.html").out
    assert "What is it?" in out.partition("--- chosen ---")[0]
    parts = re.split(r"--- (.*) ---", out)
    assert parts[1::2] == ["chosen", "rejected", "rejected 2"]
    assert [part.strip() for part in parts[2::2]] == [f"assistant: ⟦{one}⟧" for one in ("A cat.", "A dog.", "A cow.")]
    page = (tmp_path / "page.html").read_text()
    assert re.findall('class="answer">(.*?)<', page) == ["chosen", "rejected", "rejected 2"]
    assert "<mark>A cat.</mark>" in page
    assert '<mark class="other">A cow.</mark>' in page
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = run(capsys, *argv).out
    assert "\x1b[1;32mA cat." in out
    assert "\x1b[1;35mA dog." in out
    found = json.loads(run(capsys, *argv, "--json").out)
    assert [word in found["text"] for word in ("A cat.", "A dog.", "A cow.")] == [True] * 3


def test_preview_of_a_row_with_one_answer_names_the_way_out(capsys, photo):
    path = write_json(photo.parent / "rows.json", [{"messages": WHOLE["chosen"], "image": "cat.jpg"}, PLAIN])
    assert "--method sft" in run(capsys, "preview", path, "--method", "simpo", status=1).err
    assert "--method dpo" in run(capsys, "preview", path, "--index", "1", status=1).err
    assert "--- chosen ---" in run(capsys, "preview", path, "--index", "1", "--method", "orpo").out
