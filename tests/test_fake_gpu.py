"""A training step on CUDA tensors that have shapes and no contents: what a GPU would refuse or wait for, without one.

`vlft train` prepares the model, its loader collates the batch, and its trainer provides inputs, loss and optimizer. The
tests find tensors on another device, dtypes that a flash kernel refuses, values that are read back and copies that
block. They do not check numbers, torch's autograd engine, DDP or the scheduler.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch
import transformers
from branch_rows import asked, branch_batch
from build import FAMILY

from vlft.bench.train import PRESETS
from vlft.config.training import TrainFlags
from vlft.data.collate import Collator
from vlft.families import FAMILIES
from vlft.model import attention, groups, kernels, segments, standins, tracing, trial
from vlft.model.load import empty_model, load_config, load_processor
from vlft.model.loss import sum_segments
from vlft.model.scale import PixelScale, constants
from vlft.model.towers import Towers
from vlft.objectives import Loss, Mean, Objective, Sums
from vlft.objectives.sft import Sft
from vlft.setup import weights
from vlft.train import model_setup as prepare
from vlft.train.metrics import Meter
from vlft.train.step_guard import StepGuard
from vlft.train.trainer import VlftTrainer
from vlft.train.watchdog import Watchdog

BF16, FLOAT32 = torch.bfloat16, torch.float32
ROWS = {"pictures": ["still", "two-turns", "frames", "text"], "text": ["text", "text-2"], "nothing": []}


def rows_of(encoded, load):
    return [encoded[name] for name in ROWS[load] if name in encoded]  # videos need packages that may not be installed


class OnAGpu(TrainFlags):
    """Flags on a machine with a GPU."""

    @property
    def device(self):
        assert super().device.type == "cpu"  # sets up the rest
        return torch.device("cuda")


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    return OnAGpu(output_dir=str(tmp_path_factory.mktemp("run")), use_cpu=True, bf16=True, report_to="none")


def as_a_base(folder, family, config, processor, preset):
    """What `vlft train` opens, to train as a preset says."""
    return SimpleNamespace(
        folder=folder,
        name="tiny",
        config=config,
        family=family,
        sizes=family.sizes(config),
        towers=Towers(**PRESETS[preset]),
        processor=processor,
        quantisation=None,
    )


@pytest.fixture(scope="module")
def opened(base):
    config, _ = load_config(base)
    return functools.partial(as_a_base, base, FAMILY, config, load_processor(base))


@pytest.fixture
def machine(monkeypatch):
    """Torch's varlen kernel and the fused ones run, and pass their self-tests; records the inputs of attention."""
    seen = []

    def kernel(q, k, v, cu, longest, *, scale, causal, cu_k=None, longest_k=None):
        keys = () if cu_k is None else (described(cu_k), longest_k)
        seen.append((causal, *map(described, (q, k, v, cu, longest)), *keys))
        return standins.attend(q, k, v, cu, longest, scale=scale, causal=causal, cu_k=cu_k, longest_k=longest_k)

    def load_kernel(backend):
        if backend != "varlen":
            raise ImportError(f"No module named {backend}")
        return kernel

    monkeypatch.setattr(attention, "load_kernel", load_kernel)
    monkeypatch.setattr(attention, "self_test", lambda *args, **kwargs: 0.0)
    monkeypatch.setattr(kernels, "_functions", lambda choice, device: (standins.fused_functions(),))
    monkeypatch.setattr(kernels, "_problem", lambda *args: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    constants.cache_clear()
    yield seen
    constants.cache_clear()


def described(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    return type(value)


def prepared(monkeypatch, opened, flags, *, stored, recompute, fused):
    """The model as `vlft train` prepares it, from a base of a stored dtype."""

    def load_base(folder, family, *, dtype=None):
        model = empty_model(copy.deepcopy(opened.config), family).to(dtype or stored)
        model.to = lambda device: model  # the meta device has nothing to move; see below
        return model

    monkeypatch.setattr(weights, "load_base", load_base)
    monkeypatch.setattr(flags, "checkpointing", str(recompute).lower())
    monkeypatch.setattr(flags, "liger", str(fused).lower())
    model, chosen = prepare.prepare_model(opened, flags, choice="auto", say=lambda line: None)
    with tracing.without_contents(), torch.device("cuda"):
        tracing.fill(model)
    assert chosen["attention"] == "language varlen, vision varlen"
    assert chosen["fused kernels"].startswith("RMSNorm on " if fused else "off")
    assert chosen["fused kernels"].endswith(f"rotary embedding of vision on {opened.sizes.vision.depth}") == fused
    assert (chosen["gradient checkpointing"] != "off") == recompute
    assert chosen.get("experts") == ("grouped_mm" if "experts" in opened.family.features else None)
    return model


def trainer_of(opened, model, flags, objective=Sft) -> VlftTrainer:
    """The trainer, as far as a step needs it."""
    trainer = object.__new__(VlftTrainer)
    trainer.args, trainer.model, trainer.optimizer = flags, model, None
    table = groups.parameter_groups(model, opened.family, learning_rates=flags.learning_rates, weight_decay=0.1)
    trainer.groups = [group for group in table if group.trainable]
    trainer.objective = objective(encoder=None, collator=None)
    trainer.meter = Meter(lambda batch: 0.0, peak=None, statistics=objective.statistics)
    trainer.guard = StepGuard(flags, None, Watchdog(0), packing=True, say=print)
    trainer.on_bad_row, trainer.skipped = "error", {}
    trainer.accelerator = SimpleNamespace(distributed_type=None)
    trainer.control = SimpleNamespace(should_log=True, should_evaluate=False, should_save=False)
    trainer.state = SimpleNamespace(global_step=1, epoch=0.1, max_steps=10)
    trainer.progress = SimpleNamespace(logged=lambda line: None)
    trainer.metrics = SimpleNamespace(lines=(lines := []), write=lines.append)
    trainer._last_logged = trainer._globalstep_last_logged = 0
    trainer._rates = {}
    return trainer


def run_step(opened, model, flags, rows, *, autocast, objective=Sft, batch=None) -> None:
    """An optimizer step, observed from the loader's batch (or another one) to its line in metrics.jsonl."""
    trainer, batch = trainer_of(opened, model, flags, objective), batch or batch_of(opened, rows)
    reads, copies = [], []
    with pytest.MonkeyPatch.context() as patch, tracing.without_contents():
        patch.setattr(Sums, "read", functools.partialmethod(read_back, reads))
        patch.setattr(transformers.Trainer, "log", lambda *args, **kwargs: None)
        optimizer = trainer.create_optimizer()
        known_from_the_first_step(opened)
        with tracing.Watch(tracing.refuse_waits, functools.partial(to_the_gpu, copies)):
            items = trainer._get_num_items_in_batch([batch], flags.device)
            inputs = trainer._prepare_inputs(batch)
            assert copies == ["aten._to_copy"]  # these patches are few, and are sent with the rest
            with tracing.autocast("cuda", autocast):
                loss = trainer.compute_loss(model.train(), inputs, num_items_in_batch=items)
            tracing.backward(loss)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), flags.max_grad_norm)
            norm = trainer._get_grad_norm(model, grad_norm=norm)
            optimizer.step()
            trainer._maybe_log_save_evaluate(loss.detach(), norm, model, None, None, None, 0.0)
    # One vector is read, once in each optimizer step: a step that is not finite must move no weight.
    assert reads == [torch.device("cuda", 0)]
    [line] = trainer.metrics.lines
    assert (line["grad_norm"], line["tokens"]) == (0.5, batch["counts"]["tokens"])
    assert set(objective.statistics) <= set(line)
    if "recurrent" not in opened.family.features:  # their segments are computed from lengths in the forward
        assert copies == ["aten._to_copy"]
    assert optimizer.defaults["fused"]
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            assert weight.grad is not None, name
            assert (weight.grad.dtype, weight.grad.device) == (weight.dtype, torch.device("cuda", 0)), name
        else:
            assert weight.grad is None, name


