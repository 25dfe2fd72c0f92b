"""Figures of labels equal scikit-learn's; their intervals are those of the binomial; messages name rows and labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, roc_auc_score

from vlft.errors import ConfigError
from vlft.evaluation.labels import labelled, places
from vlft.metrics.labels import Choices, compared, confusion, figures

LABELS = ("cat", "dog", "cow", "hen")


def choices(rows=200, labels=4, seed=0, skill=1.0, ties=False) -> Choices:
    generator = np.random.default_rng(seed)
    right = generator.integers(0, labels, rows)
    scores = generator.normal(size=(rows, labels)) + skill * np.eye(labels)[right] - 3
    return Choices(right_R=right, scores_RK=scores.round(1) if ties else scores)


def whole(some: Choices) -> dict[str, float]:
    return {name: float(value[0]) for name, value in figures(some, np.ones((1, len(some.right_R)))).items()}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("labels", [2, 3, 4])
def test_figures_are_those_of_scikit_learn(labels, ties):
    some = choices(labels=labels, ties=ties)
    found, probabilities = whole(some), softmax(some.scores_RK, axis=1)
    if ties:
        probabilities = probabilities.round(12)  # equal scores give equal probabilities
    assert found["accuracy"] == pytest.approx(accuracy_score(some.right_R, some.chosen_R))
    assert found["macro_f1"] == pytest.approx(f1_score(some.right_R, some.chosen_R, average="macro"))
    theirs = (
        roc_auc_score(some.right_R, probabilities[:, 1])
        if labels == 2
        else roc_auc_score(some.right_R, probabilities, multi_class="ovr")
    )
    assert found["auc"] == pytest.approx(theirs, abs=1e-9)
    theirs = confusion_matrix(some.right_R, some.chosen_R, labels=range(labels))
    assert confusion(some) == tuple(map(tuple, theirs.tolist()))


def test_weights_are_rows_that_occur_several_times():
    some = choices(rows=40, ties=True)
    weights = np.random.default_rng(1).integers(0, 4, (5, 40))
    found = figures(some, weights.astype(float))
    for place, counts in enumerate(weights):
        rows = np.repeat(np.arange(40), counts)
        repeated = whole(Choices(right_R=some.right_R[rows], scores_RK=some.scores_RK[rows]))
        assert {name: values[place] for name, values in found.items()} == pytest.approx(repeated)


def test_labels_that_do_not_occur_are_left_out():
    some = choices(labels=3)
    wider = Choices(right_R=some.right_R, scores_RK=np.column_stack([some.scores_RK, np.full(200, -90.0)]))
    assert whole(wider) == pytest.approx(whole(some))


def test_probabilities_close_to_one_are_not_ties():
    scores = np.array([[0.0, -100.0], [0.0, -200.0], [-50.0, 0.0], [-60.0, 0.0]])
    assert whole(Choices(right_R=np.array([0, 0, 1, 1]), scores_RK=scores))["auc"] == 1.0
    assert whole(Choices(right_R=np.array([1, 0, 0, 1]), scores_RK=scores))["auc"] == 0.75


def test_auc_of_one_label_alone_is_not_defined():
    some = Choices(right_R=np.zeros(3, dtype=int), scores_RK=np.random.default_rng(0).normal(size=(3, 2)))
    assert math.isnan(whole(some)["auc"])


def test_intervals_of_a_share_are_those_of_the_normal_distribution():
    some = choices(rows=2000)
    (found,) = compared([some])
    share, _ = found["accuracy"]
    half = 1.96 * math.sqrt(share.value * (1 - share.value) / 2000)
    assert (share.value - share.low, share.high - share.value) == pytest.approx((half, half), rel=0.1)


def test_the_interval_of_auc_is_that_of_delong():
    """For one label against another, Hanley and McNeil's variance of the AUC by its structural components."""
    some = choices(rows=400, labels=2)
    score = some.scores_RK[:, 1] - some.scores_RK[:, 0]
    own, other = score[some.right_R == 1], score[some.right_R == 0]
    wins = (own[:, None] > other[None]).astype(float)
    deviation = math.sqrt(wins.mean(1).var(ddof=1) / len(own) + wins.mean(0).var(ddof=1) / len(other))
    (found,) = compared([some])
    area, _ = found["auc"]
    assert area.value == pytest.approx(wins.mean())
    assert (area.high - area.low) == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_differences_are_paired():
    some, better = choices(), choices(skill=1.2)
    first, same, other = compared([some, some, better])
    for name in first:
        for zero in (first[name][1], same[name][1]):
            assert (zero.value, zero.low, zero.high) == (0, 0, 0)
        own, difference = other[name]
        assert difference.value == pytest.approx(own.value - first[name][0].value)
        assert difference.low <= difference.value <= difference.high
        # The same noise in both models: the difference is known better than either figure.
        assert difference.high - difference.low < own.high - own.low


