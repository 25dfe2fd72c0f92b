"""Preference rows from a `Sample` to a batch: each answer as the stock processor and model have it after the prompt."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from build import row, write_image
from conftest import HAS_PYAV
from pairs import collator_of, earlier_untrained, encoder_of, parsed, plain_rows, rejecting
from stock import messages_of, stock, stock_positions

from vlft.answering import seconds_remark
from vlft.data.dataset import cost_of
from vlft.data.encode import UNTRAINED
from vlft.families import FAMILIES
from vlft.model.load import load_base

ROWS = {
    "text": row("2+2?", "4"),
    "pictures": row("<image>and<image>\nCompare.", "Both.", image=["wide.png", "tall.png"]),
    "video": row("<video>What?", "It slides.", video="clip.mp4"),
    "mixed": row("<image>3 <video><image> <video>?", "All.", image=["wide.png", "tall.png"],
                 video=["clip.mp4", ["wide.png"] * 5]),
    "own pixels": row("<image>Small?", "Small.", image="wide.png", max_pixels=100 * 32 * 32),
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


# ---- batches


def sequences(batch):
    """Of each answer: the rows of its whole conversation, the rows before its trained tokens, and these tokens."""
    cu, sizes = batch["cu_seqlens"].tolist(), batch["lengths"]
    own = list(torch.arange(cu[-1]).split(sizes))
    assert cu == [0, *itertools.accumulate(sizes)]
    rows = own
    if "branches" in batch:
        keys = batch["branches"]
        assert keys["cu_seqlens_k"].tolist() == [0, *itertools.accumulate(keys["key_lengths"])]
        rows = list(keys["kv_rows"].split(keys["key_lengths"]))
        for some, queries in zip(rows, own, strict=True):
            assert some[-len(queries) :].tolist() == queries.tolist()  # as lower-right causal attention needs it
    answers = batch["answers"]
    assert len(answers["per_sample"]) == batch["counts"]["samples"] == len(batch["rows"])
    assert sum(answers["per_sample"]) == len(rows) == len(answers["bounds"]) - 1
    counts = answers["bounds"].diff().tolist()
    return zip(rows, batch["supervised_rows"].split(counts), batch["targets"].split(counts), strict=True)


def features_of(batch) -> torch.Tensor:
    """int64 [T]: the feature that replaces each row of a batch, -1 for text."""
    found_T = torch.full((batch["input_ids"].shape[1],), -1)
    rows_N = torch.cat([batch["vision_rows"], batch["cached"]["rows"]]) if "cached" in batch else batch["vision_rows"]
    found_T[rows_N] = torch.arange(len(rows_N))
    if "copies" in batch:
        assert (found_T[batch["copies"]["rows"]] == -1).all()
        found_T[batch["copies"]["rows"]] = batch["copies"]["of"]
    return found_T


@pytest.fixture(scope="module")
def pairs(encoder, folder, family):
    """(parsed, encoded) rows: pairs beside plain rows, with one to four answers and all kinds of media."""
    names = ["pictures", "text", "mixed", "turns", "video", "own pixels"]
    answers = [("Neither.",), (), ("None at all.", "Some.", "I see."), ("No.",), (), ("Large.", "Tiny.")]
    plain = [earlier_untrained(parsed(ROWS[name], folder, family)) for name in names]
    samples = [rejecting(one, *some) for one, some in zip(plain, answers, strict=True)]
    return [(one, encoder.encode(one)) for one in samples]


def as_plain(whole, pair, encoder):
    """The encoded row of one conversation of a pair."""
    tokens = encoder.tokens(whole)
    names = ("input_ids_T", "labels_T", "kinds_T", "positions_3T")
    return replace(pair, branches=(), **{name: torch.from_numpy(getattr(tokens, name)) for name in names})


@pytest.mark.parametrize("shared", [True, False])
def test_a_batch_holds_each_conversation_as_a_plain_row(encoder, pairs, shared):
    """Ids, positions, labels, targets and features of each answer are those of its conversation as a plain row."""
    collate = collator_of(encoder, shared=shared)
    batch = collate([pair for _, pair in pairs])
    assert batch["answers"]["per_sample"] == (2, 1, 4, 2, 1, 3)
    assert ("branches" in batch, "copies" in batch) == (shared, not shared)
    assert "reference" not in batch["answers"]
    features_T, conversations = features_of(batch), sequences(batch)
    of_still = 3 * encoder.recipe.factor**2  # bytes of a feature
    stills, videos, every_still = 0, 0, len(batch["still_pixels"]) // of_still
    for sample, pair in pairs:
        own_stills = 0
        for whole in plain_rows(sample):
            plain = collate([as_plain(whole, pair, encoder)])
            rows, before, targets = next(conversations)
            rows, after = rows[: plain["lengths"][0]], rows[plain["lengths"][0] :]
            assert len(after) <= 1  # some plain rows end with the answer, without the line break after it
            assert (batch["labels"][0, after] == UNTRAINED).all()
            assert batch["input_ids"][0, rows].tolist() == plain["input_ids"][0].tolist()
            assert batch["labels"][0, rows].tolist() == plain["labels"][0].tolist()
            assert torch.equal(batch["position_ids"][:, 0, rows], plain["position_ids"][:, 0])
            assert before.tolist() == rows[plain["supervised_rows"]].tolist()
            assert targets.tolist() == plain["targets"].tolist()
            own_stills = len(plain["still_pixels"]) // of_still if pair.media else 0
            own_T = features_of(plain)  # stills come before videos, in each batch
            of_video_T = own_T >= own_stills
            own_T[of_video_T] += every_still - own_stills + videos
            own_T[(own_T >= 0) & ~of_video_T] += stills
            assert features_T[rows].tolist() == own_T.tolist()
        stills, videos = stills + own_stills, videos + len(plain["video_pixels"]) // (2 * of_still)
    assert next(conversations, None) is None
    assert (stills, videos) == (every_still, len(batch["video_pixels"]) // (2 * of_still))  # each medium is there once
    assert batch["counts"]["samples"] == len(pairs)
    assert batch["counts"]["tokens"] == batch["input_ids"].shape[1]
    if shared == encoder.shared:
        assert batch["counts"]["tokens"] == sum(encoder.measure(sample).tokens for sample, _ in pairs)


@pytest.mark.parametrize("shared", [True, False])
def test_features_that_are_cached(encoder, pairs, shared):
    """The features of a medium are those of the same medium if others are cached; also in a repeated prompt."""
    width = 3  # of a feature: the number of its medium, its place in the medium, and its part

    def feature(medium: int, tokens: int) -> torch.Tensor:
        return torch.stack([torch.full((tokens,), medium), torch.arange(tokens), torch.zeros(tokens, dtype=int)], dim=1)

    def with_cached(pair, first: int, chosen):
        media = [
            replace(m, features=feature(first + i, m.grid.patches // 4)[None]) if chosen(first + i) else m
            for i, m in enumerate(pair.media)
        ]
        return replace(pair, media=tuple(media))

    collate = collator_of(encoder, shared=shared)
    encoded = [pair for _, pair in pairs]
    firsts = list(itertools.accumulate((len(pair.media) for pair in encoded), initial=0))
    media = [m for pair in encoded for m in pair.media]
    found = []
    for chosen in (lambda _: False, lambda i: i % 2 == 0, lambda _: True):
        batch = collate([with_cached(pair, first, chosen) for pair, first in zip(encoded, firsts, strict=False)])
        seen = [i for kind in (False, True) for i, m in enumerate(media) if m.is_video == kind and not chosen(i)]
        rows = [feature(i, media[i].grid.patches // 4) for i in seen]
        if "cached" in batch:
            rows.append(batch["cached"]["features"][0])
        rows_NX = torch.cat(rows)
        of_T = features_of(batch)
        found.append(torch.where((of_T >= 0)[:, None], rows_NX[of_T], torch.full((width,), -1)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
