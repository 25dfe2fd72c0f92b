"""The loop of `vlft chat`: its commands, file names and completion, and the system turn. Most tests use a stub."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from build import FAMILY, write_image, write_video

from vlft.chat import Sampling, open_model
from vlft.chat.commands import COMMANDS, files_in, parse
from vlft.chat.loop import converse
from vlft.chat.model import Reply
from vlft.chat.turns import conversation, question, system_turn
from vlft.cli.chat_line import completions
from vlft.cli.main import main
from vlft.data.files.index import index_rows
from vlft.data.sample import Text, Video
from vlft.errors import ConfigError, UsageError


@dataclass
class Stub:
    """A model that answers at once, with the number of its answer."""

    family: object = FAMILY
    asked: list = field(default_factory=list)

    def reply(self, turns, sampling=None, *, stream=None) -> Reply:
        self.asked.append([_plain(turn) for turn in turns])
        stream(f"answer {len(self.asked)}")
        return Reply(text=f"answer {len(self.asked)}", tokens=1, prompt_tokens=1)


def _plain(turn) -> str:
    """A turn as text: `user: [china.jpg] What?`."""
    parts = [p.text if isinstance(p, Text) else f"[{Path(p.path).name}]" for p in turn.parts]
    return f"{turn.role}: {' '.join(parts)}"


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """Hold a conversation in a folder with pictures; returns what the model was asked and the remarks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "b c.png", "it's.png"):
        write_image(tmp_path / name, 60, 40)
    write_video(tmp_path / "clip.mp4")
    (tmp_path / "sub").mkdir()

    def run(*lines: str, **more) -> tuple[list[list[str]], str]:
        stub, said, given = Stub(), [], iter(lines)

        def read() -> str:
            line = next(given, None)
            if line is None:
                raise EOFError
            return line

        converse(stub, [], Sampling(max_new_tokens=4), read=read, write=lambda text: None, say=said.append, **more)  # type: ignore[arg-type]
        return stub.asked, "\n".join(said)

    return run


def test_help_lists_every_command(talk):
    asked, said = talk("/help")
    assert asked == []
    assert all(f"\n{name}" in f"\n{said}" for name in (*COMMANDS, "//TEXT"))


UNKNOWN = {
    "/hlep": "did you mean /help?",
    "/Help": "did you mean /help?",
    "/exit": "did you mean /quit?",
    "/clear now": "did you mean /new?",
    "/xyzzy me": "/help lists the commands.",
    "/": "/help lists the commands.",
    "/systm You are a cat.": "did you mean /system?",
}


@pytest.mark.parametrize("line", UNKNOWN)
def test_unknown_words_are_not_sent(talk, line):
    asked, said = talk(line)
    assert asked == []
    assert f"error: {line.split()[0]} is not a command: {UNKNOWN[line]} To send it as text: /{line}" in said


def test_a_text_that_begins_with_a_slash(talk, tmp_path):
    asked, said = talk("//etc holds what?", f"{tmp_path}/a.png", f"{tmp_path}/a.png what is it?")
    assert asked == [["user: /etc holds what?"]]
    assert said.count(f"to show this file, type /image {tmp_path}/a.png") == 2


def test_files_and_what_is_shown(talk):
    asked, said = talk(
        "/image",
        "/image a.png 'b c.png' ~/it's.png",
        '/image a.png "b c.png"',
        "What?",
        "/video clip.mp4",
        "/video",
        "And?",
        "/image",
    )
    first = "user: [a.png] [b c.png] What?"
    assert asked == [[first], [first, "assistant: answer 1", "user: [clip.mp4] And?"]]
    assert "(/image needs a file name: /image FILE)\n  nothing is shown yet" in said
    assert "error: the quote ' is not closed" in said
    assert (
        "(/video needs a file name: /video FILE)\n  1. image a.png\n  2. image b c.png\n  for the next question: video"
        in said
    )
    assert said.rstrip().endswith("2. image b c.png\n  3. video clip.mp4")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/image none.png", "/image none.png: no such file"),
        ("/image A.png", "Did you mean a.png?"),
        ("/image a.png none.png", "/image none.png: no such file"),
        ("/image sub", "/image sub: a folder, not a file"),
        ("/image clip.mp4", "/image clip.mp4: is an MP4 video. Use /video."),
    ],
)
def test_files_that_are_wrong_are_not_added(talk, line, says):
    asked, said = talk(line, "Hi.")
    assert says in said
    assert asked == [["user: Hi."]]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("b c.png", ["b c.png"]),
        ("it's.png", ["it's.png"]),
        ('"b c.png" a.png', ["b c.png", "a.png"]),
        (r"b\ c.png  a.png", ["b c.png", "a.png"]),
        (r"C:\photos\a.png", [r"C:\photos\a.png"]),
        ('pre"b c".png', ["preb c.png"]),
        ("", []),
    ],
)
def test_names_of_files(talk, text, names):
    assert files_in(text) == names


def test_an_open_quote_is_refused():
    with pytest.raises(UsageError, match='the quote " is not closed'):
        files_in('"b c.png')


