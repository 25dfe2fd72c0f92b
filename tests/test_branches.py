"""Answers that share one prompt: a branch row is the plain rows of its answers, in loss and in every gradient.

Where layers cannot share a prompt, its tokens are repeated, and the features of its pictures are placed again.
"""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from branch_rows import asked, branch_batch, copied_batch, plain_batch
from models import PRESETS, build, gradients
from torch.utils.flop_counter import FlopCounterMode

from vlft.model import attention, flops, forward, trial
from vlft.model.segments import Heads, attend_segments, gathered
from vlft.train.metrics import meter_of

CPU, BF16 = torch.device("cpu"), torch.bfloat16
SHARING = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


def rows_of(stock, *kinds):
    return asked([stock.rows[kind].flat for kind in kinds or ("picture", "mixed", "text", "pictures")])


def model_of(stock, preset="vision-lora", **how):
    return build(stock.base, preset, flat=True, family=stock.family, loaded=stock.model, **how)


def weighted(model, batch):
    """The log-probabilities of all answers, and the gradients of a loss that weights every token differently."""
    model.zero_grad()
    log_probs_K = model(**forward.inputs_of(batch), return_log_probs=True).log_probs
    weights_K = torch.randn(len(log_probs_K), generator=torch.Generator().manual_seed(3))
    (log_probs_K * weights_K).sum().backward()
    return log_probs_K.detach(), gradients(model)


def difference(found, wanted):
    """The largest difference, as a share of the largest value."""
    return float(((found - wanted).abs().max() / wanted.abs().max()).detach())


def assert_same(found, wanted, tolerance=1e-5):
    assert difference(found[0], wanted[0]) < tolerance
    assert set(found[1]) == set(wanted[1])
    shares = {name: difference(found[1][name], gradient) for name, gradient in wanted[1].items()}
    worst = max(shares, key=shares.__getitem__)
    assert shares[worst] < tolerance, (worst, shares[worst])


@pytest.mark.parametrize("model_type", SHARING)
def test_a_branch_row_is_the_plain_rows_of_its_answers(stock_of, model_type):
    stock = stock_of(model_type)
    rows = rows_of(stock)
    plain, shared = plain_batch(rows, stock.family), branch_batch(rows, stock.family)
    assert sum(shared["lengths"]) < sum(plain["lengths"])
    assert len(shared["still_pixels"]) < len(plain["still_pixels"])
    model = model_of(stock)
    wanted = weighted(model, plain)
    assert any(".visual." in name for name in wanted[1])
    assert_same(weighted(model, shared), wanted)
    assert_same(weighted(model_of(stock, checkpointing=True), shared), wanted)


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_5"])
def test_features_that_are_placed_again_are_those_of_a_second_vision_call(stock_of, model_type):
    stock = stock_of(model_type)
    rows = rows_of(stock)
    plain, copied = plain_batch(rows, stock.family), copied_batch(rows, stock.family)
    assert len(copied["still_pixels"]) < len(plain["still_pixels"])
    model = model_of(stock)
    # A chunked delta rule enlarges last bits: `test_flat_families.py`.
    tolerance = 1e-4 if model_type == "qwen3_5" else 1e-5
    assert_same(weighted(model, copied), weighted(model, plain), tolerance)


