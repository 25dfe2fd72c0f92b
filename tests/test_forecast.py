"""The forecast of a step on a GPU that is not there: counts of single operations, of whole steps, and the verb."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vlft.bench.choices import PRESETS
from vlft.bench.fake import STORY, pack_of
from vlft.bench.sizes import SHAPES
from vlft.cli.main import main
from vlft.demo.tiny import tiny_processor
from vlft.errors import ConfigError
from vlft.families import DEFAULT, FAMILIES
from vlft.model import cards, traced, tracing
from vlft.model.build import build_config
from vlft.model.cards import CARDS
from vlft.model.forecast import Step
from vlft.model.towers import Towers
from vlft.model.traffic import Cost, Squares, Traffic

BF16 = torch.bfloat16
LOAD = tracing.Load(lengths=(40, 24, 64), vision_lengths=(16, 36, 64), supervised=30)


def step_of(family, preset="lora", *, shape=None, layers=None, load=LOAD, **changes):
    """A step of a shape with random sizes of its towers."""
    shape = shape or family.tiny
    config = build_config(family, shape, tiny_processor(family, max_pixels=family.pixels[1]).tokenizer)
    if layers is not None:
        config = family.with_blocks(config, vision=[0] * layers, language=[0] * layers)
    return Step(
        config=config,
        family=family,
        towers=Towers(**PRESETS[preset]),
        load=load,
        numbers=tracing.numbers_of(BF16, BF16, deepspeed=False),
        card=CARDS["h100"],
        **changes,
    )


@pytest.fixture
def counted():
    """Run a function of tensors without contents, and return what was counted."""

    def run(work, *, rank=None, squares=None):
        with tracing.without_contents(), torch.device("cuda"):
            traffic = Traffic(torch.nn.Linear(1, 1), card=CARDS["h100"], rank=rank, squares=squares or {})
            with tracing.Watch(traffic):
                work()
            whole = Cost()
            for cost in traffic.costs.values():
                whole.add(cost)
            return whole, traffic

    return run


def bf16(*size):
    return torch.empty(size, dtype=BF16)


#: Operation -> kernels, and bytes by kind, counted by hand.
BYTES = {
    "a product": (lambda: bf16(8, 4) @ bf16(4, 6), 1, {"matmul": 2 * (32 + 24 + 48)}),
    "with a bias": (lambda: torch.addmm(bf16(6), bf16(8, 4), bf16(4, 6)), 1, {"matmul": 2 * (6 + 32 + 24 + 48)}),
    "of a LoRA matrix": (lambda: bf16(8, 4) @ bf16(4, 2), 1, {"adapter": 2 * (32 + 8 + 16)}),
    "a sum": (lambda: bf16(8, 4) + bf16(8, 4), 1, {"elementwise": 2 * 96}),
    "a broadcast sum": (lambda: bf16(8, 4) + bf16(4), 1, {"elementwise": 2 * (32 + 4 + 32)}),
    "an expanded input": (lambda: bf16(1, 4).expand(8, 4) + bf16(8, 4), 1, {"elementwise": 2 * (4 + 32 + 32)}),
    "a sum in place": (lambda: bf16(8, 4).add_(bf16(8, 4)), 1, {"elementwise": 2 * 96}),
    "a copy": (lambda: bf16(8, 4).copy_(bf16(8, 4)), 1, {"elementwise": 2 * 64}),
    "zeros": (lambda: bf16(8, 4).zero_(), 1, {"elementwise": 2 * 32}),
    "a cast": (lambda: bf16(8, 4).float(), 1, {"elementwise": 32 * (2 + 4)}),
    "a view": (lambda: bf16(8, 4).view(4, 8).t().unsqueeze(0), 0, {}),
    "rows of a table": (
        lambda: torch.nn.functional.embedding(torch.empty(3, dtype=torch.int64), bf16(1000, 4)),
        1,
        {"elementwise": 2 * 2 * 12 + 3 * 8},
    ),
}


@pytest.mark.parametrize("name", BYTES)
def test_a_kernel_reads_its_inputs_and_writes_its_outputs_once(counted, name):
    work, kernels, wanted = BYTES[name]
    whole, traffic = counted(work, rank=2)
    assert whole.kernels == kernels
    assert {kind: size for kind, size in whole.bytes.items() if size} == wanted
    assert traffic.reads == 0


def test_a_fused_optimizer_writes_weights_and_moments_but_no_gradients(counted):
    def work():
        weight = torch.nn.Parameter(torch.empty(100))
        optimizer = torch.optim.AdamW([weight], fused=True)
        weight.grad = torch.empty(100)
        optimizer.step()
        seen.append(optimizer)

    seen: list = []
    whole, _ = counted(work)
    # Read weight, gradient and two moments, write weight and moments; two moments are zeroed first.
    assert whole.bytes["elementwise"] == pytest.approx(4 * 100 * (7 + 2), rel=0.03)  # and the number of the step


def test_peak_memory_is_of_what_is_alive(counted):
    def work():
        kept = torch.zeros(1000, dtype=torch.uint8)
        for _ in range(3):
            torch.zeros(500, dtype=torch.uint8)
        return kept.sum()

    _, traffic = counted(work)
    assert 1500 <= traffic.peak < 1600


def test_reads_of_the_host_are_counted(counted):
    """A copy to the host waits, and one from pinned memory does not. FakeTensorMode itself refuses `item`."""
    _, traffic = counted(lambda: (bf16(3).cpu(), bf16(3).cpu()))
    assert traffic.reads == 2
    _, traffic = counted(lambda: torch.empty(3, device="cpu", pin_memory=True).to("cuda", non_blocking=True))
    assert traffic.reads == 0


def test_attention_takes_the_operations_of_its_segments(counted):
    from vlft.model import standins

    def work():
        q, k = bf16(10, 4, 16), bf16(10, 2, 16)
        standins.attend(q, k, k, torch.empty(3, dtype=torch.int32), 6, scale=1.0, causal=True)

    whole, _ = counted(work, squares={(10, 2): Squares(total=6**2 + 4**2, causal=True)})
    assert whole.flops["attention"] == 4 * 52 * 4 * 16 / 2
    assert whole.bytes["attention"] == 2 * (2 * 10 * 4 * 16 + 2 * 10 * 2 * 16) + 4 * 3 + 4 * 40


@pytest.mark.parametrize("preset", PRESETS)
def test_matmuls_are_those_that_torch_counts(preset):
    """Against torch's FlopCounterMode on the same step."""
    step = step_of(DEFAULT, preset)
    found = step.whole()
    with (
        traced.step(step.config, DEFAULT, step.towers, numbers=step.numbers, device="cuda", fused=True) as model,
        FlopCounterMode(display=False) as counter,
    ):
        batch = tracing.batch_of(DEFAULT.sizes(step.config).vision, LOAD)
        with tracing.autocast("cuda", BF16):
            losses = [model(**batch).loss]
        tracing.backward(losses.pop())
    assert found.whole.flops["matmul"] + found.whole.flops["adapter"] == counter.get_total_flops()


