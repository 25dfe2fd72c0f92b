"""All forms in the table of data/README.md give the same row; words, keys, roles and addresses of other kits."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import yaml
from build import FAMILY, row, write_image, write_json

from vlft.cli.main import main
from vlft.config.mix import read_mix
from vlft.config.row_flags import RowFlags
from vlft.data.files.index import index_rows, parsed
from vlft.data.rows.access import Access
from vlft.data.rows.embedded import Embedded
from vlft.data.rows.forms import FORMS, with_table
from vlft.data.rows.keys import HARMLESS_KEYS
from vlft.data.rows.records import parse_record
from vlft.data.sample import Image, Text, Video
from vlft.errors import ConfigError, DataError

FIRST = RowFlags(missing_tags="first")
README = Path(__file__).parent.parent / "data" / "README.md"


def parse(raw, *, folder="pics", embedded=None, **keys):
    access = None if embedded is None else Access(embedded=Embedded(embedded))
    return parse_record(raw, file="t.json", index=0, image_folder=folder, family=FAMILY, access=access, **keys)


def shape(sample):
    return [(turn.role, [brief(part) for part in turn.parts]) for turn in sample.turns]


def brief(part):
    if isinstance(part, Text):
        return part.text
    return f"<{part.path}>" if isinstance(part, Image) else f"<{part.path or list(part.frames)}>"


def refusal(raw, **keys):
    with pytest.raises(DataError) as caught:
        parse(raw, **keys)
    return caught.value.row


# ----------------------------------------------------------------------------------------------------------- forms

CAT = [("user", ["<pics/cat.jpg>", "What is it?"]), ("assistant", ["A cat."])]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form.keys))
def test_the_examples_of_the_table_are_one_row(form):
    sample = parse(form.example)
    assert shape(sample) == CAT
    assert sample.warnings == ()


def test_the_table_of_the_readme_is_that_of_the_code():
    """To update the README: python -m vlft.data.rows.forms data/README.md"""
    text = README.read_text(encoding="utf-8")
    assert with_table(text) == text
    assert all(form.kits in text for form in FORMS)


TURNS = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "A cat."}]
OPENAI = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "A cat."}]


def worded(word):
    return [{"from": "human", "value": f"{word}\nWhat is it?"}, TURNS[1]]


def parts(*some):
    said = {"type": "text", "text": "What is it?"}
    return {"messages": [{"role": "user", "content": [*some, said]}, OPENAI[1]]}


ALIKE = {
    "a JSON string": {"image": "cat.jpg", "conversations": json.dumps(TURNS)},
    "an object of lists": {
        "image": "cat.jpg",
        "conversations": {"from": ["human", "gpt"], "value": ["<image>What is it?", "A cat."]},
    },
    "an object of lists, as OpenAI's": {
        "image": "cat.jpg",
        "messages": {"role": ["user", "assistant"], "content": ["<image>What is it?", "A cat."]},
    },
    "TRL, strings": {"image": "cat.jpg", "prompt": "What is it?", "completion": "A cat."},
    "TRL, tags": {"image": "cat.jpg", "prompt": "<image>What is it?", "completion": "A cat."},
    "the_cauldron, two names": {"images": ["cat.jpg"], "texts": [{"question": "What is it?", "answer": "A cat."}]},
    "pairs of Phi-3": {
        "conversations": [{"images": ["cat.jpg"], "user": "<|image_1|>\nWhat is it?", "assistant": "A cat."}]
    },
    "MiniCPM": {"image": {"<image_00>": "cat.jpg"}, "conversations": worded("<image_00>")},
    "a picture of the turn": {"conversations": [{**TURNS[0], "image": "cat.jpg"}, TURNS[1]]},
    "pictures of the turn": {"messages": [{**OPENAI[0], "images": [{"path": "cat.jpg"}]}, OPENAI[1]]},
    "Qwen-VL": {"conversations": [{"from": "user", "value": "<img>cat.jpg</img>\nWhat is it?"}, TURNS[1]]},
    "parts under value": parts({"type": "image_url", "value": "cat.jpg"}),
    "parts of llava-instruct-mix": {**parts({"type": "image", "index": 0, "text": None}), "images": ["cat.jpg"]},
    "Anthropic, an address": parts({"type": "image", "source": {"type": "url", "url": "cat.jpg"}}),
    "a url": {"images": [{"url": "cat.jpg"}], "messages": OPENAI},
    "an object with image": {"images": [{"image": "cat.jpg"}], "messages": OPENAI},
    "an object with file_name": {"image": {"file_name": "cat.jpg"}, "messages": OPENAI},
    **{
        key: {key: "cat.jpg", "conversations": TURNS}
        for key in ("image_path", "image_url", "file_name", "img", "img_path", "image_file")
    },
    **{
        f"roles {user}, {gpt}": {
            "image": "cat.jpg",
            "conversations": [{**TURNS[0], "from": user}, {**TURNS[1], "from": gpt}],
        }
        for user, gpt in zip(
            ("User", "HUMAN", "user", "human", "human"), ("Assistant", "model", "bot", "AI", "gpt4"), strict=True
        )
    },
    **{
        f"{word} for the file": {"image": "cat.jpg", "conversations": worded(word)}
        for word in (
            *("<IMG_CONTEXT>", "<ImageHere>", "<Image>", "<IMAGE>", "<|image|>", "[IMG]", "<start_of_image>", "<img>"),
            *("<|image_1|>", "<image_0>", "<image 1>"),
        )
    },
}


@pytest.mark.parametrize("raw", ALIKE.values(), ids=ALIKE)
def test_other_ways_to_write_it_are_the_same_row(raw):
    sample = parse(raw)
    assert shape(sample) == CAT
    assert sample.warnings == ()


def test_llava_next_writes_image_for_a_video():
    sample = parse(row("<image>\nWhat?", video="a.mp4"))
    assert shape(sample)[0] == ("user", ["<pics/a.mp4>", "What?"])
    assert isinstance(sample.media[0], Video)
    assert shape(parse(row("<image><image>", video=["a.mp4", "b.mp4"])))[0][1] == ["<pics/a.mp4>", "<pics/b.mp4>"]
    assert isinstance(parse(row("<image>", video=["0.jpg", "1.jpg"])).media[0], Video)
    assert "1 <image> tag" in refusal(row("<image>What?", video=["a.mp4", "b.mp4"])).reason


def test_a_video_in_the_text():
    assert shape(parse(row("<video>a.mp4</video>\nWhat?")))[0] == ("user", ["<pics/a.mp4>", "What?"])
    # With a list of videos, <video> is always a tag.
    assert shape(parse(row("<video>x</video>", video="a.mp4")))[0] == ("user", ["<pics/a.mp4>", "x</video>"])


def test_numbers_say_which_picture():
    files = {"<image_00>": "a.jpg", "<image_01>": "b.jpg"}
    raw = row("<image_01> or <image_00>?", "In <image_01> it is.", image=files)
    assert shape(parse(raw)) == [
        ("user", ["<pics/b.jpg>", " or ", "<pics/a.jpg>", "?"]),
        ("assistant", ["In <image_01> it is."]),
    ]
    assert shape(parse(row("<|image_2|><|image_1|>", images=["a.jpg", "b.jpg"])))[0][1] == [
        "<pics/b.jpg>",
        "<pics/a.jpg>",
    ]
    assert "2 times" in refusal(row("<|image_1|><|image_3|>", images=["a.jpg", "b.jpg"])).reason
    assert "has no tag" in refusal(row("<image_00>", image=files)).reason
    assert "Number all tags or none" in refusal(row("<image><image_01>", image=files)).reason
    index = [{"type": "image", "index": 1}, {"type": "image", "index": 0}]
    swapped = {"images": ["a.jpg", "b.jpg"], "messages": [{"role": "user", "content": index}, OPENAI[1]]}
    assert shape(parse(swapped))[0][1] == ["<pics/b.jpg>", "<pics/a.jpg>"]
    swapped["images"].pop()
    assert "shows image 1, counted from 0, and the row has 1" in refusal(swapped).reason


def test_pictures_of_turns_stay_with_their_turns():
    raw = {
        "image": "row.jpg",
        "conversations": [
            {"from": "human", "value": "<image>a", "image": "own.jpg"},
            {"from": "gpt", "value": "b"},
            {"from": "human", "value": "<image>c"},
            {"from": "gpt", "value": "d"},
        ],
    }
    assert [part.path for part in parse(raw).media] == ["pics/own.jpg", "pics/row.jpg"]
    raw["conversations"][0]["value"] = "a"
    assert refusal(raw).field == "conversations[0].image"
    raw["conversations"][0] |= {"value": "<image>a"}
    raw["conversations"][1]["image"] = "own.jpg"
    assert "turn that is not a human turn" in refusal(raw).reason


# ----------------------------------------------------------------------------------------------- words of other kits

BLIND = [
    *("<IMG_CONTEXT>", "<ImageHere>", "<image_00>", "<image_placeholder>", "<|image_1|>", "<|image|>", "[IMG]"),
    *("<start_of_image>", "<im_start>", "<ImageContent>", "<video_00>", "<|video_1|>"),
]


@pytest.mark.parametrize("word", BLIND)
@pytest.mark.parametrize("turn", [0, 1])
def test_a_row_that_shows_nothing_is_not_trained_blind(word, turn):
    bad = refusal(row(*[f"See {word} here." if i == turn else "Hm." for i in (0, 1)]))
    assert bad.field == f"conversations[{turn}].value"
    assert word in bad.reason
    assert "Write <" in bad.reason


@pytest.mark.parametrize("word", ["<img>", "<Image>", "<IMAGE>", "<images>", "<vid>"])
def test_words_that_are_markup_too(word):
    assert word in refusal(row(f"{word}\nWhat is it?")).reason
    assert word in refusal(row(f"What is it?\n{word}")).reason
    ((field, remark),) = parse(row(f"What does the {word} element do?")).warnings
    assert (field, word in remark) == ("conversations[0].value", True)
    assert parse(row("How do I embed it?", f"With {word}.")).warnings == ()


PROSE = [
    'Explain <img src="a.png" alt="x"> to me.',
    "<gdi image1>Once</gdi>",
    "[IMG]http://x.org/a.png[/IMG]",
    "a < b and [1] > 0",
    "The imager, <imageless>, <image-set>.",
    "<audio controls>",
]


@pytest.mark.parametrize("text", PROSE)
def test_prose_is_prose(text):
    for raw in (row(text), row("Hm?", text)):
        sample = parse(raw)
        assert text in str(shape(sample))
        assert sample.warnings == ()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (row("<audio>a.wav</audio>What?"), "stands for sound"),
        (row("<|audio_1|>What?"), "stands for sound"),
        (
            row("<IMG_CONTEXT><IMG_CONTEXT>", image="a.jpg"),
            "2 times <IMG_CONTEXT> in the human turns, and 1 image file",
        ),
        (row("<image> or <IMG_CONTEXT>", image="a.jpg"), "<IMG_CONTEXT> stands for a picture in other kits"),
        (row("Hm", "<img>a.jpg</img>"), "a picture or video in a gpt turn"),
        ({"question": "a", "answer": ["b", "c"]}, "is a list, not a string"),
        ({"texts": [{"user": "a", "assistant": None}]}, "is null. Fill it in"),
        ({"texts": [{"user": "a", "assistant": "b"}, "c"]}, "is a string, not an object"),
        ({"conversations": {"from": ["human", "gpt"], "value": ["a"]}}, "lists of different lengths"),
        ({"conversations": "[{"}, "is a string that is not JSON"),
        ({"image": "a.jpg", "messages": [{"role": "tool", "content": "x"}]}, "tool turns are not read"),
        ({"image": "a.jpg", "messages": [{"role": "Observation", "content": "x"}]}, "tool turns are not read"),
    ],
)
def test_refused(raw, reason):
    assert reason in refusal(raw).reason


# ------------------------------------------------------------------------------------------------------------- keys


LOUD = ["tools", "functions", "tool_calls", "documents", "chat_template_kwargs", "reasoning_content"]


@pytest.mark.parametrize("key", [*LOUD, "add_generation_prompt"])
def test_row_keys_that_must_not_be_left_out(key):
    for full in ({"a": 1}, "x", True):
        assert refusal(row(**{key: full})).field == key
    for empty in (None, {}, [], "", False):
        assert parse(row(**{key: empty})).warnings == ()


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking", "tool_calls", "function_call", "prefix"])
def test_turn_keys_that_must_not_be_left_out(key):
    raw = row()
    raw["conversations"][1][key] = "x"
    assert refusal(raw).field == f"conversations[1].{key}"
    raw["conversations"][1][key] = None
    assert parse(raw).warnings == ()


@pytest.mark.parametrize("key", ["system", "system_prompt", "system_message"])
def test_system_turns(key):
    assert shape(parse(row(**{key: "Be brief."})))[0] == ("system", ["Be brief."])
    assert "they differ" in refusal(row(system="a", system_prompt="b")).reason
    raw = row(**{key: "Be brief."})
    raw["conversations"].insert(0, {"from": "System", "value": "Be brief."})
    assert [turn.role for turn in parse(raw).turns] == ["system", "user", "assistant"]


def test_num_frames_of_lmms_finetune():
    def frames(**keys):
        return [part.overrides.nframes for part in parse(row("<video><video>", video=["a.mp4", "b.mp4"], **keys)).media]

    assert frames(num_frames=8) == [8, 8]
    assert frames(num_frames=[8, 10]) == [8, 10]
    assert frames() == [None, None]
    for keys, reason in (
        ({"num_frames": [8]}, "1 number, 2 videos"),
        ({"num_frames": [8, 7]}, "frames go in pairs"),
        ({"num_frames": 8, "nframes": 10}, "nframes is 10"),
    ):
        assert reason in refusal(row("<video><video>", video=["a.mp4", "b.mp4"], **keys)).reason


def test_keys_that_nobody_knows():
    raw = row(colour="red", source="x", width=3, metadata={"a": 1}, empty=None)
    raw["conversations"][0] |= {"weather": "wet", "id": 3}
    assert [field for field, _ in parse(raw).warnings] == ["colour", "conversations[0].weather"]
    assert parse(row(**dict.fromkeys(HARMLESS_KEYS, "x"))).warnings == ()
    assert parse(row(image_id="a/b.jpg")).warnings[0][0] == "image_id"
    assert parse({**row(), "question": "x"}).warnings == (("question", 'is not read: the row has "conversations"'),)
    assert "shows no picture" in parse(row(picture="a.png")).warnings[-1][1]


def test_a_check_says_so_once(capsys, tmp_path):
    path = write_json(tmp_path / "a.json", [row(colour="red", id=i) for i in range(3)])
    assert main(["check-data", str(path), "--headers_only", "--workers", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["warnings"]
    ((first,),) = [[one for one in found if one["field"] == "colour"]]
    assert (first["index"], "3 rows of the file have this key" in first["reason"]) == (0, True)


# -------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("file:///abs/a.png", "/abs/a.png"),
        ("FILE:///abs/a.png", "/abs/a.png"),
        ("file://localhost/abs/a.png", "/abs/a.png"),
        ("file:///abs/a%20b%C3%A9.png", "/abs/a bé.png"),
    ],
)
def test_file_addresses_wherever_a_path_may_stand(value, path):
    for raw in (
        row("<image>", image=value),
        row("<image>", images=[{"url": value}]),
        row(f"<img>{value}</img>"),
        parts({"type": "image_url", "image_url": {"url": value}}),
        {"conversations": [{**TURNS[0], "image": value}, TURNS[1]]},
    ):
        assert parse(raw).media[0].path == path
    assert parse(row("<video>", video=[[value, value]])).media[0].frames == (path, path)


def test_pictures_in_base64(tmp_path):
    for name in ("a.jpg", "a.png", "a.gif", "a.webp"):
        content = write_image(tmp_path / name, 40, 30).read_bytes()
        text = base64.b64encode(content).decode()
        for raw in (
            row("<image>", image=text),
            row("<image>", images=[{"base64": text}]),
            parts({"type": "image", "base64": text}),
            parts({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": text}}),
            row("<image>", image={"bytes": text, "path": "gone.jpg"}),
        ):
            assert Path(parse(raw, embedded=tmp_path / "kept").media[0].path).read_bytes() == content
    assert parse(row("<image>", image="/9j/x.jpg")).media[0].path == "/9j/x.jpg"
    assert "names two files" in refusal(row("<image>", image={"path": "a.jpg", "url": "b.jpg"})).reason


# ----------------------------------------------------------------------------------------------------- missing tags

UNTAGGED = {
    "conversations": {"image": ["a.jpg", "b.jpg"], **row("\nHm?")},
    "a picture and a video": {"image": "a.jpg", "video": "c.mp4", **row("Hm?")},
    "a system turn first": {"system": "s", "image": "a.jpg", **row("Hm?")},
    "frames": {"video": ["0.jpg", "1.jpg"], **row("Hm?")},
    "parts": {
        "image": "a.jpg",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "\nHm?"}]}, OPENAI[1]],
    },
    "a JSON string": {"image": "a.jpg", "conversations": json.dumps(row("Hm?")["conversations"])},
    "an object of lists": {"image": "a.jpg", "conversations": {"from": ["human", "gpt"], "value": ["Hm?", "b"]}},
    "alpaca": {"image": "a.jpg", "instruction": "Hm?", "output": "b", "history": [["a", "b"]]},
    "alpaca, input only": {"image": "a.jpg", "instruction": "", "input": "Hm?", "output": "b"},
    "query": {"image": "a.jpg", "query": "Hm?", "response": "b"},
    "pairs": {"image": "a.jpg", "conversation": [{"human": "Hm?", "assistant": "b"}]},
    "of a turn": {"conversations": [*row()["conversations"], {**TURNS[0], "value": "Hm?", "image": "a.jpg"}, TURNS[1]]},
}


@pytest.mark.parametrize("raw", UNTAGGED.values(), ids=UNTAGGED)
def test_files_without_tags(raw, tmp_path):
    """Refused with the flag's name; taken by it; written by --fix so that they train the same without it."""
    from vlft.data.rows.write_back import written

    assert "--missing_tags first" in refusal(raw).reason
    sample = parse(raw, flags=FIRST)
    pieces = [[part for part in turn.parts if not isinstance(part, Text)] for turn in sample.turns]
    (shown,) = [some for some in pieces if some]
    assert all(turn.parts[: len(shown)] == tuple(shown) for turn in sample.turns if any(p in turn.parts for p in shown))
    plain = parse(written(raw, sample.added))
    assert (plain.turns, plain.warnings, plain.added) == (sample.turns, sample.warnings, ())


