"""Forecast an optimizer step on a GPU that need not be there: kernels, bytes, host reads, time and peak memory.

It runs the training code on tensors without contents (`vlft.model.traced`) and counts operations
(`vlft.model.traffic`). Bytes and kernels are those of the code; the time assumes efficiencies that
`scripts/first_contact.sh` measures.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch

from vlft.families import Family
from vlft.model import depth, memory, traced, tracing
from vlft.model.cards import CONTEXT_BYTES, Card
from vlft.model.chosen import small as small_towers
from vlft.model.flops import required_flops, total
from vlft.model.towers import Towers
from vlft.model.traced import Delta
from vlft.model.tracing import Load, Numbers
from vlft.model.traffic import HOST_SECONDS, KINDS, MATMUL_SHARE, MEMORY_SHARE, Cost, Kind, Phase, Squares, Traffic

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
        peak: bytes of tensors at one time, with optimizer states; of a forecast from small models, None.
        required: floating-point operations that training needs (`vlft.model.flops`).
        card: the GPU.
    """

    load: Load
    whole: Cost
    parts: dict[tuple[Phase, str], Cost]
    reads: int
    peak: int | None
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
        """GB on the card: tensors, and what CUDA itself uses. Raises ValueError without a peak."""
        if self.peak is None:
            raise ValueError("a forecast from small models has no peak")
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
            "peak_gb": None if self.peak is None else self.peak_gb,
            "card_gb": self.card.gb,
            "fits": None if self.peak is None else self.fits,
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


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step to forecast.

    Attributes:
        config: transformers' config of the top class.
        family: of the config.
        towers: what trains.
        load: the shapes of the micro-batch.
        numbers: the dtypes it computes in.
        card: the GPU, whose speed is known.
        checkpointed: towers (vision, language) that recompute their blocks.
        fused: whether fused kernels run.
        delta: what computes the delta rule of gated delta nets.
    """

    config: Any
    family: Family
    towers: Towers
    load: Load
    numbers: Numbers
    card: Card
    checkpointed: Collection[str] = ()
    fused: bool = True
    delta: Delta = "fla"

    def whole(self) -> Forecast:
        """Forecast the step from the whole model. It takes about 15 seconds for 28 layers and 32 blocks."""
        batch, traffic = self._run(self.config, self.towers)
        return self._forecast(batch, traffic.costs, traffic.reads, traffic.peak)

    def quick(self) -> Forecast:
        """Forecast the step from models of a few blocks (`vlft.model.depth`), without its peak memory."""
        costs: dict[tuple[Phase, str], Cost] = {}
        reads = 0
        for small in depth.small_models(self.family.sizes(self.config), self.towers):
            config = self.family.with_blocks(self.config, vision=small.vision, language=small.language)
            batch, traffic = self._run(config, small_towers(self.towers, vision=small.vision, language=small.language))
            reads += small.weight * traffic.reads
            for place, cost in traffic.costs.items():
                costs.setdefault(place, Cost()).add(cost, times=small.weight)
        return self._forecast(batch, costs, reads, None)

    def _run(self, config: Any, towers: Towers) -> tuple[dict[str, Any], Traffic]:
        """Run the step: forward, backward, clipping, AdamW. Returns its batch and its counts."""
        with traced.step(
            config,
            self.family,
            towers,
            numbers=self.numbers,
            device="cuda",
            fused=self.fused,
            delta=self.delta,
            checkpointed=self.checkpointed,
        ) as model:
            batch = tracing.batch_of(self.family.sizes(config).vision, self.load)
            weights = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, fused=True)
            for weight in weights:  # its states exist from the second step on
                weight.grad = torch.zeros_like(weight)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            rank = self.towers.lora_rank if self.towers.has_lora else None
            traffic = Traffic(model, card=self.card, rank=rank, squares=_squares(batch, self.load))
            states = [value for state in optimizer.state.values() for value in state.values()]
            held = (*model.parameters(), *model.buffers(), *batch.values(), *states)
            traffic.start(value for value in held if isinstance(value, torch.Tensor))
            with tracing.Watch(traffic), traffic.modules():
                with tracing.autocast("cuda", self.numbers.autocast):
                    losses = [model(**batch).loss * (1.0 / max(1, self.load.supervised))]
                traffic.phase = "backward"
                tracing.backward(losses.pop(), traffic.backward_of)
                traffic.phase = "optimizer"
                torch.nn.utils.clip_grad_norm_(weights, MAX_NORM)
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return batch, traffic

    def _forecast(
        self, batch: dict[str, Any], costs: dict[tuple[Phase, str], Cost], reads: int, peak: int | None
    ) -> Forecast:
        whole = Cost()
        for cost in costs.values():
            whole.add(cost)
        required = required_flops(
            self.family.sizes(self.config),
            self.towers,
            lengths=self.load.lengths,
            vision_lengths=self.load.vision_lengths,
            window_lengths=batch["vision_meta"].get("window_lengths"),
            supervised=self.load.supervised,
            key_lengths=self.load.key_lengths or None,
        )
        return Forecast(
            load=self.load,
            whole=whole,
            parts=costs,
            reads=reads,
            peak=peak,
            required=total(required),
            card=self.card,
        )


def _squares(batch: dict[str, Any], load: Load) -> dict[tuple[int, int], Squares]:
    """The lengths of each attention call of the batch, by its tokens and number of segments."""
    found = {}
    windows = batch["vision_meta"].get("window_lengths")
    for lengths in (batch["vision_lengths"], *([windows] if windows else [])):
        found[sum(lengths), len(lengths)] = Squares(total=sum(n * n for n in lengths), causal=False)
    # The last query sees all keys of its segment, the one before it one less, and so on.
    pairs = zip(load.lengths, load.key_lengths or load.lengths, strict=True)
    found[load.tokens, len(load.lengths)] = Squares(total=sum(n * (2 * keys - n) for n, keys in pairs), causal=True)
    return found