@pytest.mark.parametrize(
    "model_type",
    [pytest.param(t, marks=() if t == "qwen3_5" else pytest.mark.grid) for t in FAMILIES],
)
def test_small_models_give_the_counts_of_the_whole(model_type):
    family = FAMILIES[model_type]
    step = step_of(family)
    sizes = family.sizes(step.config)
    deep, vision = len(sizes.text.layers), sizes.vision
    plain = next(place for place in range(vision.depth) if place not in vision.deepstack)
    config = family.with_blocks(
        step.config,
        vision=[plain, *range(vision.depth), *range(vision.depth), plain],
        language=[*range(deep), *range(1, deep)],
    )
    step = dataclasses.replace(step, config=config)
    whole, quick = step.whole().as_json(), step.quick().as_json()
    assert quick.pop("peak_gb") is None
    assert whole.pop("peak_gb") > 0
    assert quick.pop("fits") is None
    assert whole.pop("fits") is True
    assert quick["host_syncs"] == whole["host_syncs"] == 0
    assert {n: v for n, v in quick.items() if isinstance(v, int | float)} == pytest.approx(
        {n: v for n, v in whole.items() if isinstance(v, int | float)}
    )


def test_recomputation_costs_time_and_saves_memory():
    step = step_of(DEFAULT, load=tracing.Load(lengths=(4096,), vision_lengths=(), supervised=900), layers=6)
    kept, recomputed = step.whole(), dataclasses.replace(step, checkpointed=("language",)).whole()
    assert recomputed.peak < 0.5 * kept.peak
    assert recomputed.whole.kernels > 1.2 * kept.whole.kernels
    assert recomputed.required == kept.required
    assert {phase for phase, _ in recomputed.parts} == {"forward", "backward", "optimizer"}
    # A kernel that runs again belongs to the same module, in the backward pass.
    again = ("backward", "language_model.layers.*.mlp.up_proj")
    assert recomputed.parts[again].kernels > kept.parts[again].kernels


#: Most GB that are neither base matmuls nor attention, for one pack of the story mix, without recomputation.
BUDGETS = {
    ("2b", "lora"): 560,
    ("2b", "lora_vision"): 1700,
    ("2b", "full"): 1000,
    ("7b", "lora"): 1100,
    ("qwen3-vl-4b", "lora"): 800,
    ("qwen3.5-4b", "lora"): 850,
}