def test_rows_with_some_tags_are_not_guessed():
    raw = row("<image>Hm?", image=["a.jpg", "b.jpg"])
    assert "1 <image> tag, 2 paths" in refusal(raw, flags=FIRST).reason
    assert "--missing_tags" not in refusal(raw).reason
    assert parse(row("<image>Hm?", image="a.jpg"), flags=FIRST).added == ()


def test_fix_writes_the_tags(capsys, tmp_path, media, base):
    rows = [row("Hm?", image="china.jpg"), row("<image>Hm?", image="china.jpg")]
    path, out = write_json(tmp_path / "a.json", rows), tmp_path / "b.json"
    flags = ["--image_folder", str(media), "--model_id", str(base)]
    check = ["check-data", str(path), *flags, "--workers", "0", "--json"]
    assert main(check) == 1
    assert main([*check, "--missing_tags", "first", "--fix", str(out)]) == 0
    capsys.readouterr()
    assert json.loads(out.read_text())[0]["conversations"][0]["value"] == "<image>Hm?"
    seen = []
    for words in ([str(path), "--missing_tags", "first"], [str(out)]):
        assert main(["preview", *words, *flags, "--index", "0", "--json"]) == 0
        seen.append(json.loads(capsys.readouterr().out)["input_ids"])
    assert seen[0] == seen[1]
    assert main(check) == 1  # costs cached with the flag are not used without it


