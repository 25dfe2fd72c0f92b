"""What only a CUDA device can show: every attention kernel, bf16 against float32, no waiting on the device, real runs.

Run: pytest -m gpu. What a machine lacks (Liger's kernels, flash-attn, PyAV and qwen-vl-utils for videos) is skipped.
"""

from __future__ import annotations

import contextlib
import json
import math
from types import SimpleNamespace

import pytest
import torch
from models import EVERYWHERE, FAMILY, PRESETS, build, collate, flat_inputs, gradients
from runs import FULL, PACKED, VISION_LORA, arguments

from vlft.bench.sizes import SHAPES as BASES
from vlft.cli.main import main
from vlft.demo.tiny import tiny_processor
from vlft.families import FAMILIES
from vlft.model import attention, forward, fused, kernels, linear_attention, loss, towers
from vlft.model.apply import apply_towers
from vlft.model.build import build_config
from vlft.model.load import empty_model, load_base, load_processor
from vlft.model.scale import PixelScale
from vlft.model.segments import Heads
from vlft.train.trainer import VlftTrainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]
DEVICE = torch.device("cuda")
BF16 = torch.bfloat16
VIT = Heads(heads=16, kv_heads=16, head_dim=80, causal=False, joined=True)
SHAPES = {
    "2b": Heads(heads=12, kv_heads=2, head_dim=128, causal=True, joined=False),
    "7b": Heads(heads=28, kv_heads=4, head_dim=128, causal=True, joined=False),
    "vit": VIT,
    "qwen3-vl-8b vit": Heads(heads=16, kv_heads=16, head_dim=72, causal=False, joined=True),
    "qwen3.5-9b": Heads(heads=16, kv_heads=4, head_dim=256, causal=True, joined=False, partial_rotary=True),
}


def on_device(inputs: dict) -> dict:
    return {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def ready(base, preset: str, *, stored: torch.dtype, liger: str = "false") -> torch.nn.Module:
    """A model as a run prepares it under bf16 autocast, from a base of a stored dtype, with the weights of `build`."""
    torch.manual_seed(0)
    model = load_base(base, FAMILY, dtype=stored).to(DEVICE)
    attention.install(model, "auto", dtype=BF16)
    line = kernels.install(model, liger, dtype=BF16)
    assert line == ("off" if liger == "false" else EVERYWHERE)
    forward.bind(model, PixelScale.of(load_processor(base)))
    model = apply_towers(model, FAMILY, PRESETS[preset], masters=True)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.copy_(torch.empty(parameter.shape).normal_(std=0.05, generator=generator))
    return model.train()


def one_layer_of(shape: str) -> torch.nn.Module:
    """The last softmax layer and the first block of a published size, without contents except for small weights."""
    family, sizes = BASES[shape]
    config = build_config(family, sizes, tiny_processor(family).tokenizer)
    model = empty_model(family.with_blocks(config, vision=[0], language=[3]), family)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None and weight.ndim == 1:
                module._parameters[name] = torch.nn.Parameter(torch.rand(weight.shape, dtype=torch.float32).to(BF16))
    return model


def assert_near(mine: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], *, tolerance: float) -> None:
    """Compare gradients by tower: the bias of a norm is a small sum of large terms, and 16 bits are too few for it."""
    assert set(mine) == set(theirs)
    for tower in ("vision", "merger", "language"):
        names = [name for name in theirs if FAMILY.tower_of(towers.plain_name(name)) == tower]
        if not names:
            continue
        ours, exact = (torch.cat([one[name].double().cpu().flatten() for name in names]) for one in (mine, theirs))
        error = float((ours - exact).norm() / exact.norm())
        print(f"{tower}: {error:.4f} of the gradient's norm")
        assert error < tolerance, tower
        for name in names:
            cosine = torch.nn.functional.cosine_similarity(
                mine[name].double().cpu().flatten(), theirs[name].double().cpu().flatten(), dim=0
            )
            assert cosine > 0.8, (name, float(cosine))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", attention.CANDIDATES)
