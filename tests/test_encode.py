"""Tokens, labels, positions and pixels against the stock processor and model of transformers and qwen-vl-utils."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from build import FAMILY
from patches import patches_of
from stock import NAMES, messages_of, stock

from vlft.data.encode import UNTRAINED, Encoder
from vlft.data.rows.records import parse_record
from vlft.errors import ConfigError, DataError
from vlft.model.load import load_base
from vlft.model.scale import PixelScale


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_grids_are_the_stock_processors(samples, encoded, encoder, name):
    theirs, ours = stock(samples[name], encoder), encoded[name]
    assert ours.input_ids_T.tolist() == theirs["input_ids"][0].tolist()
    for key, is_video in (("image_grid_thw", False), ("video_grid_thw", True)):
        grids = [[m.grid.t, m.grid.h, m.grid.w] for m in ours.media if m.is_video == is_video]
        assert grids == theirs.get(key, torch.zeros(0, 3)).tolist()


@pytest.mark.parametrize("name", ["still", "two-turns"])
def test_ids_equal_one_call_of_the_whole_stock_processor(samples, encoded, encoder, name):
    messages = messages_of(samples[name], encoder.recipe)
    text = encoder.processor.apply_chat_template(messages, tokenize=False)
    pictures = [m["image"] for message in messages for m in message["content"] if m["type"] == "image"]
    theirs = encoder.processor(text=[text], images=pictures, return_tensors="pt")
    assert encoded[name].input_ids_T.tolist() == theirs["input_ids"][0].tolist()
    assert encoded[name].kinds_T.tolist() == theirs["mm_token_type_ids"][0].tolist()


@pytest.mark.parametrize("name", ["still", "two-turns", "clip", "both", "frames"])
def test_pixels_after_scaling_are_the_stock_processors(samples, encoded, encoder, name):
    theirs, scale = stock(samples[name], encoder), PixelScale.of(encoder.processor)
    stills, videos = patches_of(encoded[name].media)
    ours = scale.patches(stills, videos).split([len(stills), len(videos)])
    for found, key in zip(ours, ("pixel_values", "pixel_values_videos"), strict=True):
        assert bool(len(found)) == (key in theirs)
        if len(found):
            assert (found - theirs[key]).abs().max() < 2e-6


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_get_rope_index(base, samples, encoded, name):
    row = encoded[name]
    model = load_base(base, FAMILY)
    grids = {}
    for key, is_video in (("image_grid_thw", False), ("video_grid_thw", True)):
        found = [[m.grid.t, m.grid.h, m.grid.w] for m in row.media if m.is_video == is_video]
        grids[key] = torch.tensor(found) if found else None
    theirs, _ = model.model.get_rope_index(row.input_ids_T[None], mm_token_type_ids=row.kinds_T[None].int(), **grids)
    assert torch.equal(row.positions_3T, theirs[:, 0])


@pytest.mark.parametrize("name", NAMES)
def test_patch_positions_are_the_stock_ones(encoded, name):
    from transformers.vision_utils import get_vision_position_ids

    from vlft.data.positions import patch_positions

    for medium in encoded[name].media:
        grid = medium.grid
        theirs = get_vision_position_ids(torch.tensor([[grid.t, grid.h, grid.w]]), 2)
        assert torch.equal(torch.from_numpy(patch_positions(grid, merge=2)), theirs)


@pytest.mark.parametrize("name", NAMES)
def test_measuring_from_headers_equals_encoding(samples, encoded, encoder, name):
    cost, row = encoder.measure(samples[name]), encoded[name]
    assert cost.tokens == len(row.input_ids_T)
    assert cost.supervised == int((row.labels_T != UNTRAINED).sum())
    assert cost.patches == sum(m.grid.patches for m in row.media)


def trained_text(row, tokenizer) -> str:
    return tokenizer.decode(row.labels_T[row.labels_T != UNTRAINED])


def test_labels_are_exactly_the_assistant_turns_with_their_end(encoded, encoder):
    wanted = {
        "still": "A temple in China.<|im_end|>",
        "two-turns": "A flower and an astronaut.<|im_end|>Yes.<|im_end|>",
        "text": "4<|im_end|>",
        "clip": "It slides.<|im_end|>",
    }
    for name, text in wanted.items():
        row = encoded[name]
        assert trained_text(row, encoder.processor.tokenizer) == text
        kept = row.labels_T != UNTRAINED
        assert torch.equal(row.labels_T[kept], row.input_ids_T[kept])


def chat(*turns: tuple[str, str]) -> dict:
    return {"conversations": [{"from": who, "value": text} for who, text in turns]}


def encode(encoder: Encoder, raw: dict):
    return encoder.encode(parse_record(raw, file="x.json", index=0, image_folder=None, family=FAMILY))


def test_an_even_number_of_turns_after_a_system_turn_trains_the_answers(encoder):
    """Other kits train the user's question as the answer in such a row."""
    raw = chat(("system", "Be brief."), ("human", "one"), ("gpt", "ONE"), ("human", "two"), ("gpt", "TWO"))
    assert trained_text(encode(encoder, raw), encoder.processor.tokenizer) == "ONE<|im_end|>TWO<|im_end|>"


def test_an_answer_that_starts_with_a_newline_keeps_its_own_token(encoder):
    row = encode(encoder, chat(("human", "q"), ("gpt", "\n\nyes")))
    assert trained_text(row, encoder.processor.tokenizer) == "\n\nyes<|im_end|>"


@pytest.mark.parametrize("prompt", ["<|im_start|>assistant\n<think>\n", "<|im_start|>assistant: "])
def test_a_template_whose_answers_do_not_follow_its_generation_prompt_is_refused(encoder, prompt):
    """Otherwise the trained span would be off by a few characters."""
    template = encoder.processor.chat_template.replace(
        "{% if add_generation_prompt %}<|im_start|>assistant\n", "{% if add_generation_prompt %}" + prompt
    )
    processor = copy.copy(encoder.processor)
    processor.chat_template = template
    with pytest.raises(ConfigError, match=r"conversations\[1\] of x\.json\[0\].*base model's own chat template"):
        encode(replace(encoder, processor=processor), chat(("human", "q"), ("gpt", "a long enough answer")))


def test_a_trailing_question_is_rendered_and_untrained(encoder):
    row = encode(encoder, chat(("human", "q"), ("gpt", "a"), ("human", "more?")))
    assert row.text.endswith("<|im_start|>user\nmore?<|im_end|>\n")
    assert trained_text(row, encoder.processor.tokenizer) == "a<|im_end|>"


def test_the_default_system_turn_is_the_templates(encoder):
    assert encode(encoder, chat(("human", "q"), ("gpt", "a"))).text.startswith("<|im_start|>system\nYou are a helpful")
    own = encode(encoder, chat(("system", "S"), ("human", "q"), ("gpt", "a"))).text
    assert own.startswith("<|im_start|>system\nS<|im_end|>\n")


def test_grounding_tokens_are_single_tokens_and_trained(encoder):
    answer = "<|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>"
    row = encode(encoder, chat(("human", "where?"), ("gpt", answer)))
    assert trained_text(row, encoder.processor.tokenizer) == answer + "<|im_end|>"
    assert encoder.processor.tokenizer.convert_tokens_to_ids("<|box_start|>") in row.labels_T.tolist()


def test_a_row_over_max_length_is_refused_with_both_numbers(encoder, samples):
    short = replace(encoder, recipe=replace(encoder.recipe, max_length=50))
    with pytest.raises(DataError, match=r"213 tokens long \(120 of them .* --max_length is 50"):
        short.measure(samples["both"])
