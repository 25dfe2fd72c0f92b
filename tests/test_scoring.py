"""Labels are scored as a plain stock forward over the whole row does, for every family and any batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import stock_loss

from vlft.answering import question_of, speaker
from vlft.config.recipe import Recipe
from vlft.config.row_flags import RowFlags
from vlft.data.encode import Encoder
from vlft.data.sample import Text, Turn
from vlft.errors import ConfigError
from vlft.families import FAMILIES
from vlft.model.load import load_base, load_config, load_processor
from vlft.scoring import label_scores, label_tokens
from vlft.setup.labels import read_labels

LABELS = ("Yes", "A temple in China.", "no, an astronaut of the moon", "4")
NAMES = ("still", "text", "two-turns", "both", "frames", "text-2")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def encoder(base_of, family):
    folder = base_of(family)
    processor, sizes = load_processor(folder), family.sizes(load_config(folder)[0])
    flags = RowFlags(max_length=32768, image_max_pixels=6 * 28 * 28, video_max_pixels=6 * 28 * 28, nframes=4)
    recipe = Recipe.of(processor, flags, family=family, tokens_per_second=sizes.vision.tokens_per_second)
    return Encoder(family=family, processor=processor, recipe=recipe)


@pytest.fixture(scope="module")
def model(base_of, family):
    return load_base(base_of(family), family, dtype=torch.float32).eval()


def answered(question, label):
    """The question as a row in which only this answer is trained."""
    turn = Turn(role="assistant", parts=(Text(text=label),), field="label")
    return replace(question, turns=(*question.turns, turn), answer=len(question.turns), thinking=None)


def plain_scores(question, encoder, model):
    """By one stock forward for each label, over all of the row."""
    found = {}
    for label in LABELS:
        row = encoder.encode(answered(question, label))
        paces = [medium.grid.pace for medium in row.media if medium.grid.pace is not None]
        with torch.inference_mode():
            found[label] = -float(stock_loss(_Paced(model, paces), row, encoder.processor)[0])
    return found


class _Paced:
    """The model, told the seconds between frames, which `stock_loss` leaves out."""

    def __init__(self, model, paces):
        self.model = model
        self.more = {"second_per_grid_ts": torch.tensor(paces)} if paces else {}

    def __call__(self, **inputs):
        return self.model(**inputs, **self.more)


def test_scores_are_those_of_a_plain_forward(samples, encoder, model, family):
    questions = [question_of(samples[name]) for name in NAMES]
    says = speaker(model, encoder.processor, family)
    wanted = [plain_scores(question, encoder, model) for question in questions]
    for batch in (1, 4):
        found = list(label_scores(questions, LABELS, encoder, says, batch=batch))
        for name, mine, theirs in zip(NAMES, found, wanted, strict=True):
            assert list(mine) == list(LABELS)
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5), (name, batch)
    values = [value for row in wanted for value in row.values()]
    assert len({round(value, 3) for value in values}) == len(values)  # nothing is equal by chance


def test_one_question_gives_the_same_scores_again(samples, encoder, model, family):
    """The model keeps the position offsets of earlier rows; they must not enter."""
    says = speaker(model, encoder.processor, family)
    both, text = question_of(samples["both"]), question_of(samples["text"])
    (alone,) = label_scores([text], LABELS, encoder, says)
    list(label_scores([both], LABELS, encoder, says))
    (again,) = label_scores([text], LABELS, encoder, says)
    assert again == alone


def test_tokens_of_a_label_are_those_of_training(samples, encoder):
    for name in ("still", "two-turns"):
        for label, ids in zip(LABELS, label_tokens(LABELS, encoder), strict=True):
            row = encoder.encode(answered(question_of(samples[name]), label))
            assert row.labels_T[row.labels_T != -100].tolist() == ids


def test_a_prompt_that_is_too_long_is_refused(samples, encoder, model, family):
    says = speaker(model, encoder.processor, family)
    with pytest.raises(ConfigError, match=r"\[0\]: the prompt is .* the model supports 20 together"):
        list(label_scores([question_of(samples["still"])], LABELS, encoder, says, limit=20))


def test_labels_alike_are_refused(encoder):
    with pytest.raises(ConfigError, match="labels 'Yes' and 'Yes' have the same tokens"):
        label_tokens(("Yes", "no", "Yes"), encoder)


def test_labels_have_no_thoughts(encoder, family):
    """The prompt of a model that can think is that of an answer without thoughts, so --thinking on cannot act."""
    thinking = replace(encoder, recipe=replace(encoder.recipe, thinking="on"))
    if "enable_thinking" not in encoder.recipe.switches:
        assert label_tokens(LABELS, thinking) == label_tokens(LABELS, encoder)
        return
    with pytest.raises(ConfigError, match=r"--labels: 'Yes': the answer has no thoughts .* --thinking on"):
        label_tokens(LABELS, thinking)


# ---- the file of labels


def labels_of(tmp_path, content: bytes):
    path = tmp_path / "labels.txt"
    path.write_bytes(content)
    return read_labels(path)


def test_a_label_on_each_line(tmp_path):
    text = "\ufeffcat\r\n\r\n  dog with spots \n\nécu\u2028rond\r\n".encode()
    assert labels_of(tmp_path, text) == ("cat", "dog with spots", "écu\u2028rond")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"cat\n\ndog\ncat \n", r"lines 1 and 4 are the same label, 'cat'"),
        (b"cat\n", r"1 label, and at least 2 are needed"),
        (b"\n", r"0 labels, and at least 2 are needed"),
        (b"cat\n\xff\n", r"byte 4 is not UTF-8"),
    ],
)
def test_a_bad_file_of_labels_is_refused(tmp_path, content, said):
    with pytest.raises(ConfigError, match=said):
        labels_of(tmp_path, content)


def test_a_missing_file_of_labels_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.txt: No such file"):
        read_labels(tmp_path / "none.txt")