def test_one_row():
    (found,) = compared([choices(rows=1)])
    share, _ = found["accuracy"]
    assert share.low == share.value == share.high


def test_models_of_other_rows_are_refused():
    with pytest.raises(ValueError, match="the same rows"):
        compared([choices(rows=4), choices(rows=5)])


# ---- rows


def test_rows_become_figures_confusions_and_answers():
    right = places(["a[0]", "a[1]", "a[2]"], ["cat", " dog\n", "dog"], LABELS)
    assert right == [0, 1, 1]
    base = [{"cat": -1.0, "dog": -2.0, "cow": -3.0, "hen": -4.0}] * 3
    tuned = [*base[:1], *[{"cat": -2.0, "dog": -2.0, "cow": -3.0, "hen": -4.0}], {**base[0], "dog": -0.5}]
    found = labelled(right, [base, tuned], LABELS)
    assert found.answers == (("cat",) * 3, ("cat", "cat", "dog"))
    assert found.hits == ((True, False, False), (True, False, True))
    assert [figure.value for figure in found.figures["accuracy"]] == pytest.approx([1 / 3, 2 / 3])
    # base: cat has F1 2*1/(1+3), dog 0; tuned: cat 2*1/(1+2), dog 2*1/(2+1)
    assert [figure.value for figure in found.figures["macro_f1"]] == pytest.approx([1 / 4, 2 / 3])
    # tuned: dog beats in 2 of 2 pairs, cat likewise; base: all ties
    assert [figure.value for figure in found.figures["auc"]] == pytest.approx([1 / 2, 1])
    none, difference = found.differences["accuracy"]
    assert none is None
    assert (difference.value, difference.rows) == (pytest.approx(1 / 3), 3)
    assert found.confusions[1].labels == LABELS
    assert found.confusions[1].counts == ((1, 0, 0, 0), (1, 1, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0))
    assert found.notes == ()


def test_rows_of_one_label_have_no_auc():
    found = labelled([1, 1], [[{"cat": -1.0, "dog": -2.0}] * 2], LABELS[:2])
    assert set(found.figures) == set(found.differences) == set(found.texts) == {"accuracy", "macro_f1"}
    assert found.notes == ("auc is not defined where all rows have the same right label",)


def test_an_answer_that_is_no_label_is_refused_with_rows_and_labels():
    with pytest.raises(ConfigError, match=r"2 rows .*: a\[1\] 'Dog', a\[3\] 'a dog'\. The labels are 'cat', 'dog'"):
        places([f"a[{i}]" for i in range(4)], ["cat", "Dog", "dog", "a dog"], LABELS)
    with pytest.raises(ConfigError, match=r"agree in case"):
        places(["a[0]"], ["DOG"], LABELS)
    with pytest.raises(ConfigError, match=r"7 rows .* and 2 more rows\. "):
        places([f"a[{i}]" for i in range(7)], ["?"] * 7, LABELS)


def test_scores_of_other_labels_are_refused():
    with pytest.raises(ConfigError, match=r"row 2 has scores of 'cat'; --labels has 'cat', 'dog'"):
        labelled([0, 0], [[{"cat": -1.0, "dog": -2.0}, {"cat": -1.0}]], LABELS[:2])
    with pytest.raises(ConfigError, match=r"row 1: the log-probability of 'dog' is not a number"):
        labelled([0], [[{"cat": -1.0, "dog": math.nan}]], LABELS[:2])
