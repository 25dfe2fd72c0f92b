"""The head's chunked losses against plain ones: value, every gradient, and tensors that they never hold."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from models import FAMILY, flat_inputs
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vlft.data.encode import UNTRAINED
from vlft.data.sample import EncodedSample
from vlft.demo.tiny import tiny_config, tiny_processor
from vlft.families import DEFAULT
from vlft.model import attention, forward, loss, towers
from vlft.model.apply import apply_towers
from vlft.model.scale import PixelScale

VOCABULARY, CHANNELS = 96, 24


@pytest.fixture
def chunks_of_32(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 32 * VOCABULARY)


def head(dtype=torch.float32) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(CHANNELS, VOCABULARY, bias=False).to(dtype)


def rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    hidden = torch.randn(count, CHANNELS, generator=generator)
    return hidden.requires_grad_(), torch.randint(VOCABULARY, (count,), generator=generator)


def plain(linear, hidden, targets):
    return F.cross_entropy(linear(hidden).float(), targets, reduction="sum")


def both(count: int, *, trained: bool = True, upstream: float = 0.37, autocast: bool = False, dtype=torch.float32):
    """(loss, gradient of hidden, gradient of the weight or None) of plain cross-entropy and of ours."""
    results = []
    for chunked in (False, True):
        linear, (hidden, targets) = head(dtype).requires_grad_(trained), rows(count)
        if chunked:
            loss.bind(linear)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = linear(hidden, targets) if chunked else plain(linear, hidden, targets)
        (value * upstream).backward()
        results.append((value.detach(), hidden.grad, linear.weight.grad))
    return results


def far(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest difference, as a share of the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100])
def test_value_and_gradients_are_those_of_plain_cross_entropy(chunks_of_32, count, trained):
    assert loss.chunk_rows(VOCABULARY) == 32
    theirs, ours = both(count, trained=trained)
    assert (ours[2] is None) == (theirs[2] is None) == (not trained)
    for mine, stock in zip(ours, theirs, strict=True):
        if stock is not None:
            assert mine.dtype == stock.dtype
            assert far(mine, stock) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32-weight", "bf16-weight"])
def test_bf16_autocast_is_as_exact_as_the_plain_way(chunks_of_32, dtype):
    """Logits come from the same bf16 matmul, and all after it is float32: the loss agrees as in float32.

    Both sides round a gradient to bf16 (by at most 2**-9 of itself) before and after its matmul, but one side does so
    before the upstream factor and the other one after it. So they differ by up to four roundings.
    """
    theirs, ours = both(100, autocast=True, dtype=dtype)
    assert far(ours[0], theirs[0]) < 1e-6
    for mine, stock in zip(ours[1:], theirs[1:], strict=True):
        assert mine.dtype == stock.dtype
        assert far(mine, stock) < 4 * 2**-9


def test_a_bf16_weight_sums_its_gradient_over_chunks_in_float32(monkeypatch):
    """Against float32 on the same weight: no worse in 16 chunks than in one."""
    exact = both(512)[0][2]
    errors = []
    for elements in (2**26, 32 * VOCABULARY):
        monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
        linear, (hidden, targets) = head(torch.bfloat16), rows(512)
        (loss.linear_cross_entropy(hidden, linear.weight, targets) * 0.37).backward()
        assert linear.weight.grad.dtype == torch.bfloat16
        errors.append(float((linear.weight.grad - exact).norm() / exact.norm()))
    assert errors[1] < 1.1 * errors[0] < 0.01


def test_no_supervised_row_gives_zero_and_zero_gradients():
    linear, (hidden, targets) = head(), rows(0)
    loss.bind(linear)
    value = linear(hidden, targets)
    value.backward()
    assert value.item() == 0
    assert hidden.grad.shape == (0, CHANNELS)
    assert not linear.weight.grad.any()


def test_only_this_head_changes_and_without_targets_not_even_it():
    ours, other = head(), head()
    loss.bind(ours)
    hidden, targets = rows(3)
    assert torch.equal(ours(hidden), other(hidden))
    with pytest.raises(TypeError):
        other(hidden, targets)


def test_a_head_with_a_bias_is_refused():
    with pytest.raises(TypeError, match="without bias"):
        loss.bind(torch.nn.Linear(2, 2))


def test_a_second_backward_is_refused_not_wrong():
    linear, (hidden, targets) = head(), rows(3)
    value = loss.linear_cross_entropy(hidden, linear.weight, targets)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_evaluation_makes_no_gradients(chunks_of_32):
    linear, (hidden, targets) = head(), rows(100)
    with torch.no_grad(), Watch() as watch:
        value = loss.linear_cross_entropy(hidden, linear.weight, targets)
    assert far(value, plain(linear, hidden, targets)) < 1e-6
    assert not value.requires_grad
    assert watch.ran["aten.mm"] == 4  # one per chunk


# ---- a log-probability per row


def plain_log_probs(linear, hidden, labels):
    return F.log_softmax(linear(hidden).float(), dim=1).gather(1, labels[:, None]).squeeze(1)


def both_log_probs(count: int, *, trained: bool = True, autocast: bool = False, dtype=torch.float32):
    """(log-probabilities, gradient of hidden, gradient of the weight or None) of the plain way and of ours.

    Each row has its own upstream gradient, as in preference training.
    """
    upstream = torch.randn(count, generator=torch.Generator().manual_seed(7))
    results = []
    for chunked in (False, True):
        linear, (hidden, labels) = head(dtype).requires_grad_(trained), rows(count)
        if chunked:
            loss.bind(linear)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = linear(hidden, labels, summed=False) if chunked else plain_log_probs(linear, hidden, labels)
        value.backward(upstream)
        results.append((value.detach(), hidden.grad, linear.weight.grad))
    return results


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
@pytest.mark.parametrize("elements", [1, 17 * VOCABULARY, 32 * VOCABULARY, 2**26])
@pytest.mark.parametrize("count", [1, 33, 100])
def test_log_probs_and_gradients_are_those_of_log_softmax(monkeypatch, count, elements, trained):
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    theirs, ours = both_log_probs(count, trained=trained)
    assert ours[0].shape == (count,)
    assert (ours[2] is None) == (theirs[2] is None) == (not trained)
    for mine, stock in zip(ours, theirs, strict=True):
        if stock is not None:
            assert mine.dtype == stock.dtype
            assert far(mine, stock) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32-weight", "bf16-weight"])
def test_log_probs_under_bf16_autocast_are_as_exact_as_the_plain_way(chunks_of_32, dtype):
    theirs, ours = both_log_probs(100, autocast=True, dtype=dtype)
    assert far(ours[0], theirs[0]) < 1e-6
    for mine, stock in zip(ours[1:], theirs[1:], strict=True):
        assert mine.dtype == stock.dtype
        assert far(mine, stock) < 4 * 2**-9


def test_log_probs_pass_torchs_own_check_of_gradients(chunks_of_32):
    hidden = torch.randn(70, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCABULARY, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(VOCABULARY, (70,))
    assert torch.autograd.gradcheck(lambda h, w: loss.linear_log_probs(h, w, labels), (hidden, weight), fast_mode=True)


def test_a_label_that_is_nearly_sure_keeps_its_gradient():
    """1 - p is taken from log p: at p = 1 - 1e-12 the difference of two float32 would be 0."""
    weight = torch.eye(2)
    hidden = torch.tensor([[28.0, 0.0]], requires_grad=True)
    loss.linear_log_probs(hidden, weight, torch.tensor([0])).sum().backward()
    assert hidden.grad[0, 0].item() == pytest.approx(6.914e-13, rel=1e-3)


def test_no_supervised_row_gives_no_log_probs_and_zero_gradients():
    linear, (hidden, labels) = head(), rows(0)
    value = loss.linear_log_probs(hidden, linear.weight, labels)
    value.sum().backward()
    assert value.shape == (0,)
    assert hidden.grad.shape == (0, CHANNELS)
    assert not linear.weight.grad.any()


def test_log_probs_without_gradients_are_the_same(chunks_of_32):
    linear, (hidden, labels) = head(), rows(100)
    with torch.no_grad():
        value = loss.linear_log_probs(hidden, linear.weight, labels)
    assert not value.requires_grad
    assert torch.equal(value, loss.linear_log_probs(hidden, linear.weight, labels).detach())


def test_sums_per_segment_are_those_of_each_alone():
    values = torch.randn(6, dtype=torch.float64, requires_grad=True)
    places = torch.tensor([1, 2, 7, 8, 9, 14])
    bounds = torch.tensor([0, 4, 6, 12, 12, 15], dtype=torch.int32)
    sums, counts = loss.sum_segments(values, places, bounds)
    assert counts.tolist() == [2, 0, 3, 0, 1]
    alone = [values[0] + values[1], 0.0, values[2] + values[3] + values[4], 0.0, values[5]]
    assert sums.tolist() == pytest.approx([float(one) for one in alone])
    (sums * torch.arange(1.0, 6.0)).sum().backward()
    assert values.grad.tolist() == [1, 1, 3, 3, 3, 5]
    nothing, counts = loss.sum_segments(values[:0], places[:0], torch.tensor([0, 1], dtype=torch.int32))
    assert (nothing.tolist(), counts.tolist()) == ([0.0], [0])


# ---- memory


class Watch(TorchDispatchMode):
    """Records every new tensor: the largest one, the most bytes alive at one time, and the calls of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.now = self.peak = 0
        self.ran: dict[str, int] = {}
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        self.ran[name] = self.ran.get(name, 0) + 1
        there = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                self.largest = max(self.largest, tensor.numel())
                if tensor.untyped_storage()._cdata not in there:  # otherwise a view, or written in place
                    self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def gone(_: object) -> None:
            self.now -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def long_row(tokens: int, supervised: int, samples: int = 16) -> dict:
    """A flat batch of text: `samples` of equal length, the last tokens of each supervised."""
    each = tokens // samples
    items = []
    for i in range(samples):
        ids = torch.randint(0, 200, (each,), generator=torch.Generator().manual_seed(i))
        labels = ids.clone()
        labels[: each - supervised // samples] = UNTRAINED
        items.append(
            EncodedSample(
                file="",
                index=i,
                id=None,
                input_ids_T=ids,
                labels_T=labels,
                media=(),
                text="",
                kinds_T=torch.zeros(each, dtype=torch.uint8),
                positions_3T=torch.arange(each).expand(3, -1),
            )
        )
    return flat_inputs(items)


@pytest.mark.parametrize(
    ("language", "tied"),
    [
        pytest.param("full", True, id="full-tied"),
        pytest.param("lora", False, id="lora-untied", marks=pytest.mark.grid),
        pytest.param("full", False, id="full-untied", marks=pytest.mark.grid),
        pytest.param("lora", True, id="lora-tied", marks=pytest.mark.grid),
    ],
)
def test_a_row_of_16k_tokens_and_152k_words_holds_no_tokens_by_vocabulary(language, tied):
    from transformers import Qwen2VLForConditionalGeneration

    words, tokens, supervised = 151_936, 16_384, 560
    processor = tiny_processor()
    text = {
        "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1, "num_key_value_heads": 1,
        "num_hidden_layers": 1,
    }  # fmt: skip
    config = tiny_config(processor, tied=tied, shape=DEFAULT.tiny.but(text=text, vision={"hidden_size": 16}))
    config.text_config.vocab_size = words
    model = Qwen2VLForConditionalGeneration(config)
    attention.install(model, "sdpa", dtype=torch.float32)
    forward.bind(model, PixelScale.of(processor))
    model = apply_towers(model, FAMILY, towers.Towers(language=language, lora_dropout=0.0), masters=True)
    inputs = long_row(tokens, supervised)
    assert loss.chunk_rows(words) < len(inputs["targets"]) == supervised
    with Watch() as training:
        trained = model.train()(**inputs).loss
        trained.backward()
    with torch.no_grad(), Watch() as evaluation:
        evaluated = model.eval()(**inputs).loss
    assert float(evaluated) == pytest.approx(float(trained))
    for watch in (training, evaluation):
        assert watch.largest <= loss.CHUNK_ELEMENTS < supervised * words < tokens * words
    assert training.peak < 4 * (2 * loss.CHUNK_ELEMENTS + 6 * words * 16 + 200 * tokens * 16)


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_memory_grows_with_the_vocabulary_by_the_weights_gradient_alone(monkeypatch, trained):
    """Peak bytes above the weight itself, at vocabularies of 1, 2 and 4 times a size, all of them several chunks."""
    elements, channels, count = 2**18, 32, 512
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    peaks = {}
    for words in (4_096, 8_192, 16_384):
        weight = torch.randn(words, channels, requires_grad=trained)
        hidden = torch.randn(count, channels, requires_grad=True)
        targets = torch.randint(words, (count,))
        with Watch() as watch:
            (loss.linear_cross_entropy(hidden, weight, targets) / 7).backward()
        peaks[words] = watch.peak
        with torch.no_grad(), Watch() as watch:
            loss.linear_cross_entropy(hidden, weight, targets)
        assert watch.peak < 2 * 4 * elements + 10_000  # logits and their softmax, of one chunk
        gradient = 4 * words * channels if trained else 0
        piece = 4 * min(elements, words * channels) if trained else 0  # one slice of a chunk's share of it
        assert peaks[words] - gradient - piece < 2 * 4 * elements + 2 * 4 * count * channels + 10_000
    if not trained:
        assert max(peaks.values()) - min(peaks.values()) < 10_000


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_log_probs_keep_no_logits_for_the_backward_pass(monkeypatch, trained):
    """It saves hidden states, weight and labels; only the logits and softmax of one chunk are alive at one time."""
    elements, channels, count, words = 2**18, 32, 512, 8_192
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", elements)
    weight = torch.randn(words, channels, requires_grad=trained)
    hidden = torch.randn(count, channels, requires_grad=True)
    labels = torch.randint(words, (count,))
    saved = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one)
    with keep, Watch() as forward_pass:
        value = loss.linear_log_probs(hidden, weight, labels)
    assert [tuple(one.shape) for one in saved] == [(count, channels), (words, channels), (count,)]
    assert all(one.data_ptr() == kept.data_ptr() for one, kept in zip(saved, (hidden, weight, labels), strict=True))
    with Watch() as backward_pass:
        value.backward(torch.randn(count))
    gradients = 4 * words * channels * trained + 4 * count * channels
    piece = 4 * elements * trained
    for watch, more in ((forward_pass, 0), (backward_pass, gradients + piece)):
        assert watch.largest <= elements < count * words
        assert watch.peak < 2 * 4 * elements + more + 50_000


def test_the_flat_forward_gives_log_probs_instead_of_the_loss(base, encoded):
    """In a packed row their sum is the loss, and the sum of each sample is the one that it has alone."""
    from transformers import AutoModelForImageTextToText

    from vlft.model.load import load_processor

    model = AutoModelForImageTextToText.from_pretrained(base)
    attention.install(model, "sdpa", dtype=torch.float32)
    forward.bind(model, PixelScale.of(load_processor(base)))
    items = [encoded[name] for name in ("still", "two-turns", "text")]
    inputs = flat_inputs(items)
    with torch.no_grad():
        packed = model(**inputs, return_log_probs=True)
        summed = model(**inputs).loss
        alone = [model(**flat_inputs([item])).loss for item in items]
    assert packed.loss is None
    assert float(packed.log_probs.sum()) == pytest.approx(-float(summed), rel=1e-6)
    sums, counts = loss.sum_segments(packed.log_probs, inputs["supervised_rows"], inputs["cu_seqlens"])
    assert counts.tolist() == [int((item.labels_T != UNTRAINED).sum()) for item in items]
    assert sums.tolist() == pytest.approx([-float(one) for one in alone], rel=1e-5)