def test_kernels_pass_their_self_test_at_the_published_shapes(backend, shape, dtype):
    try:
        kernel = attention.load_kernel(backend)
    except ImportError as error:
        pytest.skip(str(error))
    worst = attention.self_test(kernel, SHAPES[shape], dtype=dtype, device=DEVICE)
    print(backend, shape, dtype, worst)
    assert worst < attention.TOLERANCE


@pytest.mark.parametrize("shape", ["2b", "7b"])
@pytest.mark.parametrize("backend", attention.BACKENDS[:-1])
def test_kernels_pass_their_self_test_with_fewer_queries_than_keys(backend, shape):
    try:
        kernel = attention.load_kernel(backend)
    except ImportError as error:
        pytest.skip(str(error))
    worst = attention.self_test(kernel, SHAPES[shape], dtype=BF16, device=DEVICE, branches=True)
    print(backend, shape, worst)
    assert worst < attention.TOLERANCE


@pytest.mark.parametrize("label", ["qwen3.5-0.8b", "qwen3.5-27b"])
def test_the_delta_rule_of_fla_passes_its_self_test_at_the_published_sizes(label):
    pytest.importorskip("fla")
    family = FAMILIES["qwen3_5"]
    sizes = family.sizes_of_shape(family.shapes[label]).text.layers[0].recurrent
    name, _, remark = linear_attention.choose_rule("fla", sizes, device=DEVICE, dtype=BF16)  # raises if it differs
    assert (name, remark) == ("fla", "")


def test_a_kernel_is_taken_on_this_device():
    """The fastest of the installed kernels; without one, sdpa."""
    chosen = attention.choose_backend("auto", VIT, device=DEVICE, dtype=BF16)
    print(chosen.backend, chosen.remarks, chosen.seconds)
    assert chosen.backend != "sdpa"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", ["full", "language-lora", "vision-lora"])
def test_bf16_on_the_device_is_near_float32_on_the_host(base, encoded, preset, stored):
    inputs = flat_inputs(list(encoded.values()))
    device, host = ready(base, preset, stored=stored), build(base, preset, flat=True)
    host.load_state_dict({name: weight.float().cpu() for name, weight in device.state_dict().items()})
    host(**inputs).loss.backward()
    with torch.autocast("cuda", BF16):
        value = device(**on_device(inputs)).loss
    value.backward()
    assert_near(gradients(device), gradients(host), tolerance=0.1)


