"""`vlft plan` on memory: each part against a real step on the CPU, the table of cards, changes that make a run fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from build import FAMILY
from models import TWO_B
from plans import plan, plan_and_text, towers

from vlft.cli.main import main
from vlft.families import sizes_of
from vlft.model import activations, memory
from vlft.model.scale import constants
from vlft.model.towers import Towers
from vlft.model.tracing import Load, Numbers
from vlft.plan import estimate as estimates

BF16 = Numbers(stored=torch.bfloat16, trained=torch.float32, autocast=torch.bfloat16)


@pytest.fixture(scope="module")
def flags(base, media, mixed_json):
    return ["--model_id", base, "--data_path", mixed_json, "--image_folder", media, "--dataloader_num_workers", 0]


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("preset", ["full", "language", "vision and language"])
def test_each_part_is_what_a_real_step_takes(capsys, flags, monkeypatch, preset, checkpointing):
    argv, _ = towers(preset)
    saved = _count_all_saved(monkeypatch)
    found = plan(capsys, *flags, *argv, "--measure", "--gradient_checkpointing", checkpointing)["memory"]
    real, told = found["measured"], found["measured_estimate"]
    for part in ("weights", "gradients", "optimizer"):
        assert told[part] == real[part], part
    assert real["weights"] > real["gradients"] * (preset != "full") > 0 or preset == "full"
    assert (real["vision"] > 0) == (preset != "language")
    for part in ("vision", "merger", "language"):
        assert told[part] == pytest.approx(real[part], rel=0.1, abs=10_000), part
    if checkpointing == "false":
        # The ledger against autograd's own hooks, which know no towers.
        assert sum(real[part] for part in ("vision", "merger", "language", "head")) == saved[0]
    assert found["hours"] == pytest.approx(3 * real["tokens"] / real["tokens_per_s"] / 3600, rel=1e-6)
    assert found["micro_batch"]["tokens"] == real["tokens"]


def _count_all_saved(monkeypatch) -> list[int]:
    """Bytes of all storages that a measured forward saves, weights and batch aside."""
    from vlft.plan import measure

    real, found = measure._step, []

    def step(model, batch, optimizer, half, ledger):
        if ledger is None:
            there = (*model.parameters(), *model.buffers(), *batch.values())
            known = {t.untyped_storage().data_ptr() for t in there if isinstance(t, torch.Tensor)}
            seen: dict[int, torch.Tensor] = {}

            def save(tensor):
                place = tensor.untyped_storage().data_ptr()
                if place not in known:
                    seen[place] = tensor
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
                model(**batch)
            found.append(sum(tensor.untyped_storage().nbytes() for tensor in seen.values()))
        real(model, batch, optimizer, half, ledger)

    monkeypatch.setattr(measure, "_step", step)
    return found


def test_what_dropout_keeps_on_a_gpu():
    """A mask of one byte for each input of each adapted linear, and inputs that were shared. Counted by hand."""
    load = Load(lengths=(1000, 24), vision_lengths=(400,), supervised=100)
    kept = [
        activations.Saved(
            config=TWO_B, family=FAMILY, towers=Towers(lora_dropout=p), load=load, numbers=BF16, device="cuda"
        )
        .estimate()
        .kept["language"]
        for p in (0.05, 0)
    ]
    text = TWO_B.text_config
    width, inner, layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
    # q, k, v of the first layer need no gradient of their input, and save no mask.
    masks = layers * (6 * width + inner) - 3 * width
    # Without dropout q, k and v share their input, gate and up share theirs, and o's is kept by attention anyway.
    copies = layers * 4 * width
    assert kept[0] - kept[1] == (masks + 2 * copies) * load.tokens


def test_auto_counts_what_shapes_do_not_show():
    """LoRA's dropout and copies: 16k tokens of the 2B take 1.5 times the rough count."""
    rough = memory.activations(sizes_of(TWO_B), Towers(), tokens=16384, patches=4096, element_bytes=2)
    told = memory.estimate(TWO_B, FAMILY, Towers(), tokens=16384, patches=4096, numbers=BF16, fused=True)
    assert 1.3 < told["language"].whole / rough["language"].whole < 1.7
    assert told["language"].recomputed < 0.1 * told["language"].whole
    assert told["vision"].whole == 0
    # The stand-ins leave nothing behind that would break a real forward.

    assert constants.cache_info().currsize == 0


