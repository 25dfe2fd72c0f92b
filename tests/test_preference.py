"""The objective of preference rows: its loss, statistics and gradients on the path of a run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from preferred import LOSSES, perturb, prepared, references, stepped, swapped, with_reference, written

from vlft.errors import DataError
from vlft.families import FAMILIES
from vlft.model import forward
from vlft.objectives import Loss
from vlft.objectives import preference_losses as losses

#: Methods with settings, and losses of `--method dpo`.
METHODS = {
    **{f"dpo, {name}": ("dpo", flags) for name, flags in LOSSES.items()},
    "orpo": ("orpo", {"orpo_lambda": 0.3}),
    "simpo": ("simpo", {"beta": 1.5, "simpo_gamma": 0.4, "label_smoothing": 0.1}),
}


@pytest.fixture(scope="module")
def at_start(base_of, tmp_path_factory):
    """A run before its first step, and its reference values. Not to be changed."""
    setup = prepared(base_of(FAMILIES["qwen2_vl"]), written(tmp_path_factory.mktemp("start")).parent, "lora")
    return setup, references(setup)


@pytest.fixture(scope="module")
def moved(base_of, tmp_path_factory):
    """A run whose weights are no longer those of the reference, and the values of that."""
    setup = prepared(base_of(FAMILIES["qwen2_vl"]), written(tmp_path_factory.mktemp("moved")).parent, "lora")
    reference_A = references(setup)
    perturb(setup.model)
    return setup, reference_A


def with_values(setup, reference_A):
    """The encoded rows, as `Preference.encode` returns them once the reference is known."""
    pairs = reference_A.view(-1, 2).tolist()
    return [replace(sample, reference=tuple(pair)) for sample, pair in zip(setup.samples, pairs, strict=True)]


def assert_same_gradients(found, wanted, tolerance=2e-5):
    assert set(found) == set(wanted)
    for name, gradient in wanted.items():
        difference, largest = (found[name] - gradient).abs().max(), gradient.abs().max()
        assert difference <= tolerance * largest, (name, float(difference / largest))


def test_the_first_step_has_a_loss_of_ln_2_and_no_margin(at_start):
    setup, reference_A = at_start
    loss, gradients = stepped(
        setup.model, lambda: setup.objective.loss(setup.model, with_reference(setup.batch, reference_A))
    )
    means = {name: float(mean.sum / mean.weight) for name, mean in loss.statistics.items()}
    assert float(loss.sum.detach()) / loss.weight == pytest.approx(math.log(2), rel=1e-6)
    assert means["rewards/margins"] == means["rewards/chosen"] == means["rewards/accuracies"] == 0
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.parametrize("name", LOSSES)
def test_a_live_reference_is_the_cached_one(moved, name):
    setup, reference_A = moved
    cached, of_cached = stepped(
        setup.model,
        lambda: setup.with_loss(name).loss(setup.model, with_reference(setup.batch, reference_A)),
    )
    live, of_live = stepped(setup.model, lambda: setup.with_loss(name, reference="live").loss(setup.model, setup.batch))
    torch.testing.assert_close(live.sum, cached.sum, rtol=1e-6, atol=0)
    for key, mean in cached.statistics.items():
        torch.testing.assert_close(live.statistics[key].sum, mean.sum, rtol=1e-6, atol=1e-6, msg=key)
    assert_same_gradients(of_live, of_cached, tolerance=1e-6)


def test_without_a_reference_the_margin_is_that_of_log_probabilities(moved):
    setup, _ = moved
    with torch.no_grad():
        found = setup.with_loss("sigmoid", reference="none").loss(setup.model, setup.batch).statistics
    difference = found["logps/chosen"].sum - found["logps/rejected"].sum
    torch.testing.assert_close(found["rewards/margins"].sum, 0.1 * difference)


def test_a_cached_reference_that_is_missing_is_an_error(at_start):
    setup, _ = at_start
    with pytest.raises(ValueError, match="reference are not set"):
        setup.objective.loss(setup.model, setup.batch)


def test_swapped_answers_change_the_sign_of_the_margin(moved):
    setup, reference_A = moved
    objective, rows = setup.objective, with_values(setup, reference_A)
    found, _ = stepped(setup.model, lambda: objective.loss(setup.model, objective.collate(rows)))
    turned, _ = stepped(setup.model, lambda: objective.loss(setup.model, objective.collate(swapped(rows))))
    a, b = ({key: float(mean.sum) for key, mean in one.statistics.items()} for one in (found, turned))
    assert a["rewards/margins"] != 0
    assert b["rewards/margins"] == pytest.approx(-a["rewards/margins"], rel=1e-4)
    assert b["rewards/chosen"] == pytest.approx(a["rewards/rejected"], rel=1e-4)
    assert b["logps/rejected"] == pytest.approx(a["logps/chosen"], rel=1e-6)
    assert a["rewards/accuracies"] + b["rewards/accuracies"] == len(rows)
    # -log sigmoid(u) + u = -log sigmoid(-u)
    assert turned.sum.item() == pytest.approx(found.sum.item() + a["rewards/margins"], rel=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_row_has_the_same_weight_in_any_micro_batch(moved, name):
    setup, reference_A = moved
    method, flags = METHODS[name]
    objective, rows = setup.other(method, **flags), with_values(setup, reference_A)
    whole, gradients = stepped(setup.model, lambda: objective.loss(setup.model, objective.collate(rows)))
    for parts in ([[row] for row in rows], [rows[:3], rows[3:]]):
        setup.model.zero_grad()
        found = [objective.loss(setup.model, objective.collate(part)) for part in parts]
        total = sum(part.sum for part in found)
        assert sum(part.weight for part in found) == whole.weight == len(rows)
        (total / whole.weight).backward()
        torch.testing.assert_close(total, whole.sum, rtol=2e-6, atol=0)
        for key, mean in whole.statistics.items():
            summed = sum(part.statistics[key].sum for part in found)
            torch.testing.assert_close(summed, mean.sum, rtol=1e-5, atol=1e-5, msg=key)
        assert_same_gradients(
            {n: p.grad for n, p in setup.model.named_parameters() if p.requires_grad}, gradients, 1e-4
        )


@pytest.mark.parametrize("preset", ["lora", "full"])
def test_a_preference_row_is_two_plain_rows(base_of, tmp_path, preset):
    """Every answer in a row of its own behind its own prompt and pictures, and the loss written out from their sums."""
    setup = prepared(base_of(FAMILIES["qwen2_vl"]), written(tmp_path).parent, preset)
    reference_A = references(setup)
    perturb(setup.model)
    plain = [row for sample in setup.samples for row in plain_rows(sample)]
    batch = setup.objective.collate(plain)
    assert "branches" not in batch
    counts_A = torch.tensor([int((row.labels_T != -100).sum()) for row in plain])

    def by_hand():
        log_probs_K = setup.model(**forward.inputs_of(batch), return_log_probs=True).log_probs
        sums_A = torch.stack([part.sum() for part in log_probs_K.split(counts_A.tolist())])
        found = losses.sigmoid(*(one.view(-1, 2) for one in (sums_A, counts_A, reference_A)), beta=0.1)
        return Loss(found.sum, len(setup.samples))

    wanted, plain_gradients = stepped(setup.model, by_hand)
    shared = setup.batch
    repeated = setup.base.collator()
    repeated.shared = False
    for laid_out in (shared, dict(repeated(setup.samples))):
        objective = setup.objective
        found, gradients = stepped(
            setup.model,
            lambda: objective.loss(setup.model, with_reference(laid_out, reference_A)),  # noqa: B023
        )
        torch.testing.assert_close(found.sum, wanted.sum, rtol=2e-6, atol=0)
        assert_same_gradients(gradients, plain_gradients)
    assert len(shared["still_pixels"]) * 2 == len(batch["still_pixels"])


def plain_rows(sample):
    """The row of each answer of an encoded preference row."""
    prompt, *answers = sample.branches
    starts = [prompt, prompt + answers[0]]
    for start, length in zip(starts, answers, strict=True):
        rows = torch.cat([torch.arange(prompt), torch.arange(start, start + length)])
        names = ("input_ids_T", "labels_T", "kinds_T", "positions_3T")
        yield replace(sample, **{name: getattr(sample, name)[..., rows] for name in names}, branches=())


def test_micro_batches_without_rows_and_with_several_numbers_of_answers(moved):
    setup, reference_A = moved
    objective, rows = setup.objective, with_values(setup, reference_A)
    empty = objective.collate([])
    loss = objective.loss(setup.model, empty)
    assert (loss.weight, float(loss.sum)) == (0, 0)
    loss.sum.backward()  # other processes wait for it
    # The third row again, with its rejected answer twice: the mean of two equal comparisons.
    prompt, chosen, rejected = rows[2].branches
    twice = torch.cat([torch.arange(prompt + chosen + rejected), torch.arange(prompt + chosen, len(rows[2].labels_T))])
    names = ("input_ids_T", "labels_T", "kinds_T", "positions_3T")
    three = replace(
        rows[2],
        **{name: getattr(rows[2], name)[..., twice] for name in names},
        branches=(prompt, chosen, rejected, rejected),
        reference=(*rows[2].reference, rows[2].reference[1]),
    )
    with torch.no_grad():
        wanted = objective.loss(setup.model, objective.collate([rows[0], rows[2], rows[1]]))
        found = objective.loss(setup.model, objective.collate([rows[0], three, rows[1]]))
    torch.testing.assert_close(found.sum, wanted.sum, rtol=2e-6, atol=0)
    for key, mean in wanted.statistics.items():
        torch.testing.assert_close(found.statistics[key].sum, mean.sum, rtol=1e-5, atol=1e-5, msg=key)


def test_rows_without_reference_values_are_refused_once_others_have_them(at_start):
    setup, _ = at_start
    objective = setup.with_loss("sigmoid")
    first, second = setup.rows[:2]
    objective.references[first.file, first.index] = (-1.0, -2.0)
    assert objective.encode(first).reference == (-1.0, -2.0)
    with pytest.raises(DataError, match="computed without this row"):
        objective.encode(second)
