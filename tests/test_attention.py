"""The choice of an attention kernel: what passes the self-test, and what happens where one cannot run. No GPU."""

from __future__ import annotations

import pytest
import torch

from vlft.bench.mixes import draw_rows
from vlft.data.costs.packing import Budget
from vlft.data.order import PackOrder
from vlft.data.sample import Cost, Grid
from vlft.data.vision_meta import windows
from vlft.errors import ConfigError
from vlft.families import FAMILIES
from vlft.model import attention, geometry, trial
from vlft.model.segments import Heads, attend_segments, run_kernel

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOWERS = {
    "language": Heads(heads=4, kv_heads=2, head_dim=16, causal=True, joined=False),
    "partial rotary": Heads(heads=4, kv_heads=2, head_dim=16, causal=True, joined=False, partial_rotary=True),
    "vision of 72": Heads(heads=2, kv_heads=2, head_dim=72, causal=False, joined=True),
    "vision": Heads(heads=2, kv_heads=2, head_dim=16, causal=False, joined=True),
}


def right(q, k, v, cu, longest, *, scale, causal):
    """A kernel that takes one 16-bit dtype and computes in it."""
    if len({q.dtype, k.dtype, v.dtype}) > 1 or q.dtype not in (torch.bfloat16, torch.float16):
        raise RuntimeError(f"only fp16 and bf16, not {q.dtype}, {k.dtype}, {v.dtype}")
    assert longest == int(cu.diff().max())
    return segments(q, k, v, cu.diff().tolist(), scale, causal)


def segments(q, k, v, lengths, scale, causal):
    q_1HTD, k_1GTD, v_1GTD = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attend_segments(q_1HTD, k_1GTD, v_1GTD, lengths, scale=scale, causal=causal)[0]


def mixes_samples(q, k, v, cu, longest, *, scale, causal):
    return segments(q, k, v, [len(q)], scale, causal)


def forgets_what_is_far(q, k, v, cu, longest, *, scale, causal):
    """Correct for segments of up to 128 tokens."""
    lengths = [part for length in cu.diff().tolist() for part in (min(length, 128), max(length - 128, 0)) if part]
    return segments(q, k, v, lengths, scale, causal)


def _dense(x):
    return torch.as_strided(x, x.shape, (x.shape[1] * x.shape[2], x.shape[2], 1))


def takes_values_for_dense(q, k, v, cu, longest, *, scale, causal):
    return right(q, k, _dense(v), cu, longest, scale=scale, causal=causal)


def takes_queries_for_dense(q, k, v, cu, longest, *, scale, causal):
    return right(_dense(q), k, v, cu, longest, scale=scale, causal=causal)


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan")