def read_back(sums, reads, *more):
    """Stands in for `Sums.read`: tensors without contents cannot be read. Records the device of what is read."""
    reads.append(torch.stack([*(one for one in sums.sums if one is not None), *more]).device)
    return [1.0] * 2 * (1 + len(sums.names)), [0.5] * len(more)


def to_the_gpu(copies, op):
    if op.name in ("aten._to_copy", "aten.copy_") and {t.device.type for t in (*op.inputs, *op.outputs)} > {"cuda"}:
        copies.append(op.name)


def batch_of(opened, rows):
    """A batch, as the loader returns it."""
    return Collator(vision=opened.sizes.vision, filler_token=0)(rows)


def known_from_the_first_step(opened):
    """Copy to the device what the first step of a run copies, with a wait."""
    constants(PixelScale.of(opened.processor), torch.device("cuda", 0))


CELLS = [
    pytest.param(
        preset, stored, recompute, fused, load,
        id=f"{preset}-{str(stored).removeprefix('torch.')}-{'recompute' if recompute else 'keep'}"
        f"-{'fused' if fused else 'torch'}-{load}",
        # In CI: every preset with every dtype, either fused kernels or recomputation, and a batch without pictures.
        marks=[] if (recompute != fused and load == "pictures") or (recompute and fused and load != "pictures"
        and (preset, stored) in (("lora", BF16), ("full", FLOAT32))) else [pytest.mark.grid],
    )
    for preset in PRESETS for stored in (BF16, FLOAT32) for recompute in (False, True) for fused in (False, True)
    for load in ROWS
]  # fmt: skip