def test_a_system_turn_starts_a_new_conversation(talk):
    asked, said = talk(
        "Hi.",
        "/system You are a cat. ",
        "Hi.",
        "/new",
        "Again.",
        "/system",
        '/system ""',
        "Last.",
        "/system",
        "/system <image>",
    )
    assert asked[1:] == [
        ["system: You are a cat.", "user: Hi."],
        ["system: You are a cat.", "user: Again."],
        ["user: Last."],
    ]
    assert "(a new conversation, with this system turn)" in said
    assert "(system turn: You are a cat.)" in said
    assert "(a new conversation, without a system turn)" in said
    assert "the system turn contains <image>, which marks" in said
    assert talk("Hi.", system=system_turn("Be short.", family=FAMILY))[0] == [["system: Be short.", "user: Hi."]]


def test_undo_takes_back_files_then_questions(talk):
    asked, said = talk(
        "/image a.png",
        "One?",
        "/image 'b c.png'",
        "/undo",
        "Two?",
        "/undo",
        "/undo",
        "Three?",
        "/undo",
        "/undo",
        "/undo",
    )
    one = "user: [a.png] One?"
    assert asked == [[one], [one, "assistant: answer 1", "user: Two?"], ["user: [a.png] Three?"]]
    assert "(taken back: One?; shown with the next question: a.png)" in said
    assert said.rstrip().endswith("(there is nothing to take back)")


def test_a_saved_conversation_is_a_row(talk, tmp_path):
    (tmp_path / "kept.jsonl").write_text('{"a": 1}')
    _, said = talk(
        "/save x.jsonl",
        "/system Be short.",
        "/image 'b c.png'",
        "/video clip.mp4",
        "What?",
        "And?",
        "/save kept.jsonl",
        "/save x.json",
    )
    assert "nothing to save" in said
    assert "/save x.json: the conversation is a row of a .jsonl file" in said
    first, second = (tmp_path / "kept.jsonl").read_text().splitlines()
    assert first == '{"a": 1}'
    (tmp_path / "rows.jsonl").write_text(second + "\n")
    sample = index_rows(["rows.jsonl"], image_folder=None, family=FAMILY)[0]
    assert [_plain(turn) for turn in sample.turns] == [
        "system: Be short.",
        "user: [b c.png] [clip.mp4] What?",
        "assistant: answer 1",
        "user: And?",
        "assistant: answer 2",
    ]
    assert isinstance(sample.turns[1].parts[1], Video)


# ---- Tab


def test_completions(talk, tmp_path):
    assert completions("/i") == ["/image "]
    assert completions("/ne") == ["/new"]
    assert completions("//i") == completions("hello") == completions("/nothing x") == completions("/help x") == []
    assert completions("/image a") == ["/image a.png "]
    assert completions("/image a.png b") == [r"/image a.png b\ c.png "]
    assert completions('/image "b') == ['/image "b c.png" ']
    assert completions(r"/image b\ ") == [r"/image b\ c.png "]
    assert completions("/image i") == [r"/image it\'s.png "]
    assert completions("/video s") == ["/video sub/"]
    assert completions("/image ~/a") == ["/image ~/a.png "]
    assert len(completions("/image ")) == 5
    for line in completions("/image "):
        if not line.endswith("/"):
            command, rest = parse(line.strip())
            assert command is not None
            assert all(Path(name).is_file() for name in files_in(rest))


# ---- a real model


@pytest.fixture(scope="module")
def chat(base):
    return open_model(base, device="cpu")


def test_the_system_turn_is_that_of_training(chat, encoder, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": [
        {"from": "system", "value": "You are a cat."},
        {"from": "human", "value": "Who are you?"},
        {"from": "gpt", "value": "A cat."},
    ]}]))  # fmt: skip
    row = encoder.encode(index_rows([str(tmp_path / "rows.json")], image_folder=None, family=FAMILY)[0])
    turns = [system_turn("You are a cat.", family=FAMILY), question("Who are you?", [], family=FAMILY)]
    ids = chat.encoder.prompt(conversation(turns)).input_ids_T
    stock = chat.encoder.processor.apply_chat_template(
        [{"role": "system", "content": [{"type": "text", "text": "You are a cat."}]},
         {"role": "user", "content": [{"type": "text", "text": "Who are you?"}]}],
        add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    assert torch.equal(ids, stock["input_ids"][0])
    assert torch.equal(ids, row.input_ids_T[: len(ids)])
    with pytest.raises(ConfigError, match="the system turn contains"):
        system_turn("a<|im_end|>", family=FAMILY)


def test_system_on_the_command_line(chat, base, capsys):
    turns = [system_turn("You are a cat.", family=FAMILY), question("Who?", [], family=FAMILY)]
    argv = ["chat", str(base), "--system", "You are a cat.", "Who?", "--max_new_tokens", "6", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["answer"] == chat.answer(turns, max_new_tokens=6)
    assert found["prompt_tokens"] == len(chat.encoder.prompt(conversation(turns)).input_ids_T)
    assert main(["chat", str(base), "--system", " ", "Who?"]) == 2
    assert "--system is empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["none/at/all", "Hi."], "no such model folder"),
        ([".", "--image", "none.png", "Hi."], "--image none.png: no such file"),
    ],
)
def test_wrong_paths_are_refused_before_torch_is_imported(tmp_path, argv, says):
    code = f"import sys; from vlft.cli.main import main; print(main(['chat', *{argv!r}]), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "1 False\n"
    assert says in done.stderr
