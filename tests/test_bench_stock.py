"""The baseline of vlft bench: a stock model with kernels computes what it computes without, and its tuning is fair."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch_kernels import TORCH

from vlft.bench import stock_kernels
from vlft.bench.baseline import prepared
from vlft.bench.stock import COUNTS, IGNORED, StockRows, stock_collator
from vlft.bench.tune import BLOCK, ModelTrial, Settings, blocks_of, fastest, race
from vlft.config.flags import DataFlags, ModelFlags
from vlft.families import FAMILIES
from vlft.model import adapt, kernels
from vlft.model.apply import apply_towers
from vlft.model.load import load_base
from vlft.model.segments import attend_segments
from vlft.model.towers import Towers
from vlft.setup import open_base

LORA = Towers(lora_dropout=0.0, lora_rank=4)


def kernel(q, k, v, cu, longest, *, scale, causal):
    """A varlen kernel for a CPU."""
    lengths = cu.diff().tolist()
    assert longest == max(lengths)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return attend_segments(q, k, v, lengths, scale=scale, causal=causal)[0]


@pytest.fixture(scope="module")
def rows_of(base_of, samples):
    """A function: family -> its processor, and three rows (pictures, text, pictures) as transformers prepares them."""

    def of(family):
        base = open_base(DataFlags(data_path=[]), ModelFlags(model_id=str(base_of(family))), given=frozenset())
        picked = [samples[name] for name in ("still", "text", "two-turns")]
        return base, StockRows(samples=picked, processor=base.processor, recipe=base.recipe, family=family)

    return of


def _run(model, batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch as transformers' Trainer computes it, and the gradients."""
    inputs = {name: value for name, value in batch.items() if name != COUNTS}
    targets = inputs.get("shift_labels", inputs["labels"][:, 1:])
    loss = model(**inputs, num_items_in_batch=(targets != IGNORED).sum()).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


#: The default family, and one whose layers have no attention; the others only in the grid.
OFTEN = ("qwen2_vl", "qwen3_5")


@pytest.mark.parametrize(
    "model_type", [pytest.param(one, marks=() if one in OFTEN else pytest.mark.grid) for one in FAMILIES]
)
def test_kernels_leave_the_loss_of_a_stock_model_as_it_is(model_type, base_of, rows_of):
    """Padded rows with and without pictures: fused norms, attention without padding, logits of trained tokens only."""
    family = FAMILIES[model_type]
    base, rows = rows_of(family)
    found = []
    for side in ("stock", "kernels"):
        torch.manual_seed(0)
        model = load_base(base_of(family), family, dtype=torch.float32)
        model.config.use_cache = False
        if side == "kernels":
            assert stock_kernels.install(model, dtype=torch.float32) == {
                "attention": "vision sdpa, language sdpa", "kernels": "off (needs CUDA)",
            }  # fmt: skip
            stock_kernels.use_without_padding(model, kernel)
            kernels.fuse(model, TORCH)
        model = apply_towers(model, family, LORA, masters=True)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.data.normal_(std=0.05, generator=generator)
        collator = stock_collator(base.processor, trained_only=side == "kernels")
        found.append(_run(model.train(), collator([rows[i] for i in range(len(rows))])))
    (loss, gradients), (with_kernels, others) = found
    assert with_kernels.item() == pytest.approx(loss.item(), rel=1e-5)
    assert set(others) == set(gradients)
    for name, gradient in gradients.items():
        assert (others[name] - gradient).abs().max() <= 1e-5 * max(1.0, float(gradient.abs().max())), name


def test_columns_of_trained_tokens(rows_of):
    base, rows = rows_of(FAMILIES["qwen2_vl"])
    batch = stock_collator(base.processor, trained_only=True)([rows[0], rows[1]])
    assert len(batch["logits_to_keep"]) < batch["input_ids"].shape[1] / 2
    assert batch["shift_labels"].shape == (2, len(batch["logits_to_keep"]))
    for row in range(2):
        kept = batch["shift_labels"][row]
        assert kept[kept != IGNORED].tolist() == [t for t in rows[row]["labels"][0].tolist() if t != IGNORED]
    assert int((batch["shift_labels"] != IGNORED).sum()) == batch[COUNTS]["supervised_tokens"]


@pytest.mark.parametrize(("side", "runs_backward"), [("stock", True), ("kernels", False)])
def test_recomputation_and_a_frozen_vit(side, runs_backward, base, rows_of):
    """Under transformers' recomputation a frozen ViT runs backward. Switched off again, it leaves nothing behind."""
    opened, rows = rows_of(FAMILIES["qwen2_vl"])
    args = SimpleNamespace(half=None, device=torch.device("cpu"))
    model, recompute, _ = prepared(opened, args, side=side)
    collator = stock_collator(opened.processor, trained_only=side == "kernels")
    block, layer = (adapt.blocks(model, part)[0] for part in adapt.PARTS)
    calls, backward = [], []
    block.register_forward_hook(lambda module, args, out: backward.append(out.requires_grad))
    layer.get_submodule("mlp").register_forward_pre_hook(lambda *_: calls.append(1))
    for on in (False, True, False, True):
        calls.clear(), backward.clear()
        recompute(on)
        _run(model.train(), collator([rows[0]]))
        assert len(calls) == 1 + on, "a recomputed layer runs twice"
        assert any(backward) == (on and runs_backward)


# ---- settings are timed


