"""Forecast an optimizer step on a GPU that need not be there: kernels, bytes, host reads, time and peak memory.

It runs the training code on tensors without contents (`vlft.model.traced`) and counts operations
(`vlft.model.traffic`). Bytes and kernels are those of the code; the time assumes efficiencies that
`scripts/first_contact.sh` measures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from vlft.families import Family
from vlft.model import memory, traced, tracing
from vlft.model.cards import CONTEXT_BYTES, Card
from vlft.model.flops import required_flops, total
from vlft.model.towers import Towers
from vlft.model.traced import Delta
from vlft.model.tracing import Load, Numbers
from vlft.model.traffic import HOST_SECONDS, KINDS, MATMUL_SHARE, MEMORY_SHARE, Cost, Kind, Squares, Traffic

TOP = 10  # entries of the table of costs
LEARNING_RATE = 1e-4
MAX_NORM = 1.0  # of the gradient, as TrainingArguments has it


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What one optimizer step does.

    Attributes:
        load: the shapes of its micro-batch.
        whole: counts of the step.
        parts: (phase, module) -> counts.
        reads: number of times the host waits for the device.
        peak: bytes of tensors at one time, with optimizer states.
        required: floating-point operations that training needs (`vlft.model.flops`).
        card: the GPU.
    """

    load: Load
    whole: Cost
    parts: dict[tuple[str, str], Cost]
    reads: int
    peak: int
    required: float
    card: Card

    @property
    def seconds(self) -> float:
        """Predicted duration: of all kernels, or of the host that starts them."""
        return max(self.whole.seconds, HOST_SECONDS * self.whole.kernels)

    @property
    def mfu(self) -> float:
        assert self.card.tflops is not None
        return self.required / self.seconds / (self.card.tflops * 1e12)

    @property
    def peak_gb(self) -> float:
        """GB on the card: tensors, and what CUDA itself uses."""
        return (self.peak + CONTEXT_BYTES) / 1e9

    @property
    def fits(self) -> bool:
        """Whether the peak leaves as much of the card free as training leaves for fragmentation."""
        return self.peak_gb <= memory.USABLE * self.card.gb

    def gb(self, *kinds: Kind) -> float:
        return sum(self.whole.bytes[kind] for kind in kinds) / 1e9

    def as_json(self) -> dict[str, Any]:
        """The figures of a step, and the modules that cost most."""
        ranked = sorted(self.parts.items(), key=lambda one: -one[1].seconds)
        return {
            "kernels": round(self.whole.kernels),
            "gb_elementwise": self.gb("elementwise", "adapter"),
            "gb_matmul": self.gb("matmul"),
            "gb_attention": self.gb("attention"),
            "gb_adapter_matmul": self.gb("adapter"),
            "host_syncs": self.reads,
            "predicted_ms": 1e3 * self.seconds,
            "predicted_mfu": self.mfu,
            "predicted_tokens_per_s": self.load.tokens / self.seconds,
            "peak_gb": self.peak_gb,
            "card_gb": self.card.gb,
            "fits": self.fits,
            "tokens": self.load.tokens,
            "patches": self.load.patches,
            "pictures": len(self.load.vision_lengths),
            "supervised": self.load.supervised,
            "required_tflops": self.required / 1e12,
            "ms": {kind: 1e3 * self.whole.kind_seconds[kind] for kind in KINDS},
            "costs": [
                {
                    "module": module,
                    "phase": phase,
                    "ms": 1e3 * cost.seconds,
                    "kernels": round(cost.kernels),
                    **{f"gb_{kind}": cost.bytes[kind] / 1e9 for kind in KINDS},
                }
                for (phase, module), cost in ranked[:TOP]
            ],
            "assumed": {
                "matmul_tflops": MATMUL_SHARE * (self.card.tflops or 0),
                "attention_tflops": self.card.flash * (self.card.tflops or 0),
                "memory_tb_s": MEMORY_SHARE * (self.card.tb_s or 0),
                "host_us_per_kernel": 1e6 * HOST_SECONDS,
            },
        }


def forecast(
    config: Any,
    family: Family,
    towers: Towers,
    load: Load,
    *,
    numbers: Numbers,
    card: Card,
    checkpointed: Collection[str] = (),
    fused: bool = True,
    delta: Delta = "fla",
    say: Callable[[str], None] = lambda line: None,
) -> Forecast:
    """Run one step on tensors without contents: forward, backward, clipping, AdamW.

    Args:
        config: transformers' config of the top class.
        family: of the config.
        towers: what trains.
        load: the shapes of the micro-batch.
        numbers: the dtypes it computes in.
        card: the GPU, whose speed is known.
        checkpointed: towers (vision, language) that recompute their blocks.
        fused: whether fused kernels run.
        delta: what computes the delta rule of gated delta nets.
        say: receives a line before each phase.
    """
    sizes = family.sizes(config)
    with traced.step(
        config, family, towers, numbers=numbers, device="cuda", fused=fused, delta=delta, checkpointed=checkpointed
    ) as model:
        batch = tracing.batch_of(sizes.vision, load)
        weights = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, fused=True)
        for weight in weights:  # its states exist from the second step on
            weight.grad = torch.zeros_like(weight)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        traffic = Traffic(
            model,
            card=card,
            rank=towers.lora_rank if towers.has_lora else None,
            squares=_squares(batch, load),
        )
        states = (value for state in optimizer.state.values() for value in state.values())
        traffic.start(t for t in (*model.parameters(), *model.buffers(), *batch.values(), *states) if _is_tensor(t))
        with tracing.Watch(traffic), traffic.modules():
            say("forward")
            with tracing.autocast("cuda", numbers.autocast):
                losses = [model(**batch).loss * (1.0 / max(1, load.supervised))]
            traffic.phase = "backward"
            say("backward")
            tracing.backward(losses.pop(), traffic.backward_of)
            traffic.phase = "optimizer"
            say("optimizer")
            torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    whole = Cost()
    for cost in traffic.costs.values():
        whole.add(cost)
    required = required_flops(
        sizes,
        towers,
        lengths=load.lengths,
        vision_lengths=load.vision_lengths,
        window_lengths=batch["vision_meta"].get("window_lengths"),
        supervised=load.supervised,
    )
    return Forecast(
        load=load,
        whole=whole,
        parts={(phase, module): cost for (phase, module), cost in traffic.costs.items()},
        reads=traffic.reads,
        peak=traffic.peak,
        required=total(required),
        card=card,
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _squares(batch: dict[str, Any], load: Load) -> dict[tuple[int, int], Squares]:
    """The lengths of each attention call of the batch, by its tokens and number of segments."""
    found = {}
    meta = batch["vision_meta"].get("window_lengths")
    segments = [(batch["vision_lengths"], False), *([(meta, False)] if meta else []), (load.lengths, True)]
    for lengths, causal in segments:
        found[sum(lengths), len(lengths)] = Squares(total=sum(n * n for n in lengths), causal=causal)
    return found
