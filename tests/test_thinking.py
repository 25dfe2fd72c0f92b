"""Chat templates with thoughts: every trained sample is what a served model sees and writes.

The templates are ours (`vlft.demo.templates`); the prompts are compared with transformers' own `apply_chat_template`.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from build import write_image
from PIL import Image as Picture

from vlft.config.recipe import Recipe
from vlft.config.row_flags import RowFlags
from vlft.data.encode import UNTRAINED, Encoder
from vlft.data.rows.records import parse_record
from vlft.data.sample import Image, Text
from vlft.demo.templates import TEMPLATES
from vlft.demo.tiny import tiny_processor
from vlft.errors import ConfigError, DataError
from vlft.families import QWEN3_5, QWEN3_VL

PROCESSOR = tiny_processor(QWEN3_5)
THOUGHT = "<think>\nIt is {}.\n</think>\n\nSo {}."


def encoder_of(name: str, **flags) -> Encoder:
    processor = copy.copy(PROCESSOR)
    processor.chat_template = TEMPLATES[name]
    recipe = Recipe.of(processor, RowFlags(max_length=4096, **flags))
    return Encoder(family=QWEN3_VL, processor=processor, recipe=recipe)


def sample_of(turns: list[tuple[str, str]], **keys):
    said = [{"from": who, "value": text} for who, text in turns]
    raw = {**keys, "conversations": said}
    return parse_record(raw, file="x.json", index=0, image_folder=None, family=QWEN3_VL)


def talk(*answers: str, system: str | None = None) -> list[tuple[str, str]]:
    """A conversation with these answers."""
    head = [("system", system)] if system is not None else []
    return head + [turn for i, a in enumerate(answers) for turn in (("human", f"Question {i}?"), ("gpt", a))]


def messages_of(turns: list[tuple[str, str]], *, apart: bool = False) -> list[dict]:
    """The conversation as a client sends it; `apart`: as a server keeps it, with the thoughts beside the answer."""
    found = []
    for who, text in turns:
        message = {"role": {"human": "user", "gpt": "assistant", "system": "system"}[who], "content": text}
        if apart and "</think>" in text:
            thoughts, _, answer = text.partition("</think>")
            message |= {"content": answer.strip(), "reasoning_content": thoughts.removeprefix("<think>").strip()}
        found.append(message)
    return found


def served(encoder: Encoder, turns: list[tuple[str, str]], place: int, **arguments: bool) -> tuple[list[int], str]:
    """The tokens of the prompt before an answer, by transformers, and what the model writes after it."""
    tokenizer, name = encoder.processor.tokenizer, encoder.processor.chat_template
    messages = messages_of(turns[:place], apart=name == TEMPLATES["qwen3.8"])
    given = {"chat_template": name, "add_generation_prompt": True, **arguments}
    text = tokenizer.apply_chat_template(messages, tokenize=False, **given)
    ids = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **given)
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    answer = turns[place][1].strip()
    if text.endswith("<think>\n"):
        answer = answer.removeprefix("<think>\n")
    return ids, answer + "<|im_end|>"


def trained(encoder: Encoder, one) -> tuple[list[int], str]:
    """The tokens before the first trained one, and the trained text; nothing is trained after it."""
    labels, ids = one.labels_T.tolist(), one.input_ids_T.tolist()
    kept = [place for place, label in enumerate(labels) if label != UNTRAINED]
    assert kept == list(range(kept[0], kept[-1] + 1))
    return ids[: kept[0]], encoder.processor.tokenizer.decode([ids[place] for place in kept])


NAMES = [name for name in TEMPLATES if name.startswith("qwen3")]
SWITCHED = [name for name in NAMES if "enable_thinking" in TEMPLATES[name]]


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("name", SWITCHED)
def test_each_answer_is_trained_as_it_is_served(name, system):
    """Answers with and without thoughts in one row, by `--thinking auto` and `--turns split`."""
    encoder = encoder_of(name, turns="split")
    turns = talk(THOUGHT.format("red", "red"), "Blue.", THOUGHT.format("green", "green"), system=system)
    parts = encoder.samples(sample_of(turns))
    places = [place for place, (who, _) in enumerate(turns) if who == "gpt"]
    assert [one.answer for one in parts] == places
    for one, place in zip(parts, places, strict=True):
        thinks = "</think>" in turns[place][1]
        assert trained(encoder, encoder.encode(one)) == served(encoder, turns, place, enable_thinking=thinks)


def test_all_answers_are_in_one_text_only_where_each_is_as_served():
    """3.6 and 3.8 can keep earlier thoughts; 3.5 and Thinking drop them; Instruct treats them as text."""
    thoughts, plain = talk(*[THOUGHT.format(c, c) for c in "abc"]), talk("A.", "B.", "C.")
    mixed = talk("A.", THOUGHT.format("b", "b"))
    want = {"qwen3-vl": "111", "qwen3.5": "332", "qwen3.5-small": "332", "qwen3.6": "112", "qwen3.8": "112"}
    for name, counts in want.items():
        encoder = encoder_of(name)
        for turns, count in zip((thoughts, plain, mixed), map(int, counts), strict=True):
            parts = encoder.samples(sample_of(turns))
            assert len(parts) == count, (name, turns)
            for one in parts:
                assert encoder.measure(one).tokens == len(encoder.encode(one).input_ids_T)
    assert len(encoder_of("qwen3-vl-thinking").samples(sample_of(thoughts))) == 3


@pytest.mark.parametrize("name", ["qwen3.6", "qwen3.8"])
def test_a_row_in_one_text_is_served_with_preserve_thinking(name):
    encoder = encoder_of(name)
    turns = talk(*[THOUGHT.format(c, c) for c in "abc"], system="S.")
    one = encoder.encode(sample_of(turns))
    ids, labels = one.input_ids_T.tolist(), one.labels_T.tolist()
    tokenizer = encoder.processor.tokenizer
    for place in (2, 4, 6):
        prompt, answer = served(encoder, turns, place, enable_thinking=True, preserve_thinking=True)
        wanted = tokenizer(answer, add_special_tokens=False).input_ids
        assert ids[: len(prompt)] == prompt
        assert labels[len(prompt) - 1] == UNTRAINED
        assert labels[len(prompt) : len(prompt) + len(wanted)] == wanted


@pytest.mark.parametrize("name", ["qwen3-vl", "qwen3-vl-thinking"])
def test_templates_without_a_switch(name):
    """Each answer as served, without a default system turn; the Thinking model's prompt has the `<think>`."""
    encoder = encoder_of(name, turns="split")
    turns = talk(THOUGHT.format("red", "red"), THOUGHT.format("blue", "blue"))
    for one, place in zip(encoder.samples(sample_of(turns)), (1, 3), strict=True):
        prompt, answer = trained(encoder, encoder.encode(one))
        assert (prompt, answer) == served(encoder, turns, place)
        text = encoder.processor.tokenizer.decode(prompt)
        assert text.startswith("<|im_start|>user\nQuestion 0?")
        assert text.endswith("<think>\n") == (name == "qwen3-vl-thinking")
        assert ("It is red" in text) == (place == 3 and name == "qwen3-vl")


