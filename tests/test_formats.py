"""Rows of other kits: the same rows give the same ids, labels and pixels in every form; and which rows are refused."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from build import row, write_json
from kit_rows import FAMILY, LLAMA_FACTORY, LLAVA, MS_SWIFT, SHAREGPT, _shown, openai, parse, parse_row, same

from vlft.cli.main import main
from vlft.config.row_flags import RowFlags
from vlft.data.files.index import index_rows, parsed
from vlft.data.rows.access import Access
from vlft.data.rows.embedded import Embedded
from vlft.errors import DataError

# ------------------------------------------------------------------------------------- the same rows in every form


@pytest.fixture(scope="module")
def wanted(media, encoder):
    return [encoder.encode(parse_row(raw, media)) for raw in LLAVA]


FORMS = {
    "sharegpt.json": lambda media: SHAREGPT,
    "openai.jsonl": openai,
    "qwen.json": lambda media: openai(media, _shown),
    "llama-factory.json": lambda media: LLAMA_FACTORY,
    "ms-swift.jsonl": lambda media: MS_SWIFT,
    "mixed.jsonl": lambda media: [SHAREGPT[0], openai(media)[1], MS_SWIFT[2]],
}


@pytest.mark.parametrize("name", FORMS)
def test_one_row_in_every_form_is_one_row(name, tmp_path, media, encoder, wanted):
    path = write_json(tmp_path / name, FORMS[name](media))
    access = Access(embedded=Embedded(tmp_path / "kept"))
    rows = parsed(index_rows([str(path)], image_folder=str(media), family=FAMILY, access=access))
    assert rows.bad == ()
    assert [sample.id for sample in rows.samples] == ["two", "system", "text"]
    assert [sample.warnings for sample in rows.samples] == [()] * 3
    for sample, want in zip(rows.samples, wanted, strict=True):
        same(encoder.encode(sample), want)


def test_preview_shows_a_row_of_openais_form(capsys, tmp_path, monkeypatch, media, base, wanted):
    monkeypatch.setenv("VLFT_MEDIA_CACHE", str(tmp_path / "cache"))
    path = write_json(tmp_path / "openai.jsonl", openai(media))
    flags = ["--model_id", str(base), "--image_folder", str(media), "--index", "0", "--json"]
    assert main(["preview", str(path), *flags]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["input_ids"] == wanted[0].input_ids_T.tolist()
    assert shown["labels"] == wanted[0].labels_T.tolist()
    assert [m["field"] for m in shown["media"]] == ["messages[0].content[0]", "messages[0].content[1]"]
    kept = sorted((tmp_path / "cache").rglob("*.jpg"))
    want = sorted((media / name).read_bytes() for name in ("flower.jpg", "astronaut.jpg"))
    assert sorted(file.read_bytes() for file in kept) == want  # bytes unchanged, each file once


def test_an_embedded_picture_is_written_once(tmp_path, media):
    embedded = Embedded(tmp_path)
    text = base64.b64encode((media / "china.jpg").read_bytes()).decode()
    path = embedded.file_of(f"data:image/jpeg;base64,{text}")
    before = (tmp_path / path).stat().st_mtime_ns
    assert embedded.file_of(f"data:;base64,{text}") == path
    assert (tmp_path / path).stat().st_mtime_ns == before
    assert path.endswith(".jpg")


def test_parts_and_columns_in_one_row():
    """A part with a file shows that file; a part without one, and a tag, show the next file of the column."""
    content = [{"type": "image"}, {"type": "text", "text": "or <image> or"}, {"type": "image", "image": "c.jpg"}]
    raw = {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}],
        "images": ["a.jpg", "b.jpg"],
    }
    assert [part.path for part in parse(raw).media] == ["pics/a.jpg", "pics/b.jpg", "pics/c.jpg"]


def test_frames_in_a_part_are_one_video():
    content = [{"type": "video", "video": ["file:///f/0.jpg", "1.jpg"]}, {"type": "text", "text": "What?"}]
    raw = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]}
    (video,) = parse(raw).media
    assert video.frames == ("/f/0.jpg", "pics/1.jpg")
    assert video.field == "messages[0].content[0]"


# --------------------------------------------------------------------------------------------------------- refused


def asked(*parts, answer="b", **keys):
    turns = [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": answer}]
    return {"messages": turns, **keys}


def answered(**keys):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", **keys}]}


REFUSED = {
    "sound": (row(audios=["a.wav"]), "audios", "holds sound"),
    "a part of sound": (asked({"type": "input_audio", "input_audio": {}}), "messages[0].content[0]", "'input_audio'"),
    "a part without a type": (asked({"file": "a"}), "messages[0].content[0]", "a part without a type"),
    "a part that is no object": (asked(3), "messages[0].content[0]", "is a number, not a part"),
    "a part of two files": (
        asked({"type": "image", "image": "a.jpg", "url": "b.jpg"}),
        "messages[0].content[0]",
        "names two files: 'a.jpg' and 'b.jpg'",
    ),
    "a text part of a number": (asked({"type": "text", "text": 3}), "messages[0].content[0].text", "is a number"),
    "control tokens in a part": (asked({"type": "text", "text": "<|im_end|>"}), "messages[0].content[0].text", "holds"),
    "a part for a file that is not there": (
        asked({"type": "image"}),
        "messages[0].content[0]",
        '1 <image> tag, no paths in "image"',
    ),
    "a picture in an answer": (
        asked({"type": "text", "text": "a"}, answer=[{"type": "image", "image": "a.jpg"}]),
        "messages[1].content[0]",
        "a picture or video in an assistant turn",
    ),
    "an answer of no parts": (asked({"type": "text", "text": "a"}, answer=[]), "messages[1].content", "is empty"),
    "tools": (row(tools='[{"name": "f"}]'), "tools", "call tools that its prompt does not name"),
    "a call of a tool": (answered(tool_calls=[{"id": 1}]), "messages[1].tool_calls", "is not read"),
    "an answer not to be trained": (answered(loss=False), "messages", "every gpt turn is masked, so nothing to learn"),
    "an answer of half a weight": (answered(weight=0.5), "messages[1].weight", "is 0.5: a turn is trained (1) or not"),
    "preference": ({**row(), "chosen": {"from": "gpt", "value": "b"}}, "chosen", "is outside the conversation"),
    "a bad answer": (row(label=False), "label", "it marks a bad answer"),
    "a bad answer, LLaMA-Factory": (row(kto_tag=False), "kto_tag", "it marks a bad answer"),
    "two system turns": (
        {"system": "b", "messages": [{"role": "system", "content": "a"}, *answered()["messages"]]},
        "system",
        "differs from the system turn messages[0]",
    ),
    "alpaca without an answer": ({"instruction": "a", "output": ""}, "output", "the answer is empty"),
    "alpaca of numbers": ({"instruction": 3, "output": "b"}, "instruction", "is a number, not a string"),
    "an answer that is a number": ({"query": "a", "response": 3}, "response", "is a number, not a string"),
    "history of strings": ({"query": "a", "response": "b", "history": ["a"]}, "history[0]", "not a [question, answer]"),
    "history that is a string": ({"query": "a", "response": "b", "history": "a"}, "history", "is a string, not a list"),
    "half an answer in history": (
        {"query": "a", "response": "b", "history": [["a", None]]},
        "history[0][1]",
        "is null. Fill it in",
    ),
    "an embedded text": (row("<image>", image="data:text/plain,abc"), "image", "is not written data:image"),
    "embedded, and cut": (row("<image>", image="data:;base64,QUJ"), "image", "is not complete base64"),
    "embedded nothing": (row("<image>", image="data:;base64,"), "image", "is empty"),
    "bytes that are no base64": (row("<image>", images=[{"bytes": "?"}]), "images[0]", "is not complete base64"),
    "resized_height": (row("<image>", image="a.jpg", resized_height=280), "resized_height", "Use min_pixels and max"),
}


@pytest.mark.parametrize(("raw", "field", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused(raw, field, reason, tmp_path):
    with pytest.raises(DataError) as caught:
        parse(raw, embedded=Embedded(tmp_path))
    bad = caught.value.row
    assert (bad.file, bad.index, bad.field) == ("data/t.json", 3, field)
    assert reason in bad.reason


def test_one_thing_said_twice_and_alike_is_taken():
    raw = {**row("<image>hm", image="a.jpg", images=["a.jpg"]), "system": "s"}
    raw["conversations"].insert(0, {"from": "system", "value": "s"})
    sample = parse(raw)
    assert [turn.role for turn in sample.turns] == ["system", "user", "assistant"]
    assert [part.path for part in sample.media] == ["pics/a.jpg"]


def test_columns_of_other_rows_of_a_table_do_not_disturb():
    """In a table, every row has every column; null and empty values count as absent."""
    idle = dict.fromkeys(("instruction", "output", "query", "images", "audios", "objects", "fps", "system", "tools"))
    part = {"type": "text", "text": "a", "image_url": None, "image": None, "min_pixels": None}
    sample = parse({**idle, **asked(part), "history": [], "videos": []})
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]
    assert sample.warnings == ()


def _rows_in(text):
    in_tables = re.findall(r"\| `({\".*?})` \|", text.replace("\\|", "|"))
    blocks = [json.loads(block) for block in [*re.findall(r"```json\n(.*?)```", text, re.DOTALL), *in_tables]]
    return [raw for block in blocks for raw in (block if isinstance(block, list) else [block])]


def test_the_readmes_rows_are_taken():
    text = (Path(__file__).parent.parent / "data" / "README.md").read_text(encoding="utf-8")
    plain, _, rest = text.partition("<!-- preference forms: begin -->")
    preferred, _, rest = rest.partition("<!-- preference forms: end -->")
    samples = [parse(raw) for raw in _rows_in(plain + rest)]
    assert len(samples) >= 14
    pairs = [parse(raw, flags=RowFlags(pairs=True)) for raw in _rows_in(preferred)]
    assert len(pairs) >= 10
    assert all(pair.rejected for pair in pairs)
    samples += pairs
    assert [sample.warnings for sample in samples] == [()] * len(samples)
    assert all(sample.media for sample in samples)
