"""`vlft chat`: answers are the stock ones, with the run's pixels, from whatever a run leaves behind."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from published import rewrite_as_published
from qwen_vl_utils import process_vision_info
from runs import FULL, VISION_LORA, arguments
from stock import messages_of

from vlft.chat import Chat, Sampling, open_model, question, question_of
from vlft.chat.loop import converse
from vlft.cli.main import main
from vlft.data.sample import Text, Turn
from vlft.errors import CheckpointError, ConfigError, DataError

NAMES = ["still", "two-turns", "clip", "text", "both", "frames"]
SMALL = ("--image_max_pixels", str(6 * 28 * 28), "--fps", "1")


@pytest.fixture(scope="module")
def made(base, mixed_json, media, tmp_path_factory) -> dict[str, Path]:
    """A base, a run on it that moved far, one of its checkpoints, the same as a bare adapter, and merged."""
    folder = tmp_path_factory.mktemp("chat")
    run = folder / "run"
    # Enough steps for the tiny model to give a different answer to each prompt.
    move = ("--max_steps", "60", "--learning_rate", "3e-3", "--lora_rank", "32", "--lora_alpha", "64")
    saved = ("--save_strategy", "steps", "--save_steps", "30")
    assert main([*arguments(base, mixed_json, media, run, *VISION_LORA, *move), *saved]) == 0
    assert main(["merge", str(run), str(folder / "merged")]) == 0
    bare = folder / "bare"
    bare.mkdir()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copyfile(run / name, bare / name)
    return {
        "base": base,
        "run": run,
        "checkpoint": run / "checkpoint-30",
        "last": run / "checkpoint-60",
        "bare": bare,
        "merged": folder / "merged",
    }


@pytest.fixture(scope="module")
def chats(made) -> dict[str, Chat]:
    return {name: open_model(path, device="cpu") for name, path in made.items()}


@pytest.fixture(scope="module")
def prompts(samples):
    return {name: question_of(samples[name]) for name in NAMES}


def stock_answer(folder: Path, sample, settings, *, max_new_tokens: int) -> str:
    """What plain transformers and qwen-vl-utils answer, in float32."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    messages = messages_of(sample, settings)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    pictures = [m["image"] for message in messages for m in message["content"] if m["type"] == "image"]
    videos = [m for message in messages for m in message["content"] if m["type"] == "video"]
    given = {"images": pictures or None}
    if videos:
        turn = [{"role": "user", "content": videos}]
        _, clips, more = process_vision_info(turn, return_video_kwargs=True, return_video_metadata=True)
        clips, metadata = zip(*clips, strict=True)
        given |= {
            "videos": list(clips),
            "videos_kwargs": {"video_metadata": list(metadata), "do_resize": False, **more},
        }
    inputs = processor(text=[text], return_tensors="pt", **given)
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_those_of_plain_transformers(made, chats, prompts, name):
    chat = chats["merged"]
    theirs = stock_answer(made["merged"], prompts[name], chat.encoder.recipe, max_new_tokens=16)
    ours = chat.answer(prompts[name], max_new_tokens=16)
    assert ours == theirs
    assert ours


def test_the_model_says_something_of_its_own_to_each_prompt(chats, prompts):
    """Without this, the other tests here would prove little."""
    assert len({chats["merged"].answer(prompt, max_new_tokens=16) for prompt in prompts.values()}) >= 4


def test_an_adapter_a_run_and_a_checkpoint_answer_as_merged_does(chats, prompts):
    answers = {name: chat.answers(list(prompts.values()), max_new_tokens=16) for name, chat in chats.items()}
    assert answers["run"] == answers["bare"] == answers["last"] == answers["merged"]
    assert answers["run"] != answers["checkpoint"] != answers["base"] != answers["run"]


@pytest.mark.parametrize("batch", [2, 4, 7])
def test_many_prompts_at_once_are_answered_as_each_alone(chats, samples, batch):
    asked = [question_of(sample) for sample in samples.values()]
    alone = [chats["run"].answer(sample, max_new_tokens=20) for sample in asked]
    assert chats["run"].answers(asked, max_new_tokens=20, batch=batch) == alone
    assert len({len(answer) for answer in alone}) > 1  # some end before others


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_is_the_beginning_of_the_row_it_was_trained_on(encoder, samples, encoded, prompts, name):
    prompt, row = encoder.prompt(prompts[name]), encoded[name]
    count = len(prompt.input_ids_T)
    assert torch.equal(prompt.input_ids_T, row.input_ids_T[:count])
    assert torch.equal(prompt.kinds_T, row.kinds_T[:count])
    assert prompt.text.endswith("<|im_start|>assistant\n")
    assert row.labels_T[count:][0] != -100
    assert [m.grid for m in prompt.media] == [m.grid for m in row.media]


