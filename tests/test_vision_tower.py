"""The way into the vision tower: patch embedding as a matmul, pixels in 16 bits, a frozen tower without autocast."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from models import flat_inputs

from vlft.families import FAMILIES
from vlft.model import adapt, attention, forward, scale, tracing, vision
from vlft.model.apply import apply_towers
from vlft.model.scale import PixelScale, constants
from vlft.model.towers import Towers

BF16, FLOAT32 = torch.bfloat16, torch.float32
CLIP = {"mean": (122.77, 116.75, 104.09), "std": (68.5, 66.63, 70.32)}
FULL = {"vision": "full", "merger": "full", "language": "full"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_patch_embedding_by_matmul_is_the_convolution(stock_of, model_type):
    stock = stock_of(model_type).model.model.visual.patch_embed
    ours = copy.deepcopy(stock)
    vision.embed_by_matmul(ours)
    ours = copy.deepcopy(ours)  # as PEFT copies a tower that trains in full
    assert ours.forward.__self__ is ours
    assert list(ours.state_dict()) == list(stock.state_dict())
    patches_PX = torch.randn(24, stock.proj.weight[0].numel(), generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(24, stock.proj.out_channels, generator=torch.Generator().manual_seed(1))
    results = []
    for embed, dtype in ((ours, FLOAT32), (stock, FLOAT32), (ours, torch.float64), (stock, torch.float64)):
        embed = copy.deepcopy(embed).to(dtype)
        out = embed(patches_PX.to(dtype))
        results.append([out, *torch.autograd.grad(out, list(embed.parameters()), upstream.to(dtype))])
    for found, theirs, exactly, exact in zip(*results, strict=True):
        assert found.shape == theirs.shape
        assert (exactly - exact).abs().max() <= 1e-14 * exact.abs().max()
        # In float32 the order of 1,176 products in a sum matters, in the convolution too.
        error, error_of_theirs = ((one - exact).abs().max() / exact.abs().max() for one in (found, theirs))
        assert error <= max(1e-6, 1.1 * error_of_theirs)


def test_the_weight_is_used_in_the_forward_of_its_own_module(stock_of):
    """ZeRO-3 collects a weight in hooks around the forward of its module, and holds an empty tensor elsewhere."""
    embed = copy.deepcopy(stock_of("qwen2_vl").model.model.visual.patch_embed).requires_grad_(False)
    vision.embed_by_matmul(embed)
    weight, gone = embed.proj.weight.data, torch.empty(0)
    patches_PX = torch.randn(8, weight[0].numel())
    wanted = embed(patches_PX)
    embed.proj.weight.data = gone
    embed.proj.register_forward_pre_hook(lambda proj, _: setattr(proj.weight, "data", weight))
    embed.proj.register_forward_hook(lambda proj, *_: setattr(proj.weight, "data", gone))
    assert torch.equal(embed(patches_PX), wanted)


def test_no_convolution_runs_in_a_step_of_full_training(stock_of):
    seen = []
    stock = stock_of("qwen3_vl")
    model = prepared(stock, FLOAT32, **FULL)
    with tracing.Watch(lambda op: seen.append(op.name)):
        model(**inputs_of(stock)).loss.backward()
    assert "aten.mm" in seen
    assert not [name for name in seen if "conv" in name]


# ---- pixels


def patches(stills, videos):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(0, 256, (stills, 14, 14, 3), generator=generator, dtype=torch.uint8).permute(0, 3, 1, 2),
        torch.randint(0, 256, (videos, 3, 2, 14, 14), generator=generator, dtype=torch.uint8),
    )


@pytest.mark.parametrize(("stills", "videos"), [(50, 0), (0, 50), (33, 21), (1, 1)])
def test_pixels_are_scaled_in_float32_and_rounded_once(monkeypatch, stills, videos):
    monkeypatch.setattr(scale, "CHUNK_VALUES", 10 * 1176)
    one, many = patches(stills, videos)
    mean, std = (torch.tensor(CLIP[name])[:, None, None] for name in ("mean", "std"))
    wanted = torch.cat(
        [
            ((one.float() - mean) / std)[:, :, None].repeat(1, 1, 2, 1, 1).flatten(1),
            ((many.float() - mean[:, None]) / std[:, None]).flatten(1),
        ]
    )
    for dtype in (FLOAT32, BF16, torch.float16):
        assert torch.equal(PixelScale(**CLIP).patches(one, many, dtype=dtype), wanted.to(dtype))
    assert torch.equal(PixelScale(**CLIP).patches(one, many), wanted)


def test_pixels_of_a_pack_are_never_in_float32_together():
    """Bytes beside the result, of a pack with 53,600 patches on a GPU."""
    largest, device = [], torch.device("cuda", 0)
    with tracing.without_contents():
        one = torch.empty(50_000, 3, 14, 14, dtype=torch.uint8, device=device)
        many = torch.empty(3_600, 3, 2, 14, 14, dtype=torch.uint8, device=device)
        constants.cache_clear()
        constants(PixelScale(**CLIP), device)

        def watch(op):
            largest.extend(out.nbytes for out in op.outputs if out.dtype == FLOAT32)

        with tracing.Watch(watch, tracing.refuse_waits):
            made = PixelScale(**CLIP).patches(one, many, dtype=BF16)
    constants.cache_clear()
    assert made.nbytes == 53_600 * 1176 * 2
    assert 0 < max(largest) <= 1 << 24


# ---- a frozen tower


def prepared(stock, stored, **towers):
    """A model with the flat forward, its weights stored in a dtype; with float32 masters, as for autocast."""
    model = copy.deepcopy(stock.model).to(stored)
    attention.install(model, "sdpa", dtype=stored)
    forward.bind(model, PixelScale.of(stock.processor))
    return apply_towers(model, stock.family, Towers(**towers), masters=True)


def inputs_of(stock):
    return flat_inputs([stock.rows[kind].flat for kind in ("pictures", "mixed")], stock.family)


def features(model, inputs, autocast):
    """The vision features of a batch of photographs, all mergers in one tensor."""
    found, original = [], adapt.vision_features
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), torch.autocast("cpu", BF16, enabled=autocast):
        patch.setattr(
            adapt, "vision_features", lambda *args, **kwargs: found.append(original(*args, **kwargs)) or found[0]
        )
        model(**inputs)
    return torch.cat([found[0].embeds_NH, *found[0].layers_NH]).float()


@contextlib.contextmanager
def under_autocast_as_before(weights, device):
    yield


#: In CI: each family with a frozen merger, and one with deepstack mergers that train.
TOWERS = [
    pytest.param(model_type, merger, marks=() if merger == "frozen" or model_type == "qwen3_vl" else pytest.mark.grid)
    for model_type in FAMILIES
    for merger in ("frozen", "full", "lora")
]


@pytest.mark.parametrize(("model_type", "merger"), TOWERS)
def test_a_frozen_16_bit_tower_is_as_exact_without_autocast(monkeypatch, stock_of, model_type, merger):
    stock = stock_of(model_type)
    model = prepared(stock, BF16, merger=merger).eval()
    inputs = inputs_of(stock)
    exact = features(copy.deepcopy(model).float(), inputs, autocast=False)
    norms = []
    for norm in (m for m in adapt.tower(model, "vision").modules() if "Norm" in type(m).__name__):
        norm.register_forward_hook(lambda *_: norms.append(torch.is_autocast_enabled("cpu")))
    ours = features(model, inputs, autocast=True)
    without = norms.count(False)
    norms.clear()
    monkeypatch.setattr(vision, "without_needless_autocast", under_autocast_as_before)
    before = features(model, inputs, autocast=True)
    assert norms.count(False) == 0
    # All norms of the blocks run without it, and those of mergers that do not train.
    sizes = stock.family.sizes(stock.model.config).vision
    assert without == 2 * sizes.depth + (0 if merger == "full" else sizes.mergers * (merger == "frozen"))
    error, error_before = ((found - exact).norm() / exact.norm() for found in (ours, before))
    assert 0 < error <= 1.02 * error_before
    assert error < 0.02


@pytest.mark.parametrize(("stored", "towers"), [(FLOAT32, {}), (BF16, {"vision": "lora"})])
def test_any_other_tower_stays_under_autocast(stock_of, stored, towers):
    stock, seen = stock_of("qwen3_vl"), []
    model = prepared(stock, stored, **towers)
    adapt.blocks(model, "vision")[0].register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", BF16):
        model(**inputs_of(stock))
    assert seen == [True]


def test_weights_of_another_16_bit_dtype_need_autocast():
    for dtype, needed in ((BF16, False), (torch.float16, True)):
        weights = [torch.nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False)]
        with torch.autocast("cpu", BF16), vision.without_needless_autocast(weights, torch.device("cpu")):
            assert torch.is_autocast_enabled("cpu") == needed