def nan_gradient(*args, **kwargs):
    return NanGradient.apply(right(*args, **kwargs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tower", TOWERS)
def test_a_right_kernel_passes_its_self_test(tower, dtype):
    worst = attention.self_test(right, TOWERS[tower], dtype=dtype, device=CPU)
    assert 1e-4 < worst < attention.TOLERANCE  # a smaller difference would mean that it does not run in 16 bits


@pytest.mark.parametrize("kernel", [mixes_samples, forgets_what_is_far, nan_gradient])
@pytest.mark.parametrize("tower", TOWERS)
def test_a_wrong_one_does_not(tower, kernel):
    assert not attention.self_test(kernel, TOWERS[tower], dtype=torch.bfloat16, device=CPU) < attention.TOLERANCE


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [(takes_values_for_dense, {"vision", "vision of 72"}), (takes_queries_for_dense, {"partial rotary"})],
)
def test_nor_does_one_that_takes_for_dense_what_is_not(kernel, wrong):
    """The ViT's value is a slice of one projection; a partial rotary embedding stores queries head after head."""
    worst = {t: attention.self_test(kernel, TOWERS[t], dtype=torch.bfloat16, device=CPU) for t in TOWERS}
    assert {tower for tower, found in worst.items() if not found < attention.TOLERANCE} == wrong


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_kernel_gets_one_dtype_whatever_the_rotary_embedding_returns(dtype):
    q, k = torch.randn(1, 4, 40, 16), torch.randn(1, 2, 40, 16)
    v = torch.randn(1, 2, 40, 16).to(dtype)
    cu = torch.tensor([0, 30, 40], dtype=torch.int32)
    out = run_kernel(right, q, k, v, cu, 30, scale=0.25, causal=True)
    exact = attend_segments(q, k, v.float(), (30, 10), scale=0.25, causal=True)
    assert out.dtype == dtype
    assert (out - exact).abs().max() < 0.02 * exact.abs().max()


class CompilerError(Exception):
    """An exception class like those of kernels' own compilers."""


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("only SM90 and SM100"),
        AssertionError(),
        CompilerError("ptxas failed\nwith a long log"),
        ImportError("No module named 'flash_attn'"),
        OSError("libcudart.so.12: cannot open shared object file"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_kernel_that_cannot_run_is_passed_over_or_refused_by_name(monkeypatch, error):
    def self_test(kernel, *args, **kwargs):
        if kernel == "varlen":
            return 0.001
        raise error

    monkeypatch.setattr(attention, "load_kernel", lambda backend: backend)
    monkeypatch.setattr(attention, "self_test", self_test)
    where = {"device": CUDA, "dtype": torch.bfloat16}
    said = f"{type(error).__name__}: {str(error).splitlines()[0]}" if str(error) else type(error).__name__
    chosen = attention.choose_backend("auto", TOWERS["language"], **where)
    refused = ("fa4", "fa3", "flash_attn", "cudnn")
    assert (chosen.backend, chosen.kernel) == ("varlen", "varlen")
    assert chosen.remarks == tuple(f"{backend}: {said}" for backend in refused)
    assert chosen.seconds == {}  # the only one that works is not timed
    with pytest.raises(ConfigError) as refused:
        attention.choose_backend("fa4", TOWERS["language"], **where)
    assert str(refused.value).startswith(f"--attn fa4: {said}. To get it: pip install flash-attn-4.")


@pytest.mark.parametrize(
    ("device", "dtype", "why"),
    [(CPU, torch.bfloat16, "needs a CUDA device, this is cpu"), (CUDA, torch.float32, "this run computes in float32")],
)
def test_without_a_gpu_or_16_bits_it_is_sdpa(device, dtype, why):
    chosen = attention.choose_backend("auto", TOWERS["vision"], device=device, dtype=dtype)
    assert (chosen.backend, chosen.kernel) == ("sdpa", None)
    [remark] = chosen.remarks
    assert remark.startswith("fa4, fa3, flash_attn, varlen: ")
    assert why in remark
    with pytest.raises(ConfigError, match=why):
        attention.choose_backend("varlen", TOWERS["vision"], device=device, dtype=dtype)


def test_torchs_varlen_runs_flash_and_leaves_other_attention_as_it_was(monkeypatch):
    """torch 2.15 would choose cuDNN on Hopper, which builds a plan for each new set of lengths."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    seen = []

    def varlen_attn(q, *args, **kwargs):
        seen.append((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.cudnn_sdp_enabled()))
        return q

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    q = torch.zeros(4, 2, 8)
    attention.load_kernel("varlen")(q, q, q, torch.tensor([0, 4]), 4, scale=1.0, causal=True)
    assert seen == [(True, False)]
    if torch.__version__ < "2.15":
        with pytest.raises(ImportError, match=r"torch 2\.15"):
            attention.load_kernel("cudnn")
    else:
        attention.load_kernel("cudnn")(q, q, q, torch.tensor([0, 4]), 4, scale=1.0, causal=True)
        assert seen[1:] == [(False, True)]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


# ---- times


@pytest.fixture
def slow(monkeypatch):
    """A function: seconds -> a correct kernel that takes them, of a clock that only such kernels move."""
    now = [0.0]
    monkeypatch.setattr(trial.time, "perf_counter", lambda: now[0])

    def kernel(seconds):
        def attend(*args, **kwargs):
            now[0] += seconds(*args) if callable(seconds) else seconds
            return right(*args, **kwargs)

        return attend

    return kernel


def fails_on_long_rows(q, k, v, cu, longest, *, scale, causal):
    if len(q) > 500:
        raise CompilerError("too much shared memory")
    return right(q, k, v, cu, longest, scale=scale, causal=causal)


@pytest.fixture
def machine(monkeypatch):
    """A function: which kernels are installed. They run on the host."""

    def install(**kernels):
        def load(backend):
            if backend not in kernels:
                raise ImportError(f"No module named '{backend}'")
            return kernels[backend]

        monkeypatch.setattr(attention, "load_kernel", load)
        monkeypatch.setattr(attention, "_problem_of_all", lambda **where: "")

    return install


def chosen(choice="auto"):
    return attention.choose_backend(
        choice, TOWERS["language"], device=CPU, dtype=torch.bfloat16, lengths=(300, 200, 60, 40), layers=28
    )


def test_the_fastest_of_several_is_used(machine, slow):
    fast = slow(0.01)
    machine(fa4=slow(0.03), flash_attn=fast, varlen=slow(0.02))
    made = chosen()
    assert made.backend == "flash_attn"
    assert made.kernel is fast
    assert made.seconds == pytest.approx({"fa4": 0.03, "flash_attn": 0.01, "varlen": 0.02})
    assert made.remarks == ("fa3: ImportError: No module named 'fa3'", "cudnn: ImportError: No module named 'cudnn'")


def test_a_backend_that_is_requested_by_name_is_not_timed(machine):
    machine(fa3=fails_on_long_rows, varlen=right)
    made = chosen("fa3")
    assert (made.backend, made.seconds) == ("fa3", {})


def test_of_equally_fast_ones_the_first_is_used(machine, slow):
    """Times vary a little, and two runs should use the same kernel."""
    machine(fa3=slow(0.0104), varlen=slow(0.0100))
    assert chosen().backend == "fa3"


def test_a_wrong_one_and_one_that_fails_when_timed_are_never_used(machine):
    machine(fa4=mixes_samples, fa3=fails_on_long_rows, varlen=right)
    made = chosen()
    assert made.backend == "varlen"
    assert made.remarks[0].startswith("fa4: its self-test differs from sdpa by")
    assert made.remarks[-1] == "fa3: CompilerError: too much shared memory"
    machine(fa4=mixes_samples, fa3=fails_on_long_rows, varlen=fails_on_long_rows)
    assert (chosen().backend, chosen().kernel) == ("sdpa", None)


def test_the_plans_of_new_geometries_count_in_the_time(slow):
    known = set()

    def seconds(q, k, v, cu, longest):
        new = (len(cu), longest, len(q)) not in known
        known.add((len(cu), longest, len(q)))
        return 0.05 if new else 0.001

    found = trial.time_kernel(
        slow(seconds), TOWERS["vision"], (100, 80, 60, 40), layers=10, dtype=torch.bfloat16, device=CPU
    )
    assert len(known) == 4
    assert found == pytest.approx(0.001 + 16 / 200 / 10 * 0.049)


def test_the_log_says_the_times(machine, monkeypatch):
    said, used = [], []
    machine(fa3=right, varlen=right)
    monkeypatch.setattr(attention, "self_test", lambda *args, **kwargs: 0.0)
    monkeypatch.setattr(
        attention, "time_kernel", lambda kernel, tower, lengths, layers, **how: layers * len(lengths) / 1e3
    )
    monkeypatch.setattr(attention, "use_kernel", lambda model, tower, backend, kernel: used.append((tower, kernel)))
    family = FAMILIES["qwen2_5_vl"]
    sizes = family.sizes_of_shape(family.shapes["qwen2.5-vl-3b"])
    monkeypatch.setattr(attention.adapt, "sizes_of", lambda model: sizes)
    assert (
        attention.install(torch.nn.Module(), "auto", dtype=torch.bfloat16, device=CUDA, say=said.append)["vision"]
        == "fa3"
    )
    assert used == [("language", right), ("vision", right)]
    segments = sum(
        -(-length // 64) for length in trial.TIMED_LENGTHS
    )  # most of this ViT's blocks attend within windows
    times = f"{sizes.vision.depth * segments:.2f} ms"
    assert said[-1] == (f"attention of vision: 4,096 tokens forward and backward take fa3 {times}, varlen {times}")
    assert "attention of language: not fa4: ImportError: No module named 'fa4'" in said


# ---- geometries that repeat


def ragged(q, k, v, cu, longest, *, scale, causal):
    """A kernel that needs no true longest length, takes empty segments, and leaves tokens outside of segments unset."""
    lengths = [length for length in cu.diff().tolist() if length]
    used = sum(lengths)
    assert max(lengths) <= longest
    out = right(q[:used], k[:used], v[:used], cu[: len(lengths) + 1], max(lengths), scale=scale, causal=causal)
    return torch.cat([out, out.new_full((len(q) - used, *out.shape[1:]), float("nan"))])


@pytest.mark.parametrize("tower", TOWERS)
def test_a_geometry_that_repeats_changes_no_result(tower):
    inside = []

    def kernel(q, k, v, cu, longest, *, scale, causal):
        inside.append((len(cu) - 1, longest, len(q)))
        return ragged(q, k, v, cu, longest, scale=scale, causal=causal)

    how = {"dtype": torch.bfloat16, "device": CPU}
    padded = attention.self_test(geometry.with_repeating(kernel), TOWERS[tower], **how)
    assert padded == attention.self_test(right, TOWERS[tower], **how)
    assert inside == [(8, 256, 384)]


def story(patch):
    """Segments of each tower in 200 packs of the story mix: tokens of samples, patches of pictures and of windows."""
    rows, costs, grids = draw_rows("story", 800, seed=0, scale="real"), [], []
    for row in rows:
        # No picture of the mix is too large or too small, so its sides are rounded to whole tokens.
        merged = [(round(h / patch / 2), round(w / patch / 2)) for w, h, _ in row.pictures]
        grids.append([Grid(t=1, h=2 * h, w=2 * w) for h, w in merged])
        patches = sum(grid.h * grid.w for grid in grids[-1])
        tokens = row.question + row.answer + 40 + patches // 4 + 3 * len(merged)
        costs.append(Cost(tokens=tokens, supervised=row.answer, patches=patches))
    order = PackOrder(costs=costs, budget=Budget(tokens=16384, patches=65536), packs_per_step=1)
    packs = [rows for epoch in range(3) for rows in order.micro_batches(epoch, rank=0)][:200]
    assert len(packs) == 200
    towers = {"language": [], "vision": [], "windows": []}
    for pack in packs:
        media = [grid for row in pack for grid in grids[row]]
        towers["language"].append([costs[row].tokens for row in pack])
        towers["vision"].append([grid.h * grid.w for grid in media])
        towers["windows"].append(windows(media, merge=2, window=4)[1])
    return towers


@pytest.mark.parametrize("patch", [14, 16])
def test_200_packs_of_the_story_mix_have_at_most_16_geometries(patch):
    for packs in story(patch).values():
        true = [geometry.Geometry(len(lengths), max(lengths), sum(lengths)) for lengths in packs]
        rounded = [geometry.repeating(one) for one in true]
        assert len({one[:2] for one in rounded}) <= 16
        assert len(set(rounded)) <= 16  # also with the number of tokens, on which cuDNN's plans depend too
        assert len(set(true)) > 150
        for one, other in zip(true, rounded, strict=True):
            assert all(a <= b for a, b in zip(one, other, strict=True))
            assert other.tokens <= 1.25 * one.tokens
            assert geometry.repeating(other) == other