# ------------------------------------------------------------------------------------------------------- registries

REGISTRIES = {
    "dataset_info.json": {"demo": {"file_name": "a.json", "columns": {"messages": "x"}}, "far": {"hf_hub_url": "x/y"}},
    "meta.json": {"chart": {"root": "imgs/", "annotation": "a.json", "repeat_time": 2, "length": 100}},
    "llava.yaml": {"datasets": [{"json_path": "a.json", "sampling_strategy": "first:500"}]},
    "swift.yaml": {"datasets": [{"dataset_path": "a.json"}]},
}


@pytest.mark.parametrize("name", REGISTRIES)
def test_lists_of_data_sets_point_to_the_mix(name, tmp_path):
    path = tmp_path / name
    path.write_text(yaml.safe_dump(REGISTRIES[name]) if name.endswith("yaml") else json.dumps(REGISTRIES[name]))
    with pytest.raises(ConfigError, match="--data_mix") as caught:
        index_rows([str(path)], image_folder=None, family=FAMILY)
    # The text that it tells the user to write is a valid mix.
    lines = str(caught.value).partition(":\n")[2].replace("\n  ", "\n").strip()
    (tmp_path / "mix.yaml").write_text(lines)
    (one,) = read_mix(str(tmp_path / "mix.yaml"))
    assert one.path == str(tmp_path / "a.json")
    assert (one.image_folder, one.repeat, one.cap) == {
        "meta.json": ("imgs/", 2, None),
        "llava.yaml": (None, None, 500),
    }.get(name, (None, None, None))


def test_a_registry_of_rows(tmp_path):
    path = write_json(tmp_path / "dataset_info.json", [{"ms_dataset_id": "x/y", "columns": {}}])
    (bad,) = parsed(index_rows([str(path)], image_folder=None, family=FAMILY)).bad
    assert "names a data set (x/y)" in bad.reason
    assert "--data_mix" in bad.reason


def test_one_role_in_the_words_of_two_kits():
    asked = {"from": "human", "role": "user", "value": "q", "content": "q"}
    said = {"from": "gpt", "role": "assistant", "value": "A"}
    assert [turn.role for turn in parse({"conversations": [asked, said]}).turns] == ["user", "assistant"]
    with pytest.raises(DataError, match='both "from" and "role"'):
        parse({"conversations": [{**asked, "role": "assistant"}, said]})


def test_a_system_key_of_parts():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "A"}]
    sample = parse({"system": [{"type": "text", "text": "Be brief."}], "messages": turns})
    assert (sample.turns[0].role, sample.turns[0].parts[0].text) == ("system", "Be brief.")
