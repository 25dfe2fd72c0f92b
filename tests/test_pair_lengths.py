"""Preference rows that are too long, badly written, packed, or measured: what happens besides the tokens."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from build import row, write_image
from pairs import collator_of, encoder_of, parsed, plain_rows, rejecting

from vlft.config.fit import Fit
from vlft.config.recipe import Recipe
from vlft.config.row_flags import RowFlags
from vlft.data.boxes import in_model_space
from vlft.data.costs.cache import Costing, key_of
from vlft.data.costs.packing import Budget, pack
from vlft.data.dataset import RowDataset, cost_of
from vlft.data.encode import UNTRAINED, Encoder
from vlft.data.identity import turns_digest
from vlft.data.ipc import Parcel
from vlft.data.sample import Grid, Text
from vlft.demo.templates import TEMPLATES
from vlft.demo.tiny import tiny_processor
from vlft.errors import DataError
from vlft.families import FAMILIES, QWEN3_5, QWEN3_VL

THOUGHT = "<think>\nIt is {}.\n</think>\n\nSo {}."


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    write_image(folder / "wide.png", 400, 90)
    write_image(folder / "tall.png", 101, 307, name="flower")
    return folder


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_5"])
def encoder(base_of, request):
    """Of a family whose answers share the prompt, and of one whose layers cannot."""
    return encoder_of(base_of(FAMILIES[request.param]), FAMILIES[request.param])


@pytest.fixture
def pair(folder, encoder):
    raw = row("<image>and<image>\nCompare.", "Both.", id="p", image=["wide.png", "tall.png"])
    return rejecting(parsed(raw, folder, encoder.family), "Neither of them.", "No.")


# ---- cost and length


def with_recipe(encoder, **settings) -> Encoder:
    return replace(encoder, recipe=replace(encoder.recipe, **settings))


def test_a_pair_over_max_length_is_refused_with_its_parts(encoder, pair):
    cost = encoder.measure(pair)
    prompt, chosen, second, third = cost.branches
    assert with_recipe(encoder, max_length=cost.tokens).measure(pair) == cost
    short = with_recipe(encoder, max_length=cost.tokens - 1)
    each = "" if encoder.shared else " for each of 3 answers"
    parts = f"prompt {prompt:,}{each}, chosen {chosen}, rejected {second} and {third}"
    vision = sum(grid.tokens(2) for grid in encoder.tokens(pair).grids)
    for look in (short.measure, short.encode, short.tokens):
        with pytest.raises(DataError) as caught:
            look(pair)
        said = (
            f"the row is {cost.tokens:,} tokens long ({parts}; {vision} of the prompt are pictures and videos), --max"
        )
        assert caught.value.row.reason.startswith(said)
        assert caught.value.row.too_long
    why = Budget(tokens=cost.tokens - 1, patches=10**6).over_any(cost)
    assert f"{cost.tokens:,} tokens ({parts}) fit no pack, --pack_tokens is {cost.tokens - 1:,}" in why


@pytest.mark.parametrize("how", ["shrink", "drop_media"])
def test_over_length_makes_a_pair_fit_with_all_its_answers(encoder, pair, how):
    cost = encoder.measure(pair)
    most = cost.tokens - 20
    fitting = with_recipe(encoder, max_length=most, over_length=how, fit=Fit(how=how, tokens=most, patches=None))
    now, made = fitting.measure(pair), fitting.encode(pair)
    assert now == cost_of(made)
    assert now.tokens <= most
    assert now.branches[1:] == cost.branches[1:]  # no answer is shortened
    assert f"{now.tokens:,} tokens instead of {cost.tokens:,}" in made.changed
    assert fitting.as_trained(pair).rejected == pair.rejected
    tiny = with_recipe(fitting, max_length=40, fit=Fit(how=how, tokens=40, patches=None))
    with pytest.raises(DataError, match=r"Its tokens: prompt \d+.*, chosen \d+, rejected \d+ and \d+"):
        tiny.measure(pair)


def test_a_pack_holds_as_many_tokens_as_its_costs_say(encoder, pair, folder):
    family = encoder.family
    plain = parsed(row("<image>Who?", "A flower.", image="tall.png"), folder, family)
    text = rejecting(parsed(row("2+2?", "4"), folder, family), "5")
    samples = [pair, plain, text, replace(pair, index=1), replace(text, index=2), replace(plain, index=3)]
    costs = [encoder.measure(one) for one in samples]
    budget = Budget(tokens=max(cost.tokens for cost in costs) + 60, patches=10**6)
    packs = pack(costs, budget, seed=1)
    assert any(len(one.rows) > 1 for one in packs)
    assert len(packs) > 1
    rows = RowDataset(samples, encoder, costs)  # compares what it encodes with the costs
    for one in packs:
        batch = collator_of(encoder)(rows.__getitems__(one.rows))
        assert not batch["skipped"]
        assert batch["counts"]["tokens"] == one.tokens
        assert batch["counts"]["samples"] == len(one.rows)
        assert batch["counts"]["supervised_tokens"] == sum(costs[i].supervised for i in one.rows)
        assert sum(g[0] * g[1] * g[2] for g in batch["vision_grid"].tolist()) in (one.patches, 4 * (one.patches == 0))


def test_stored_values_of_a_pair_are_its_own(encoder, pair, folder):
    """Its key in the cost cache, its kept tokens and its digest differ from those of its plain rows and other pairs."""
    family = encoder.family
    one, other = replace(pair, rejected=pair.rejected[:1]), replace(pair, rejected=pair.rejected[1:])
    kinds = [*plain_rows(pair), pair, one, other]
    assert len({key_of(kind, lambda _: (1, 1)) for kind in kinds}) == len(kinds)
    assert len({turns_digest(kind) for kind in kinds}) == len(kinds)
    costs = [encoder.measure(kind) for kind in kinds]
    for kind, cost in zip(kinds, costs, strict=True):
        again = Encoder(family=family, processor=encoder.processor, recipe=encoder.recipe)
        assert again.tokens(kind).input_ids_T.tolist() == encoder.tokens(kind).input_ids_T.tolist()
        loaded = Costing.load(Costing.dump(cost))
        assert (loaded, loaded.branches) == (cost, cost.branches)
    assert [cost.branches != () for cost in costs] == [bool(kind.rejected) for kind in kinds]
    assert Costing.load([7, 2, 0, 0, 0]).branches == ()  # a value of a plain row
    assert Costing.load([7, 2, 0, 0, 0, "shrunk", 3, None, []]).answer == 3


# ---- batches


def test_batches_without_pairs_have_none_of_their_keys(encoder, folder):
    plain = encoder.encode(parsed(row("2+2?", "4"), folder, encoder.family))
    for items in ([], [plain]):
        batch = collator_of(encoder)(items)
        assert not {"branches", "copies", "answers"} & batch.keys()


def test_text_pairs_have_no_copies(encoder, folder):
    text = encoder.encode(rejecting(parsed(row("2+2?", "4"), folder, encoder.family), "5"))
    assert "copies" not in collator_of(encoder, shared=False)([text, text])


def test_reference_values_follow_the_answers(encoder, pair, folder):
    known = replace(encoder.encode(pair), reference=(-1.5, -2.5, -3.5))
    plain = encoder.encode(parsed(row("2+2?", "4"), folder, encoder.family))
    collate = collator_of(encoder)
    found = collate([plain, known, known])["answers"]["reference"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor([float("nan"), *[-1.5, -2.5, -3.5] * 2]), equal_nan=True)
    for wrong in (replace(known, reference=(-1.0,)), replace(known, reference=())):
        with pytest.raises(ValueError, match="values of the reference"):
            collate([known, wrong])


def test_a_batch_of_pairs_arrives_from_a_worker_as_it_was(encoder, pair):
    for shared in (True, False):
        batch = collator_of(encoder, shared=shared)([replace(encoder.encode(pair), reference=(-1.0, -2.0, -3.0))])
        arrived = pickle.loads(pickle.dumps(Parcel(batch)))
        assert arrived.keys() == batch.keys()
        for key in {"branches", "copies", "answers"} & batch.keys():
            for name, value in batch[key].items():
                theirs = arrived[key][name]
                same = torch.equal(value, theirs) if isinstance(value, torch.Tensor) else value == theirs
                assert same, (key, name)


# ---- answers


def test_an_answer_that_cannot_be_compared_is_refused(encoder, pair):
    turn = pair.rejected[1]
    masked = replace(turn, parts=(Text(text="No.", trained=False),))
    with pytest.raises(DataError, match="no token of this answer is trained") as caught:
        encoder.measure(replace(pair, rejected=(pair.rejected[0], masked)))
    assert caught.value.row.field == "rejected[1]"
    with pytest.raises(DataError, match=r"same tokens as rejected\[0\]") as caught:
        encoder.measure(rejecting(pair, "No.", "No."))
    assert caught.value.row.field == "rejected[1]"


def test_masked_spans_of_answers(encoder, pair):
    turn = pair.rejected[0]
    spans = (Text(text="Neither", trained=True), Text(text=" of them.", trained=False))
    row = encoder.encode(replace(pair, rejected=(replace(turn, parts=spans),)))
    prompt, chosen, _ = row.branches
    labels = row.labels_T[prompt + chosen :]
    assert encoder.processor.tokenizer.decode(labels[labels != UNTRAINED]) == "Neither"
    labels = row.labels_T[: prompt + chosen]
    assert encoder.processor.tokenizer.decode(labels[labels != UNTRAINED]) == "Both.<|im_end|>"


@pytest.mark.parametrize("turns", ["auto", "split", "last"])
def test_a_pair_is_one_sample_whatever_turns_says(encoder, folder, turns):
    raw = {"conversations": [{"from": who, "value": text} for who, text in
                             (("human", "1?"), ("gpt", "One."), ("human", "2?"), ("gpt", "Two."))]}  # fmt: skip
    pair = rejecting(parsed(raw, folder, encoder.family), "Three.")
    whole = with_recipe(encoder, turns=turns)
    assert whole.samples(pair) == (pair,)
    assert whole.measure(pair).parts == ()
    assert whole.measure(pair).answer is None
    row = whole.encode(pair)
    assert (
        encoder.processor.tokenizer.decode(row.labels_T[row.labels_T != UNTRAINED]) == "Two.<|im_end|>Three.<|im_end|>"
    )


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_boxes_of_every_answer_are_converted(folder, model_type):
    family = FAMILIES[model_type]
    written = "A <|box_start|>(40,9),(200,81)<|box_end|>", "B <|box_start|>(0,0),(400,90)<|box_end|>"
    pair = rejecting(parsed(row("<image>Where?", written[0], image="wide.png"), folder, family), written[1])
    grids = [Grid(t=1, h=8, w=36)]
    settings = {"family": family, "box_format": "pixels", "patch_size": 14}
    made = in_model_space(pair, grids, **settings)
    wanted = [in_model_space(one, grids, **settings).turns[-1].parts for one in plain_rows(pair)]
    assert [made.turns[-1].parts, *(turn.parts for turn in made.rejected)] == wanted
    assert wanted[1][0].text != written[1]


# ---- thoughts

PROCESSOR = tiny_processor(QWEN3_5)


def thinking_encoder(name: str, **flags) -> Encoder:
    processor = copy.copy(PROCESSOR)
    processor.chat_template = TEMPLATES[name]
    return Encoder(
        family=QWEN3_VL, processor=processor, recipe=Recipe.of(processor, RowFlags(max_length=4096, **flags))
    )


def talk(*answers: str):
    """A row with these answers, and its messages as a client sends them."""
    said = [turn for i, a in enumerate(answers) for turn in (("human", f"Question {i}?"), ("gpt", a))]
    raw = {"conversations": [{"from": who, "value": text} for who, text in said]}
    roles = {"human": "user", "gpt": "assistant"}
    return parsed(raw, None, QWEN3_VL), [{"role": roles[who], "content": text} for who, text in said]


@pytest.mark.parametrize("thoughts", [True, False])
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name.startswith("qwen3")])
def test_the_prompt_is_the_served_one(name, thoughts):
    """Also where the template drops the thoughts of earlier answers, or a switch says whether the model thinks."""
    if name == "qwen3-vl-thinking" and not thoughts:
        pytest.skip("this model always thinks")
    encoder = thinking_encoder(name, turns="split")
    last = [THOUGHT.format(c, c) if thoughts else c for c in ("red", "blue")]
    sample, messages = talk(THOUGHT.format("a", "a"), last[0])
    made = encoder.encode(rejecting(sample, last[1]))
    arguments = {"enable_thinking": thoughts} if "enable_thinking" in TEMPLATES[name] else {}
    if name == "qwen3.8":  # a server keeps thoughts beside the answer
        messages[1] |= {"content": "So a.", "reasoning_content": "It is a."}
    served = encoder.processor.tokenizer.apply_chat_template(
        messages[:-1], chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=False, **arguments
    )
    prompt, *answers = made.branches
    assert made.input_ids_T[:prompt].tolist() == served
    start, text = prompt, encoder.processor.tokenizer.decode(served)
    for said, count in zip(last, answers, strict=True):
        written = encoder.processor.tokenizer.decode(made.input_ids_T[start : start + count])
        begun = "<think>\n" if text.endswith("<think>\n") else ""
        assert begun + written == said + "<|im_end|>\n"
        start += count


@pytest.mark.parametrize(("chosen", "rejected"), [("red", THOUGHT.format("b", "b")), (THOUGHT.format("b", "b"), "red")])
def test_answers_that_need_two_prompts_are_refused(chosen, rejected):
    """The template ends the prompt of an answer with thoughts differently."""
    sample, _ = talk(chosen)
    with pytest.raises(DataError, match="both follow one prompt") as caught:
        thinking_encoder("qwen3.5").measure(rejecting(sample, rejected))
    assert caught.value.row.field == "rejected[0]"