@pytest.mark.parametrize(
    ("shape", "preset"), [pytest.param(*one, marks=() if one[0] == "2b" else pytest.mark.grid) for one in BUDGETS]
)
def test_a_published_size_stays_within_its_budget(shape, preset):
    family, published = SHAPES[shape]
    found = step_of(family, preset, shape=published, load=STORY).quick()
    assert found.gb("elementwise", "adapter") <= BUDGETS[shape, preset]
    assert found.reads == 0


def test_base_layers_as_wide_as_the_rank_are_no_adapters():
    """The traffic of base matmuls does not depend on the rank. The tiny model has widths of 2, with float32 weights."""
    step = step_of(FAMILIES["qwen3_5"])
    step = dataclasses.replace(step, numbers=tracing.numbers_of(torch.float32, BF16, deepspeed=False))
    wide, other = (dataclasses.replace(step.towers, lora_rank=rank) for rank in (2, 8))
    counted = [dataclasses.replace(step, towers=towers).whole().whole.bytes["matmul"] for towers in (wide, other)]
    assert counted[0] == counted[1]


def test_packs_of_other_mixes_are_drawn():
    sizes = DEFAULT.sizes(step_of(DEFAULT).config)
    assert pack_of("story", sizes, seed=0) == STORY
    assert (STORY.tokens, STORY.patches, len(STORY.vision_lengths)) == (16384, 53600, 26)
    text = pack_of("text", sizes, seed=0)
    assert text.patches == 0
    assert 0.7 * 16384 < text.tokens <= 16384
    assert pack_of("video", sizes, seed=0).patches > 0


def test_the_verb(capsys):
    assert main(["bench", "train", "--fake", "H100", "--shape", "tiny", "--preset", "lora", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpu"], found["preset"], found["host_syncs"], found["fits"]) == ("h100", "lora", 0, True)
    for name in ("kernels", "gb_elementwise", "gb_matmul", "gb_attention", "predicted_ms", "predicted_mfu", "peak_gb"):
        assert found[name] > 0, name
    assert 0 < found["predicted_mfu"] < 1
    assert found["ms"].keys() == {"matmul", "adapter", "attention", "elementwise"}
    assert 0 < len(found["costs"]) <= 10
    assert main(["bench", "train", "--fake", "4090", "--shape", "tiny", "--gradient_checkpointing", "true"]) == 0
    shown = capsys.readouterr().out
    assert "nothing was measured" in shown
    assert "recomputing language" in shown


@pytest.mark.parametrize(
    ("words", "status", "told"),
    [
        (["--fake", "h999"], 1, "--fake h999: unknown card"),
        (["--fake", "t4"], 1, "--fake t4: its peak and bandwidth are not listed"),
        (["--fake", "h100", "--steps", "3"], 2, "--steps has no effect with --fake"),
        (["--fake", "h100", "--baseline"], 2, "--baseline has no effect with --fake"),
        (
            ["--fake", "h100", "--data_path", "data/demo.json", "--image_folder", "data/media"],
            2,
            "--data_path has no effect with --fake",
        ),
        (["--fake", "h100", "--attn", "sdpa"], 2, "--attn has no effect with --fake"),
        (["--fake", "h100", "--deepspeed=zero2"], 2, "--deepspeed has no effect with --fake"),
        (
            ["--fake", "h100", "--bf16", "false", "--pack-tokens", "64"],
            2,
            "--bf16, --pack_tokens have no effect with --fake",
        ),
        (["--fake", "h100", "--out", "x"], 2, "--out has no effect with --fake"),
        (["--fake", "h100", "--mix_seed", "0"], 2, "--mix_seed has no effect with --fake on the story mix"),
    ],
)
def test_what_cannot_be_forecast_is_refused(capsys, words, status, told):
    assert main(["bench", "train", "--shape", "tiny", *words]) == status
    assert told in capsys.readouterr().err


def test_cards_are_found_by_the_names_that_cuda_reports():
    assert cards.reported("NVIDIA H100 80GB HBM3") == "h100"
    assert cards.reported("NVIDIA H200") == "h200"
    assert cards.reported("NVIDIA A100-SXM4-80GB") == "a100-80"
    assert cards.reported("NVIDIA GeForce RTX 4090") == "4090"
    assert cards.reported("NVIDIA L40S") == "l40s"
    assert cards.reported("NVIDIA L4") == "l4"
    for other in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA L40", "NVIDIA GB200", "Tesla T4", None):
        assert cards.reported(other) is None
    with pytest.raises(ConfigError, match="A step can be predicted for b200, h200, h100"):
        cards.predicted("24", flag="--gpu")