@pytest.mark.parametrize("name", SWITCHED)
def test_one_answer_by_each_choice(name):
    for text, choices in (("Red.", ("off", "auto")), (THOUGHT.format("red", "red"), ("on", "auto"))):
        turns = talk(text, system="S.")
        for choice in choices:
            encoder = encoder_of(name, thinking=choice)
            (sample,) = encoder.samples(sample_of(turns))
            assert sample.answer is None
            found = trained(encoder, encoder.encode(sample))
            assert found == served(encoder, turns, 2, enable_thinking=choices[0] == "on")
            assert found[1] == (text.removeprefix("<think>\n") + "<|im_end|>")


@pytest.mark.parametrize(
    ("name", "choice", "answer", "words"),
    [
        ("qwen3.5", "off", THOUGHT.format("red", "red"), "has thoughts .* --thinking off .*--thinking auto"),
        ("qwen3.5", "on", "Red.", "has no thoughts .* --thinking on .*--thinking auto"),
        ("qwen3.5", "on", "<think>\n\n</think>\n\nRed.", "has no thoughts"),
        ("qwen3-vl-thinking", "auto", "Red.", "begins every answer with <think>.* an Instruct model"),
        ("qwen3.5", "auto", "Well. <think>Hm.</think> Red.", "leaves out a part .* one block <think>"),
        ("qwen3.5", "auto", "<think>a</think> Red <think>b</think> blue.", "leaves out a part"),
    ],
)
def test_answers_whose_thoughts_do_not_fit_are_refused(name, choice, answer, words):
    encoder = encoder_of(name, thinking=choice)
    for turns in (talk(answer), talk(answer, answer)):
        with pytest.raises(DataError, match=words) as caught:
            encoder.measure(sample_of(turns))
        assert caught.value.row.field == "conversations[1]"


def test_an_empty_block_is_an_answer_without_thoughts():
    """It is how other kits write such answers."""
    turns = talk("<think>\n\n</think>\n\nRed.")
    for name in SWITCHED:
        for choice in ("auto", "off"):
            encoder = encoder_of(name, thinking=choice)
            plain = encoder.encode(sample_of(talk("Red.")))
            assert encoder.encode(sample_of(turns)).labels_T.tolist() == plain.labels_T.tolist()


@pytest.mark.parametrize("name", ["qwen2-vl", "qwen3-vl", "qwen3-vl-thinking"])
def test_a_choice_is_refused_where_the_template_has_none(name):
    with pytest.raises(ConfigError, match="--thinking off: the base's chat template does not take enable_thinking"):
        encoder_of(name, thinking="off")