def test_a_smaller_pack_is_a_change_too(capsys, flags):
    """For a run that checkpointing alone does not make fit; a share of the patches is rounded to merged patches."""
    argv = [*flags, "--language", "lora", "--pack_tokens", 1000]
    case: list = []
    from vlft.plan import memory as outlook

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(outlook, "first_change", lambda one, *args, **kwargs: case.append(one))
        plan(capsys, *argv, "--gpu", "0.1")
    one = case[0]
    whole = estimates.estimate(one, "ddp", checkpointing="true")
    load = Load(lengths=(one.load.tokens // 2,), vision_lengths=(one.load.patches // 2 + 1,), supervised=1)
    half = estimates.estimate(replace(one, load=load), "ddp", checkpointing="true")
    assert half.language < 0.6 * whole.language


@pytest.fixture(scope="module")
def full(flags):
    return [*flags, *towers("full")[0], "--bf16", "false"]


def test_a_card_by_name_and_every_way_to_share(capsys, full):
    planned, text = plan_and_text(capsys, *full, "--gpu", "H100", "--gpus", 4, "--tokens_per_s", 1000)
    found = planned["memory"]
    assert (found["gpu"], found["gpus"], found["strategy"], found["fits"]) == ("h100", 4, "ddp", True)
    assert found["total"] == sum(found[part] for part in estimates.PARTS)
    assert found["auto"] == []
    shared = {one["strategy"]: one for one in found["strategies"]}
    assert list(shared) == ["ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
    weights = shared["ddp"]["weights"]
    assert shared["ddp"]["gradients"] == 2 * weights  # all train, and DDP's buckets hold a copy
    assert shared["zero1"]["optimizer"] == shared["ddp"]["optimizer"] // 4
    assert shared["zero2_offload"]["optimizer"] == 0
    assert shared["zero2_offload"]["host"] == shared["zero1"]["optimizer"] + weights // 4
    assert found["hours"] == pytest.approx(3 * planned["tokens"] / 1000 / 3600, rel=1e-6)
    assert "memory of one process in GB, of 84.9 (h100); estimated, not yet compared with a GPU:" in text
    assert "  largest micro-batch: " in text


def test_what_lets_it_fit_does(capsys, full):
    """A plan with the flags of the change fits, with the memory that the change stated."""
    roomy = plan(capsys, *full, "--gpu", "h100")["memory"]
    # Between what it takes with and without recomputing; the reserve grows with the card.
    smallest = [_smallest_card(roomy[name]) for name in ("with_checkpointing", "without_checkpointing")]
    assert smallest[0] < smallest[1]
    tight = f"{sum(smallest) / 2 / 1e9:.6f}"
    found = plan(capsys, *full, "--gpu", tight, "--gradient_checkpointing", "false")["memory"]
    assert not found["fits"]
    assert found["auto"] == ["vision", "language"] or len(found["auto"]) == 1
    change = found["change"]
    assert change["flags"] == "--gradient_checkpointing true"
    again = plan(capsys, *full, "--gpu", tight, *change["flags"].split())["memory"]
    assert again["fits"]
    assert again["total"] == change["memory"]["total"]
    assert again["change"] is None


def _smallest_card(found: dict) -> float:
    """Bytes of the smallest card on which it fits: 8% of what weights and CUDA leave free is held in reserve."""
    there = found["weights"] + found["context"]
    needs = found["total"] - 0.08 * (found["card"] - there)
    return (needs - 0.08 * there) / 0.92


def test_where_nothing_helps(capsys, full):
    planned, text = plan_and_text(capsys, *full, "--gpu", "0.1")
    assert not planned["memory"]["fits"]
    assert planned["memory"]["change"] is None
    assert "no known change makes it fit" in text


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["--gpu", "h1000"], 1, "--gpu h1000: neither a number of GB nor one of b200, h200"),
        (["--gpu", "-3"], 1, "--gpu -3: neither"),
        (["--gpu", "h100", "--measure"], 1, "--measure runs on this machine's device, and --gpu h100 names another"),
        (["--tokens_per_s", "0"], 2, "--tokens_per_s is 0, must be more than 0"),
    ],
)
def test_wrong_cards(capsys, flags, argv, status, message):
    assert main(["plan", *map(str, flags), *argv]) == status
    assert message in capsys.readouterr().err


def test_without_a_card_nothing_is_estimated(capsys, flags):
    assert plan(capsys, *flags)["memory"] is None
    assert main(["plan", *map(str, flags)]) == 0
    assert "memory: name a card (--gpu h100)" in capsys.readouterr().out