def settings(batch: int, *, checkpointing: bool = False, cudnn: bool = True) -> Settings:
    return Settings(batch=batch, checkpointing=checkpointing, cudnn=cudnn)


class Machine:
    """A machine on which a token takes a given time, padding included, and a given number of tokens fits."""

    def __init__(self, lengths, *, room: int, recomputing: float = 1.3, cudnn: float = 1.0) -> None:
        self.lengths, self.room, self.recomputing, self.cudnn = lengths, room, recomputing, cudnn
        self.timed: list[Settings] = []

    def _places(self, rows) -> int:
        return len(rows) * max(self.lengths[i] for i in rows)

    def fits(self, one, rows) -> bool:
        return self._places(rows) <= (3 * self.room if one.checkpointing else self.room)

    def seconds(self, one, rows) -> float:
        self.timed.append(one)
        batches = [rows[i : i + one.batch] for i in range(0, len(rows), one.batch)]
        # A step takes a fixed time besides that of its tokens.
        steps = sum(200 + self._places(batch) for batch in batches)
        return steps * (self.recomputing if one.checkpointing else 1) * (self.cudnn if one.cudnn else 1)


LENGTHS = [100 + 37 * i % 1900 for i in range(200)]


def test_the_fastest_batch_is_found_for_each_order():
    """Rows at random pad a large batch; rows of similar length do not."""
    machine = Machine(LENGTHS, room=16_000)
    chosen = {order: fastest(machine, LENGTHS, order=order, say=_quiet) for order in ("random", "grouped")}
    assert chosen["random"][0] == settings(1)
    assert chosen["grouped"][0] == settings(8)
    for _, tried in chosen.values():
        assert {(one["batch"], one["checkpointing"]) for one in tried} == {
            (batch, recompute) for batch in (8, 4, 2, 1) for recompute in (False, True)
        }, "every setting that fits is timed"


def test_only_what_fits_is_timed():
    machine = Machine(LENGTHS, room=4_500)
    found, _ = fastest(machine, LENGTHS, order="grouped", say=_quiet)
    assert {one.batch for one in machine.timed if not one.checkpointing} == {2, 1}
    assert {one.batch for one in machine.timed if one.checkpointing} == {4, 2, 1}
    assert found == settings(2)
    with pytest.raises(torch.OutOfMemoryError, match=r"1,\d+ tokens fits, even with checkpointing"):
        fastest(Machine(LENGTHS, room=100), LENGTHS, order="grouped", say=_quiet)
    assert fastest(machine, LENGTHS, order="grouped", batch=1, checkpointing=True, say=_quiet) == (
        settings(1, checkpointing=True),
        [],
    )


@pytest.mark.parametrize(("slower", "chosen"), [(1.2, False), (0.8, True)])
def test_attention_of_cudnn_is_kept_only_if_it_is_faster(slower, chosen, monkeypatch):
    machine = Machine(LENGTHS, room=16_000, cudnn=slower)
    lines: list[str] = []
    found, tried = fastest(machine, LENGTHS, order="grouped", without_cudnn=True, say=lines.append)
    assert found == settings(8, cudnn=chosen)
    assert {one["cudnn_attention"] for one in tried} == {"off", "as torch chooses"}
    assert len(lines) == len(tried) == 9
    monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    assert settings(1).as_json()["cudnn_attention"] == "last"


def test_slow_settings_are_not_timed_on_all_rows():
    blocks = [[0] * BLOCK, [1] * BLOCK, [2] * BLOCK, [3] * BLOCK]
    speeds = {settings(1): 1.0, settings(2): 1.05, settings(4): 1.5}
    seen: dict[Settings, int] = dict.fromkeys(speeds, 0)

    def seconds(one: Settings, rows) -> float:
        seen[one] += 1
        return speeds[one]

    found = race(list(speeds), blocks, [10] * 4, seconds)
    assert seen == {settings(1): 4, settings(2): 4, settings(4): 1}
    assert next(iter(found)) == settings(1)
    assert found[settings(4)] == pytest.approx(10 * BLOCK / 1.5)


@pytest.mark.parametrize("count", [3, 8, 20, 500])
@pytest.mark.parametrize("order", ["random", "grouped"])
def test_blocks_of_rows(order, count):
    lengths = [i * 7919 % 2003 for i in range(count)]
    blocks = blocks_of(lengths, order)
    rows = [row for block in blocks for row in block]
    assert len(rows) == len(set(rows)) == min(count, BLOCK * max(1, min(4, count // BLOCK)))
    if count == 500:
        spread = [max(lengths[i] for i in block) - min(lengths[i] for i in block) for block in blocks]
        assert all(one < 100 for one in spread) == (order == "grouped")


def test_a_trial_takes_real_steps(rows_of):
    """On a CPU, where the benchmark times nothing."""
    opened, rows = rows_of(FAMILIES["qwen2_vl"])
    args = SimpleNamespace(half=None, device=torch.device("cpu"))
    model, recompute, _ = prepared(opened, args, side="kernels")
    collator = stock_collator(opened.processor, trained_only=True)
    trial = ModelTrial(model, rows, collator, dtype=torch.float32, recompute=recompute)
    steps = []
    model.register_forward_hook(lambda *_: steps.append(1))
    assert trial.seconds(settings(2), [0, 1, 2]) > 0
    assert len(steps) == 1 + 2, "one step to warm up, and two to time"
    assert all(parameter.grad is None for parameter in model.parameters())


def _quiet(line: str) -> None:
    pass