def test_a_template_is_read_without_its_comments():
    encoder = encoder_of("qwen3-vl")
    encoder.processor.chat_template = "{# enable_thinking is of other models #}" + TEMPLATES["qwen3-vl"]
    assert Recipe.of(encoder.processor).switches == ()


def test_the_last_answer_only():
    encoder = encoder_of("qwen3.5", turns="last")
    turns = talk("A.", THOUGHT.format("b", "b"), "C.")
    (one,) = encoder.samples(sample_of([*turns, ("human", "More?")]))
    assert trained(encoder, encoder.encode(one)) == served(encoder, turns, 5, enable_thinking=False)


def test_a_question_after_the_last_answer_does_not_drop_its_thoughts():
    encoder = encoder_of("qwen3.5")
    turns = talk(THOUGHT.format("red", "red"))
    one = encoder.encode(sample_of([*turns, ("human", "Sure?")]))
    assert trained(encoder, one) == served(encoder, turns, 1, enable_thinking=True)


def test_masked_answers_are_context_of_the_trained_one():
    encoder = encoder_of("qwen3.5")
    turns = talk(THOUGHT.format("a", "a"), "B.", THOUGHT.format("c", "c"))
    said = [{"from": who, "value": text} for who, text in turns]
    said[1]["loss"] = said[3]["loss"] = False
    sample = parse_record({"conversations": said}, file="x.json", index=0, image_folder=None, family=QWEN3_VL)
    assert encoder.samples(sample) == (sample,)
    assert trained(encoder, encoder.encode(sample)) == served(encoder, turns, 5, enable_thinking=True)


def test_a_span_of_an_answer_with_thoughts():
    """The template trims the answer, moves its line breaks, and has `<think>` in the prompt."""
    spans = [("<think>Well, ", False), ("it is red.", True), ("</think>  ", False), ("So red. ", True)]
    parts = tuple(Text(text=text, trained=flag) for text, flag in spans)
    sample = sample_of(talk("x"))
    sample = replace(sample, turns=(sample.turns[0], replace(sample.turns[1], parts=parts)))
    encoder = encoder_of("qwen3.5")
    one = encoder.encode(sample)
    tokenizer = encoder.processor.tokenizer
    said = tokenizer.decode([label for label in one.labels_T.tolist() if label != UNTRAINED])
    assert said == "it is red.So red.<|im_end|>"
    assert one.text.endswith("<think>\nWell, it is red.\n</think>\n\n  So red.<|im_end|>\n")


def test_what_a_template_refuses_is_a_refused_row():
    turns = [*talk("Hello."), ("system", "Be brief."), *talk("Bye.")]
    with pytest.raises(DataError, match="refuses this conversation: System message must be at the beginning"):
        encoder_of("qwen3.5").measure(sample_of(turns))


def test_pictures_of_a_split_row(tmp_path):
    """Each sample has the pictures of its turns."""
    for name in "ab":
        write_image(tmp_path / f"{name}.png", 90, 60)
    said = [
        {"from": "human", "value": "<image>What?"},
        {"from": "gpt", "value": "A."},
        {"from": "human", "value": "And <image>?"},
        {"from": "gpt", "value": "B."},
    ]
    raw = {"image": ["a.png", "b.png"], "conversations": said}
    sample = parse_record(raw, file="x.json", index=0, image_folder=str(tmp_path), family=QWEN3_VL)
    encoder = encoder_of("qwen3.5")
    cost, parts = encoder.measure(sample), encoder.samples(sample)
    assert [len(one.media) for one in parts] == [1, 2]
    rows = [encoder.encode(one) for one in parts]
    assert [part.tokens for part in cost.parts] == [len(one.input_ids_T) for one in rows]
    assert [part.patches for part in cost.parts] == [sum(m.grid.patches for m in one.media) for one in rows]
    assert (cost.tokens, cost.patches) == (sum(p.tokens for p in cost.parts), sum(p.patches for p in cost.parts))
    for one, place in zip(rows, (1, 3), strict=True):
        messages = []
        for turn in sample.turns[:place]:
            parts_ = [
                {"type": "image"} if isinstance(p, Image) else {"type": "text", "text": p.text} for p in turn.parts
            ]
            messages.append({"role": turn.role, "content": parts_})
        given = {"add_generation_prompt": True, "enable_thinking": False, "tokenize": False}
        text = encoder.processor.apply_chat_template(messages, **given)
        pictures = [Picture.open(tmp_path / f"{name}.png") for name in "ab"[: (place + 1) // 2]]
        stock = encoder.processor(text=[text], images=pictures)["input_ids"][0]
        assert trained(encoder, one)[0] == list(stock)