def test_a_step_does_not_wait_for_the_device(base, encoded):
    """From the loader's pinned batch to the optimizer."""
    model = ready(base, "full", stored=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    loaded = collate(list(encoded.values()))
    batch = {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in loaded.items()}
    objective = SimpleNamespace(tensors=forward.FORWARD_KEYS)
    trainer = SimpleNamespace(args=SimpleNamespace(device=DEVICE), objective=objective)
    for mode in ("default", "error"):  # the first step compiles and tunes; the second must not read anything back
        torch.cuda.set_sync_debug_mode(mode)
        try:
            inputs = VlftTrainer._prepare_inputs(trainer, batch)
            with torch.autocast("cuda", BF16):
                value = model(**{key: inputs[key] for key in forward.FORWARD_KEYS}).loss
            value.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", list(kernels.TOLERANCE), ids=str)
@pytest.mark.parametrize("shape", ["2b", "7b", "qwen2.5-vl-3b", "qwen3-vl-4b", "qwen3.5-4b"])
def test_fused_kernels_equal_torch_at_the_published_sizes(shape, dtype):
    """Liger's, and our own where Liger has none; and our own alone."""
    model = one_layer_of(shape)
    ours = fused.triton_operations()
    choices = [fused.functions(ours)]
    with contextlib.suppress(ImportError):
        choices.append(fused.functions(ours, **fused.liger_functions()))
    for functions in choices:
        for kernel in kernels.kernels_of(model, functions):
            for dtypes, worst in kernels.self_test(kernel, dtype=dtype, device=DEVICE).items():
                print(kernel.name, dtypes, worst)
                assert worst < kernels.TOLERANCE[dtypes.narrowest]


@pytest.mark.parametrize("preset", ["full", "vision-lora"])
def test_fused_kernels_in_a_model_are_near_torch(base, encoded, preset):
    inputs = on_device(flat_inputs(list(encoded.values())))
    results = []
    for choice in ("false", "auto"):
        model = ready(base, preset, stored=torch.float32, liger=choice)
        with torch.autocast("cuda", BF16):
            value = model(**inputs).loss
        value.backward()
        results.append(gradients(model))
    assert_near(results[1], results[0], tolerance=0.05)


RUNS = {"full": FULL, "language lora": (), "vision lora": VISION_LORA}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("preset", RUNS)
def test_a_run_on_the_device_is_near_one_on_the_host(base, mixed_json, media, tmp_path, preset, stored):
    """Through the command line, packed, from float32 and from bf16 weights."""
    if stored == BF16:
        folder = tmp_path / "base"
        load_base(base, FAMILY, dtype=BF16).save_pretrained(folder)
        load_processor(base).save_pretrained(folder)
        base = folder
    assert_near_on_both(base, mixed_json, media, tmp_path, RUNS[preset])


@pytest.mark.parametrize("model_type", [name for name in FAMILIES if name != FAMILY.model_type])
def test_a_run_of_each_family_on_the_device_is_near_one_on_the_host(base_of, mixed_json, media, tmp_path, model_type):
    assert_near_on_both(base_of(FAMILIES[model_type]), mixed_json, media, tmp_path, VISION_LORA)


def assert_near_on_both(base, mixed_json, media, tmp_path, preset) -> None:
    losses = {}
    for where, more in {"device": (), "host": ("--use_cpu", "true", "--bf16", "false")}.items():
        out = tmp_path / where
        argv = arguments(base, mixed_json, media, out, *preset, *PACKED, *more)
        assert main(argv) == 0
        logged = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        losses[where] = [line["loss"] for line in logged]
    print(losses)
    assert len(losses["device"]) >= 2
    assert all(math.isfinite(value) for value in losses["device"])
    assert losses["device"] == pytest.approx(losses["host"], rel=0.02)


@pytest.mark.parametrize("summed", [True, False], ids=["summed", "per-row"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_the_heads_loss_at_the_size_of_the_2b_holds_one_chunk(trained, summed):
    """2,048 supervised rows under bf16 autocast: value and gradient of plain cross-entropy, at a chunk's memory."""
    words, channels, count = 151_936, 1536, 2048
    generator = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, channels, device="cuda", generator=generator) for n in (count, words))
    hidden, weight = (hidden.bfloat16().requires_grad_(), (0.02 * weight).requires_grad_(trained))
    weight = weight if trained else weight.bfloat16()
    targets = torch.randint(words, (count,), device="cuda", generator=generator)
    results = []
    for chunked in (True, False):
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            if chunked and summed:
                value = loss.linear_cross_entropy(hidden, weight, targets)
            elif chunked:
                value = -loss.linear_log_probs(hidden, weight, targets).sum()
            else:
                logits = torch.nn.functional.linear(hidden, weight).float()
                value = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
        (value / count).backward()
        results.append((value.detach(), hidden.grad, weight.grad, torch.cuda.max_memory_allocated() - before))
    print("peak bytes:", [result[-1] for result in results])
    (ours, *mine, peak), (exact, *theirs, _) = results
    assert abs(ours / exact - 1) < 1e-5
    for gradient, stock in list(zip(mine, theirs, strict=True))[: 1 + trained]:
        assert (gradient - stock).norm() < 0.01 * stock.norm()
    # bf16 logits and slopes, float32 softmax, a slice of the weight's gradient; trained: its gradient, its bf16 copy.
    assert peak < 12 * loss.CHUNK_ELEMENTS + (8 * words * channels if trained else 0)