@pytest.mark.parametrize(("preset", "stored", "recompute", "fused", "load"), CELLS)
def test_a_step_neither_waits_nor_mixes_dtypes_or_devices(
    monkeypatch, machine, opened, flags, encoded, preset, stored, recompute, fused, load
):
    one = opened(preset)
    model = prepared(monkeypatch, one, flags, stored=stored, recompute=recompute, fused=fused)
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    assert trained == {FLOAT32}
    run_step(one, model, flags, rows_of(encoded, load), autocast=BF16)
    assert {dtype for _, *parts in machine for dtype, *_ in parts[:3]} == {BF16}


#: In CI: each feature of a family once, with LoRA and recomputation or with all weights in float32.
FAMILY_CELLS = [
    pytest.param(
        model_type, preset, recompute,
        id=f"{model_type}-{preset}-{'recompute' if recompute else 'keep'}",
        marks=[] if (model_type, preset, recompute) in (
            ("qwen2_5_vl", "lora_vision", True), ("qwen3_vl", "full", False), ("qwen3_5", "full", False),
            ("qwen3_vl_moe", "lora_vision", True),
        ) else [pytest.mark.grid],
    )
    for model_type in FAMILIES if model_type != FAMILY.model_type
    for preset in PRESETS if preset != "full" or "experts" not in FAMILIES[model_type].features
    for recompute in (False, True)
]  # fmt: skip


@pytest.mark.parametrize(("model_type", "preset", "recompute"), FAMILY_CELLS)
def test_a_step_of_each_family_does_neither(monkeypatch, machine, stock_of, flags, model_type, preset, recompute):
    stock = stock_of(model_type)
    one = as_a_base(stock.base, stock.family, stock.model.config, stock.processor, preset)
    model = prepared(monkeypatch, one, flags, stored=BF16, recompute=recompute, fused=recompute)
    rows = [row.flat for row in stock.rows.values()]
    run_step(one, model, flags, rows, autocast=BF16)
    assert {dtype for _, *parts in machine for dtype, *_ in parts[:3]} == {BF16}
    segments_seen = {cu[1][0] - 1 for causal, *_, cu, _ in machine if not causal}
    batch = batch_of(one, rows)
    several = [batch["vision_lengths"], batch["vision_meta"].get("window_lengths", batch["vision_lengths"])]
    assert segments_seen == {len(lengths) for lengths in several}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_under_deepspeed_does_neither(monkeypatch, machine, opened, flags, encoded, preset):
    """DeepSpeed's engine converts all weights to bf16 and holds the masters, and there is no autocast."""
    one = opened(preset)
    monkeypatch.setattr(OnAGpu, "zero", property(lambda self: "zero2"))
    model = prepared(monkeypatch, one, flags, stored=FLOAT32, recompute=True, fused=True)
    with tracing.without_contents(), torch.device("cuda"):
        tracing.fill(model, tracing.numbers_of(FLOAT32, BF16, deepspeed=True))
    run_step(one, model, flags, rows_of(encoded, "pictures"), autocast=None)