def test_stored_features_are_placed_again_too(stock_of):
    stock = stock_of("qwen3_vl")
    vision, generator = stock.family.sizes(stock.model.config).vision, torch.Generator().manual_seed(5)

    def stored(medium):
        size = (vision.mergers, medium.grid.patches // vision.cell, vision.out)
        features = torch.randn(size, generator=generator)
        return dataclasses.replace(medium, pixels=torch.empty(0, dtype=torch.uint8), features=features)

    rows = rows_of(stock)
    some = dataclasses.replace(rows[1].row, media=tuple(map(stored, rows[1].row.media)))
    rows[1] = dataclasses.replace(rows[1], row=some)
    plain, copied = plain_batch(rows, stock.family), copied_batch(rows, stock.family)
    assert copied["cached"]["features"].shape[1] < plain["cached"]["features"].shape[1]
    model = model_of(stock, "language-lora")
    assert_same(weighted(model, copied), weighted(model, plain))


def test_gated_delta_nets_refuse_to_share_a_prompt(stock_of):
    stock = stock_of("qwen3_5")
    with pytest.raises(ValueError, match="cannot share a prompt"):
        weighted(model_of(stock), branch_batch(rows_of(stock, "text"), stock.family))


def test_no_answer_sees_another(stock_of):
    """The detector of leaks: other tokens in one answer leave the log-probabilities of all others bit-equal."""
    stock = stock_of("qwen2_vl")
    model, rows = model_of(stock).eval(), rows_of(stock, "picture", "text")

    def log_probs(rows):
        batch = branch_batch(rows, stock.family)
        with torch.no_grad():
            found = model(**forward.inputs_of(batch), return_log_probs=True).log_probs
        return found.split(batch["answers"]["bounds"].diff().tolist())

    before = log_probs(rows)
    assert len(before) == 5
    for row, number, place in ((0, 0, 1), (1, 0, 3), (1, 1, 4)):
        others = [*rows[row].others]
        others[number] = (others[number] + 7) % 200
        again = [*rows[:row], dataclasses.replace(rows[row], others=tuple(others)), *rows[row + 1 :]]
        same = [torch.equal(a, b) for a, b in zip(before, log_probs(again), strict=True)]
        assert same == [answer != place for answer in range(5)]


# ---- attention


def dense(q, k, v, lengths, key_lengths, kv_rows, scale):
    """Attention over the whole row with a mask of [T, T]."""
    seen, starts = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool), [0, 0]
    for length, keys in zip(lengths, key_lengths, strict=True):
        for query in range(length):
            visible = kv_rows[starts[1] : starts[1] + keys - length + query + 1]
            seen[starts[0] + query, visible] = True
        starts = [starts[0] + length, starts[1] + keys]
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2)


def test_attention_is_that_of_a_dense_mask_in_float64():
    # Two answers after a prompt of 4, a plain row, then three answers after a prompt of 2; neighbours of equal lengths.
    lengths, key_lengths = [9, 3, 6, 4, 2, 2], [9, 7, 6, 4, 4, 4]
    kv_rows = torch.tensor(
        [*range(9), *range(4), 9, 10, 11, *range(12, 18), *range(18, 22), 18, 19, 22, 23, 18, 19, 24, 25]
    )
    generator, results = torch.Generator().manual_seed(0), []
    drawn = [torch.randn(1, heads, 26, 8, dtype=torch.float64, generator=generator) for heads in (4, 2, 2)]
    upstream = torch.randn(1, 26, 4, 8, dtype=torch.float64, generator=generator)
    for ours in (True, False):
        q, k, v = (x.clone().requires_grad_() for x in drawn)
        if ours:
            keys = (gathered(x, kv_rows) for x in (k, v))
            out = attend_segments(q, *keys, lengths, key_lengths=key_lengths, scale=0.3, causal=True)
        else:
            out = dense(q, k, v, lengths, key_lengths, kv_rows, 0.3)
        results.append([out, *torch.autograd.grad(out, (q, k, v), upstream)])
    for found, wanted in zip(*results, strict=True):
        assert difference(found, wanted) < 1e-13


LANGUAGE = Heads(heads=4, kv_heads=2, head_dim=16, causal=True, joined=False)


def by_segment(q, k, v, lengths, key_lengths, scale, causal):
    heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attend_segments(*heads_first, lengths, key_lengths=key_lengths, scale=scale, causal=causal)[0]


def right(q, k, v, cu, longest, *, scale, causal, cu_k=None, longest_k=None):
    """A kernel that reads its lengths from the tensors, as kernels on a GPU do."""
    assert longest == int(cu.diff().max())
    lengths = cu.diff().tolist()
    key_lengths = lengths if cu_k is None else cu_k.diff().tolist()
    assert longest_k == (None if cu_k is None else max(key_lengths))
    assert k.is_contiguous() or cu_k is None
    return by_segment(q, k, v, lengths, key_lengths, scale, causal)


def upper_left(q, k, v, cu, longest, *, scale, causal, cu_k=None, longest_k=None):
    """The first query sees the first key only: what `is_causal` of sdpa does."""
    if cu_k is None:
        return right(q, k, v, cu, longest, scale=scale, causal=causal)
    first = torch.cat([torch.arange(a, a + n) for a, n in zip(cu_k[:-1].tolist(), cu.diff().tolist(), strict=True)])
    lengths = cu.diff().tolist()
    return by_segment(q, k[first], v[first], lengths, lengths, scale, causal)


def knows_no_keys(q, k, v, cu, longest, *, scale, causal):
    return right(q, k, v, cu, longest, scale=scale, causal=causal)