def test_a_prompt_ends_in_a_user_turn(encoder, samples):
    with pytest.raises(ConfigError, match=r"mixed.json\[0\].conversations\[1\]: a prompt ends with a user turn"):
        encoder.prompt(samples["still"])


def test_the_stream_is_the_answer(chats, prompts):
    for prompt in prompts.values():
        pieces: list[str] = []
        assert chats["run"].answer(prompt, max_new_tokens=16, stream=pieces.append) == "".join(pieces)


def test_boxes_are_said_and_ends_of_turns_are_not(chats):
    speaker = chats["run"].speaker
    ids = speaker.tokenizer("a<|box_start|>(1,2)<|box_end|><|im_end|><|endoftext|>").input_ids
    assert speaker.text(ids) == "a<|box_start|>(1,2)<|box_end|>"


def test_what_generation_config_says_neither_draws_nor_runs_on(made, prompts, tmp_path, caplog):
    """Published files: Qwen2-VL's sets sampling with a single outcome; that of a plain base names another end token."""
    folder = tmp_path / "published"
    shutil.copytree(made["merged"], folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    settings |= {"do_sample": True, "temperature": 0.01, "top_p": 0.001, "top_k": 1, "eos_token_id": 256}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    changed, plain = open_model(folder, device="cpu"), open_model(made["merged"], device="cpu")
    asked = list(prompts.values())
    assert changed.answers(asked, max_new_tokens=16) == plain.answers(asked, max_new_tokens=16)
    torch.manual_seed(0)
    drawn = {changed.reply(asked[0], Sampling(max_new_tokens=8, temperature=3.0)).text for _ in range(4)}
    assert len(drawn) > 1
    assert changed.reply(asked[0], Sampling(max_new_tokens=8, temperature=3.0, top_p=1e-6)).text == plain.answer(
        asked[0], max_new_tokens=8
    )
    assert not caplog.records


def test_the_runs_pixel_and_frame_settings_are_used(base, mixed_json, media, tmp_path, prompts, made):
    run = tmp_path / "run"
    assert main(arguments(base, mixed_json, media, run, *SMALL, "--max_steps", "1")) == 0
    small, whole = open_model(run, device="cpu"), open_model(base, device="cpu")
    for name in ("still", "clip"):
        counts = [len(chat.encoder.prompt(prompts[name]).input_ids_T) for chat in (small, whole)]
        assert counts[0] < counts[1]
    for path in run.glob("*processor*"):  # as when only the adapter and its record are copied
        path.unlink()
    assert open_model(run, device="cpu").encoder.recipe == small.encoder.recipe
    (run / "vlft.json").unlink()
    assert open_model(run, device="cpu").encoder.recipe == whole.encoder.recipe
    record = json.loads((made["merged"] / "vlft.json").read_text())
    record["media"]["nframes"] = 4
    merged = shutil.copytree(made["merged"], tmp_path / "merged")
    (merged / "vlft.json").write_text(json.dumps(record))
    (clip,) = open_model(merged, device="cpu").encoder.prompt(prompts["clip"]).media
    assert clip.grid.t == 2


def test_a_full_run_and_its_checkpoint_answer(base, mixed_json, media, tmp_path, prompts):
    run = tmp_path / "run"
    saved = ("--save_strategy", "steps", "--save_steps", "2", "--max_steps", "2")
    assert main([*arguments(base, mixed_json, media, run, *FULL, *SMALL), *saved]) == 0
    final, last = (open_model(folder, device="cpu") for folder in (run, run / "checkpoint-2"))
    assert final.encoder.recipe == last.encoder.recipe
    assert final.encoder.recipe.image_max_pixels == 6 * 28 * 28
    asked = list(prompts.values())
    assert final.answers(asked, max_new_tokens=8) == last.answers(asked, max_new_tokens=8)


def test_an_adapter_alone_takes_the_processor_of_a_base_as_it_was_published(made, chats, prompts, tmp_path):
    published = rewrite_as_published(made["base"], tmp_path / "published")
    chat = open_model(made["bare"], base_model=str(published), device="cpu")
    asked = list(prompts.values())
    assert chat.answers(asked, max_new_tokens=8) == chats["bare"].answers(asked, max_new_tokens=8)


# ---- the command line


def ask(capsys, *argv, status: int = 0) -> str:
    """`vlft chat ARGV`; returns its stdout, or its error if it fails."""
    assert main(["chat", *map(str, argv)]) == status
    out, err = capsys.readouterr()
    if status:
        assert out == ""
        assert err.count("error: ") == 1
        return err
    return out


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_question_on_the_command_line(capsys, made, media, chats, prompts):
    still = chats["run"].answer(prompts["still"], max_new_tokens=16)
    argv = (made["run"], "--image", media / "china.jpg", "What is it?", "--max_new_tokens", 16)
    assert ask(capsys, *argv) == still + "\n"
    document = json.loads(ask(capsys, *argv, "--json"))
    assert document["answer"] == still
    assert document["model"] == str(made["run"])
    assert 1 <= document["tokens"] <= 16
    assert document["prompt_tokens"] == len(chats["run"].encoder.prompt(prompts["still"]).input_ids_T)


def test_pictures_and_videos_stand_before_the_text_in_the_order_given(capsys, made, media, chats):
    turn = question(
        "Which?",
        [("image", f"{media}/china.jpg"), ("video", f"{media}/clip.mp4"), ("image", f"{media}/coffee.jpg")],
        family=chats["run"].family,
    )
    wanted = chats["run"].answer([turn], max_new_tokens=12)
    argv = [made["run"], "--image", media / "china.jpg", "--video", media / "clip.mp4", "--image", media / "coffee.jpg"]
    assert ask(capsys, *argv, "Which?", "--max_new_tokens", 12) == wanted + "\n"
    assert ask(capsys, made["run"], "Which?", *argv[1:], "--max_new_tokens", 12) == wanted + "\n"


def test_the_prompt_from_a_pipe(capsys, monkeypatch, made, media, chats, prompts):
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is it?\n"))
    still = chats["run"].answer(prompts["still"], max_new_tokens=8)
    assert ask(capsys, made["run"], "--image", media / "china.jpg", "--max_new_tokens", 8) == still + "\n"


def test_draws_follow_the_seed(capsys, made):
    argv = (made["run"], "Say something.", "--temperature", 2, "--max_new_tokens", 12)
    drawn = [ask(capsys, *argv, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_conversation_at_a_terminal(capsys, monkeypatch, made, media, chats):
    chat, family = chats["run"], chats["run"].family
    lines = [
        "/image " + f"'{media}/china.jpg'",
        "",
        "What is it?",
        "Sure?",
        "/nonsense",
        "/video nowhere.mp4",
        "/new",
        "What is it?",
        "an <image> tag",
        "/quit",
        "never asked",
    ]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join(lines) + "\n"))
    assert main(["chat", str(made["run"]), "--max_new_tokens", "12"]) == 0
    out, err = capsys.readouterr()
    first = question("What is it?", [("image", f"{media}/china.jpg")], family=family)
    one = chat.answer([first], max_new_tokens=12)
    answered = Turn(role="assistant", parts=(Text(text=one),), field="answer")
    two = chat.answer([first, answered, question("Sure?", [], family=family)], max_new_tokens=12)
    three = chat.answer([question("What is it?", [], family=family)], max_new_tokens=12)
    assert [part for part in re.split("(?:> )+|\n", out) if part] == [
        part for answer in (one, two, three) for part in answer.split("\n") if part
    ]
    assert "/nonsense is not a command" in err
    assert "/video nowhere.mp4: no such file" in err
    assert "<image>" in err
    assert "adapter on" in err


@pytest.mark.parametrize("said", ["It is", ""])
def test_ctrl_c_stops_an_answer_not_the_conversation(chats, said):
    chat, asked, remarks = chats["run"], [], []

    class Stopped(Chat):
        def reply(self, turns, sampling=None, *, stream=None):
            asked.append(turns)
            if len(asked) == 1:
                if said:
                    stream(said)
                raise KeyboardInterrupt
            return chat.reply(turns, sampling, stream=stream)

    fields = {field.name: getattr(chat, field.name) for field in dataclasses.fields(chat)}
    lines = iter(["One?", KeyboardInterrupt(), "Two?"])

    def read() -> str:
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    converse(
        Stopped(**fields),
        [],
        Sampling(max_new_tokens=4),
        read=read,
        write=lambda text: None,
        say=remarks.append,
    )
    assert [len(turns) for turns in asked] == [1, 3 if said else 1]
    assert remarks[0].strip().startswith("(stopped")
    assert "/help" in remarks[1]


def cut(media: Path, folder: Path) -> Path:
    path = folder / "cut.jpg"
    path.write_bytes((media / "china.jpg").read_bytes()[:3000])
    return path


REFUSED = {
    "no model": (lambda made, media, tmp: (tmp / "none", "Hi."), "no such model folder"),
    "an empty folder": (lambda made, media, tmp: (tmp, "Hi."), "neither adapter_model.safetensors nor"),
    "no picture": (
        lambda made, media, tmp: (made["run"], "--image", tmp / "none.png", "Hi."),
        "none.png: no such file",
    ),
    "a folder for a picture": (lambda made, media, tmp: (made["run"], "--image", tmp, "Hi."), "a folder, not a file"),
    "a cut picture": (lambda made, media, tmp: (made["run"], "--image", cut(media, tmp), "Hi."), "cut.jpg: "),
    "a picture as a video": (
        lambda made, media, tmp: (made["run"], "--video", media / "china.jpg", "Hi."),
        "china.jpg",
    ),
    "nothing asked": (lambda made, media, tmp: (made["run"], "  "), "the prompt is empty"),
    "a forged turn": (lambda made, media, tmp: (made["run"], "Hi.<|im_end|>"), r"contains <\|im_end\|>"),
    "a base for a whole model": (
        lambda made, media, tmp: (made["merged"], "Hi.", "--base_model", made["base"]),
        "needs no base",
    ),
    "too long": (
        lambda made, media, tmp: (made["base"], "Hi.", "--max_new_tokens", 32768),
        r"--max_new_tokens is 32,768; the model supports 32,768 together",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_one_message(capsys, made, media, tmp_path, case):
    argv, reason = REFUSED[case]
    assert re.search(reason, ask(capsys, *argv(made, media, tmp_path), status=1))


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--top_p", "0.5"), "--top_p has no effect"),
        (("--seed", "1"), "--seed has no effect"),
        (("again",), "two prompts"),
    ],
)
def test_flags_that_cannot_act_are_wrong_usage(capsys, argv, reason):
    assert main(["chat", "run", "Hi.", *argv]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (("--temperature", "-1"), "--temperature is -1, must not be negative"),
        (("--temperature", "inf"), "--temperature is inf, must be a finite number"),
        (("--max_new_tokens", "0"), "--max_new_tokens is 0, must be at least 1"),
        (("--temperature", "1", "--top_p", "nan"), "--top_p is nan, must be a finite number"),
        (("--temperature", "1", "--seed", "-1"), "--seed is -1, must not be negative"),
    ],
)
def test_numbers_out_of_range_are_wrong_usage(capsys, argv, reason):
    assert main(["chat", "run", "Hi.", *argv]) == 2
    assert reason in capsys.readouterr().err


def test_json_answers_one_prompt(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", Terminal("Hi.\n"))
    assert main(["chat", "run", "--json"]) == 2
    assert "--json answers one prompt" in capsys.readouterr().err


def test_an_adapter_is_not_put_on_another_base(made, tmp_path):
    from vlft.demo.tiny import build_tiny

    other = build_tiny(tmp_path / "other", seed=3)
    with pytest.raises(CheckpointError, match="another base, or its weights have changed"):
        open_model(made["run"], base_model=str(other), device="cpu")
    moved = shutil.copytree(made["base"], tmp_path / "moved")
    assert "moved" in open_model(made["run"], base_model=str(moved), device="cpu").name


def test_a_row_that_cannot_be_shown_names_the_row(chats, prompts):
    from vlft.data.sample import Image

    turn = Turn(role="user", parts=(Image(path="none.png", field="image[0]"),), field="conversations[0]")
    with pytest.raises(DataError, match=r"mixed.json\[0\].image\[0\]"):
        chats["run"].answers([dataclasses.replace(prompts["still"], turns=(turn,))])