def test_a_step_with_stored_features_does_neither(monkeypatch, machine, stock_of, flags):
    """With `--cache_vision_features`: the tower does not see the pictures of every second row."""
    stock = stock_of("qwen3_vl")
    one = as_a_base(stock.base, stock.family, stock.model.config, stock.processor, "lora")
    model = prepared(monkeypatch, one, flags, stored=BF16, recompute=True, fused=True)
    vision = one.sizes.vision

    def stored(medium):
        features = torch.zeros(vision.mergers, medium.grid.patches // vision.cell, vision.out, dtype=BF16)
        return dataclasses.replace(medium, pixels=torch.empty(0, dtype=torch.uint8), features=features)

    rows = [row.flat for row in stock.rows.values()]
    for place in range(0, len(rows), 2):
        rows[place] = dataclasses.replace(rows[place], media=tuple(map(stored, rows[place].media)))
    batch = batch_of(one, rows)
    assert len(batch["vision_rows"]) > 0
    assert len(batch["cached"]["rows"]) > 0
    run_step(one, model, flags, rows, autocast=BF16)
    assert {dtype for _, *parts in machine for dtype, *_ in parts[:3]} == {BF16}


class PerRow(Objective):
    """A loss on the log-probabilities of complete answers, as in preference training."""

    statistics = ("answer_logp",)

    def weight(self, batch):
        return batch["counts"]["samples"]

    def loss(self, model, batch):
        sums_S, counts_S = sum_segments(self.log_probs(model, batch), batch["supervised_rows"], batch["cu_seqlens"])
        weight = self.weight(batch)
        return Loss(-(sums_S / counts_S.clamp(min=1)).sum(), weight, {"answer_logp": Mean(sums_S.sum(), weight)})


@pytest.mark.parametrize(("stored", "load"), [(BF16, "pictures"), (FLOAT32, "nothing")])
def test_a_step_of_log_probabilities_does_neither(monkeypatch, machine, opened, flags, encoded, stored, load):
    one = opened("full")
    model = prepared(monkeypatch, one, flags, stored=stored, recompute=False, fused=True)
    run_step(one, model, flags, rows_of(encoded, load), autocast=BF16, objective=PerRow)


class PerAnswer(PerRow):
    """A loss on the answers of a batch in which several share a prompt."""

    tensors = (*Objective.tensors, "answers")

    def loss(self, model, batch):
        log_probs_K, bounds = self.log_probs(model, batch), batch["answers"]["bounds"]
        sums_A, _ = sum_segments(log_probs_K, torch.arange(len(log_probs_K), device=bounds.device), bounds)
        return Loss(-sums_A.sum(), self.weight(batch), {"answer_logp": Mean(sums_A.sum(), self.weight(batch))})


@pytest.mark.parametrize(
    ("model_type", "fused"), [pytest.param("qwen2_vl", False, marks=pytest.mark.grid), ("qwen3_vl", True)]
)
def test_a_step_of_answers_that_share_a_prompt_does_neither(monkeypatch, machine, stock_of, flags, model_type, fused):
    stock = stock_of(model_type)
    one = as_a_base(stock.base, stock.family, stock.model.config, stock.processor, "lora_vision")
    model = prepared(monkeypatch, one, flags, stored=BF16, recompute=True, fused=fused)
    batch = branch_batch(asked([stock.rows[kind].flat for kind in ("picture", "text")]), stock.family)
    run_step(one, model, flags, [], autocast=BF16, objective=PerAnswer, batch=batch)
    [(_, q, k, v, cu, _, cu_k, longest_k)] = {call for call in machine if call[0]}
    tokens, keys = sum(batch["lengths"]), sum(batch["branches"]["key_lengths"])
    assert tokens < keys
    assert [part[0] for part in (q, k, v, cu, cu_k)] == [BF16, BF16, BF16, torch.int32, torch.int32]
    assert [part[1][0] for part in (q, k, v)] == [tokens, keys, keys]
    assert cu[1] == cu_k[1] == (len(batch["lengths"]) + 1,)
    assert longest_k == max(batch["branches"]["key_lengths"])
    assert k[2] == v[2] == (k[1][1] * k[1][2], k[1][2], 1)  # as in the self-test of branches


def test_an_evaluation_does_neither(monkeypatch, machine, opened, flags, encoded):
    one = opened("full")
    model = prepared(monkeypatch, one, flags, stored=BF16, recompute=False, fused=True).eval()
    trainer, batch = trainer_of(one, model, flags), batch_of(one, rows_of(encoded, "pictures"))
    with tracing.without_contents():
        known_from_the_first_step(one)
        with tracing.Watch(tracing.refuse_waits), torch.no_grad(), tracing.autocast("cuda", BF16):
            inputs = trainer._prepare_inputs(batch)
            loss = trainer.objective.evaluate(model, inputs)
    assert (loss.sum.dtype, loss.sum.device) == (FLOAT32, torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("model_type", "stored"),
    [("qwen2_vl", BF16), ("qwen2_vl", FLOAT32), ("qwen3_vl", FLOAT32), ("qwen3_5", BF16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
@pytest.mark.parametrize("fused", [False, True], ids=["torch", "fused"])
def test_the_self_test_of_attention_feeds_a_kernel_as_a_step_does(
    monkeypatch, machine, stock_of, flags, model_type, stored, fused
):
    """Dtypes, strides and kinds of the kernel's inputs, in both towers, over the same number of tokens."""
    stock = stock_of(model_type)
    one = as_a_base(stock.base, stock.family, stock.model.config, stock.processor, "full")
    model = prepared(monkeypatch, one, flags, stored=stored, recompute=False, fused=fused)
    lengths = trial.LENGTHS
    with tracing.without_contents(), torch.device("cuda"):
        batch = tracing.batch_of(one.sizes.vision, tracing.Load(lengths=lengths, vision_lengths=lengths, supervised=9))
        known_from_the_first_step(one)
        with tracing.autocast("cuda", BF16):
            model(**batch)
    in_a_step = set(machine)
    assert len(in_a_step) == 2  # one kind for each tower, in all of its layers
    monkeypatch.undo()
    in_the_test = set()

    def kernel(q, k, v, cu, longest, *, scale, causal):
        in_the_test.add((causal, *map(described, (q, k, v, cu, longest))))
        heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
        return segments.attend_segments(*heads_first, lengths, scale=scale, causal=causal)[0]

    for heads in segments.heads_of(one.sizes).values():
        trial.self_test(kernel, heads, dtype=BF16, device=torch.device("cpu"), fused=fused)
    assert in_the_test == in_a_step


WAITS = {
    "read": lambda x, host: x[0, 0].item(),
    "shape": lambda x, host: x.nonzero(),
    "mask": lambda x, host: x[x > 0],
    "to the host": lambda x, host: x.cpu(),
    "to the device": lambda x, host: host.to("cuda"),
    "to the device, not from pinned memory": lambda x, host: host.to("cuda", non_blocking=True),
    "to the host, not blocking": lambda x, host: x.to("cpu", non_blocking=True),
    "written from the host": lambda x, host: x.copy_(host),
    "mixed": lambda x, host: x + host,
    "a kernel in float32": lambda x, host: standins.attend(*[x[:, None]] * 3, x[0].int(), 3, scale=1.0, causal=True),
    "two dtypes": lambda x, host: standins.attend(
        x[:, None].half(), *[x[:, None].bfloat16()] * 2, x[0].int(), 3, scale=1.0, causal=True
    ),
    "a gradient": lambda x, host: tracing.backward(OnTheHost.apply(x.requires_grad_()).sum()),
}


KEYS = {
    "of other lengths, which are not given": {},
    "whose longest is not given": {"cu_k": torch.int32},
    "with long lengths": {"cu_k": torch.int64, "longest_k": 5},
}


@pytest.mark.parametrize("what", KEYS)
def test_a_stand_in_refuses_keys(what):
    with tracing.without_contents(), torch.device("cuda"):
        q, k, cu = torch.ones(3, 2, 8, dtype=BF16), torch.ones(5, 2, 8, dtype=BF16), torch.ones(2, dtype=torch.int32)
        keys = {name: torch.ones(2, dtype=v) if name == "cu_k" else v for name, v in KEYS[what].items()}
        with pytest.raises((RuntimeError, TypeError), match=r"longest of each|int32 lengths"):
            standins.attend(q, k, k, cu, 3, scale=1.0, causal=True, **keys)


class OnTheHost(torch.autograd.Function):
    """A function whose gradient is on a different device than its input."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return torch.zeros(gradient.shape, device="cpu")


@pytest.mark.parametrize("what", WAITS)
def test_the_watch_sees(what):
    with tracing.without_contents():
        x, host = torch.ones(3, 8, device="cuda"), torch.ones(3, 8)
        with pytest.raises(RuntimeError), tracing.Watch(tracing.refuse_waits):
            WAITS[what](x, host)


def test_the_watch_shows_a_kernel_as_one_operation_forward_and_backward():
    seen = []
    with tracing.without_contents():
        q, k = (torch.zeros(6, n, 8, device="cuda", dtype=BF16, requires_grad=True) for n in (4, 2))
        cu = torch.zeros(3, device="cuda", dtype=torch.int32)
        with tracing.Watch(seen.append):
            out = standins.attend(q, k, k, cu, 4, scale=1.0, causal=True)
            tracing.backward(out.float().sum())
    kernels_seen = [op for op in seen if op.name.startswith("vlft_traced.")]
    assert [(op.name, len(op.inputs), len(op.outputs)) for op in kernels_seen] == [
        ("vlft_traced.attend", 4, 2),
        ("vlft_traced.attend_backward", 7, 3),
    ]
    assert {op.name for op in seen} >= {"aten._to_copy", "aten.sum", "aten.expand"}
    assert q.grad.shape == q.shape
    assert k.grad.shape == k.shape