def sees_all(q, k, v, cu, longest, *, scale, causal, cu_k=None, longest_k=None):
    """Right, except that fewer queries than keys switch the mask off."""
    how = {"cu_k": cu_k, "longest_k": longest_k}
    return right(q, k, v, cu, longest, scale=scale, causal=causal and cu_k is None, **how)


@pytest.mark.parametrize("kernel", [upper_left, sees_all])
def test_the_self_test_of_branches_rejects_a_kernel_with_another_mask(kernel):
    for branches in (False, True):
        worst = trial.self_test(kernel, LANGUAGE, dtype=BF16, device=CPU, branches=branches)
        assert (worst < attention.TOLERANCE) != branches, worst
    assert 1e-4 < trial.self_test(right, LANGUAGE, dtype=BF16, device=CPU, branches=True) < attention.TOLERANCE


def test_only_a_language_model_that_shares_prompts_needs_a_kernel_for_them(monkeypatch, stock_of):
    def padded(q, k, v, cu, longest, *, scale, causal):
        """As cuDNN: it accepts tokens without a segment, and a longest length that is too long."""
        lengths = [length for length in cu.diff().tolist() if length]
        lengths.append(len(q) - sum(lengths))
        return by_segment(q, k, v, lengths, lengths, scale, causal)

    kernels = {"fa4": upper_left, "fa3": knows_no_keys, "flash_attn": right, "cudnn": attention.with_repeating(padded)}

    def load_kernel(backend):
        if backend not in kernels:
            raise ImportError(f"No module named '{backend}'")
        return kernels[backend]

    used = {}
    monkeypatch.setattr(attention, "load_kernel", load_kernel)
    monkeypatch.setattr(attention, "_problem_of_all", lambda **where: "")
    monkeypatch.setattr(attention, "time_kernel", lambda kernel, *args, **how: 1.0)
    monkeypatch.setattr(attention, "use_kernel", lambda model, tower, backend, kernel: used.update({tower: kernel}))
    chosen = attention.choose_backend("auto", LANGUAGE, device=CPU, dtype=BF16, branches=True)
    assert (chosen.backend, chosen.seconds) == ("flash_attn", {})
    fa4, fa3, varlen, cudnn = chosen.remarks
    assert fa4.startswith("fa4: its self-test with fewer queries than keys differs from sdpa by ")
    assert (fa3[:15], varlen[:6]) == ("fa3: TypeError:", "varlen")
    assert cudnn.startswith("cudnn: NotImplementedError: cuDNN aligns fewer queries than keys to the upper left")
    for model_type, branches, language in (
        ("qwen2_vl", True, right),
        ("qwen2_vl", False, upper_left),
        ("qwen3_5", True, upper_left),
    ):
        attention.install(stock_of(model_type).model, "auto", dtype=BF16, device=CPU, branches=branches)
        assert used == {"language": language, "vision": upper_left}, (model_type, branches)


# ---- operations


@pytest.mark.parametrize("preset", ["vision-lora", "full"])
def test_the_operations_of_a_branch_row_are_those_torch_counts(stock_of, preset):
    stock = stock_of("qwen2_vl")
    batch, model = branch_batch(rows_of(stock), stock.family), model_of(stock, preset)
    shape = {
        "lengths": batch["lengths"],
        "vision_lengths": batch["vision_lengths"],
        "supervised": len(batch["targets"]),
        "key_lengths": batch["branches"]["key_lengths"],
    }
    with FlopCounterMode(display=False) as counter:
        model(**forward.inputs_of(batch)).loss.backward()
    want = flops.required_flops(stock.family.sizes(stock.model.config), PRESETS[preset], **shape, attention="full")
    assert counter.get_total_flops() == pytest.approx(flops.total(want), rel=1e-3)


def test_mfu_counts_the_prompt_that_an_answer_attends_to(stock_of):
    """For each token of a later answer and each of its prompt, two matmuls forward and four backward, in each layer."""
    stock = stock_of("qwen2_vl")
    sizes, rows = stock.family.sizes(stock.model.config), rows_of(stock, "picture", "text")
    opened = SimpleNamespace(sizes=sizes, towers=PRESETS["language-lora"])
    batch = branch_batch(rows, stock.family)
    work = meter_of(opened, SimpleNamespace(device=CPU), ()).work
    alone = {key: value for key, value in batch.items() if key != "branches"}
    pairs = sum(one.prompt * len(answer) for one in rows for answer in one.others)
    want = 6 * 2 * pairs * sizes.text.heads * sizes.text.head_dim * len(sizes.text.layers)
    assert work(batch) - work(alone) == pytest.approx(want)
