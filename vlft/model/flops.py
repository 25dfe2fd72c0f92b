"""Floating-point operations of a training step: its matmuls, forward and backward, computed from config and lengths.

Only required work counts, as MFU needs it: neither recomputation under gradient checkpointing nor attention scores
that the causal mask removes. Of experts, only those that compute a token count. A gated delta net counts as its
definition has it, token by token: three products of a vector and the state. Kernels do more, because they work on
chunks of tokens. A multiply-add counts as two operations. Norms, activations, rotations and interpolated positions are
ignored, as is usual.

Letters: T tokens, S tokens of one sample or patches of one ViT segment, P patches, N merged patches, K supervised rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from vlft.families import Layer, Linear, Recurrent, Sizes
from vlft.model.chosen import backward_of, outside_of_blocks
from vlft.model.towers import Mode, Towers

Attention = Literal["causal", "full"]


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of one part, in one micro-batch."""

    forward: float = 0
    backward: float = 0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(forward=self.forward + other.forward, backward=self.backward + other.backward)


def required_flops(
    sizes: Sizes,
    towers: Towers,
    *,
    lengths: Sequence[int],
    vision_lengths: Sequence[int],
    window_lengths: Sequence[int] | None = None,
    supervised: int,
    key_lengths: Sequence[int] | None = None,
    attention: Attention = "causal",
) -> dict[str, Flops]:
    """Operations of a flat batch.

    Args:
        sizes: of the model.
        towers: what trains; the backward pass stops below the lowest trained parameter.
        lengths: tokens of each sample; with branches, of each segment of queries.
        vision_lengths: patches of each ViT segment (one per still, one per time step of a video); empty for none.
        window_lengths: patches of each window, for a ViT with windows. None: not known, and assumed to be full except
            for one per segment, which is an upper bound: at the edges of a picture windows are smaller.
        supervised: K.
        key_lengths: with branches, the keys of each segment (`branches` of a batch); None: as `lengths`.
        attention: "causal" counts half of a sample's S x S scores, and each once; "full" counts them all, and once more
            in backward, where flash kernels recompute them. torch's FlopCounterMode counts "full" (2.15).

    Returns:
        part -> operations, for vision, merger, language (its layers) and head (part of the language tower).
    """
    text, vision = sizes.text, sizes.vision
    below_merger = towers.vision != "frozen"  # the merger's input needs a gradient
    patches, tokens = sum(vision_lengths), sum(lengths)
    merged = patches // vision.cell
    everything = towers.lora_target == "all"

    def linear(rows: int, size: tuple[int, int], mode: Mode, *, gradient: bool, adapted: bool = True) -> Flops:
        rank = towers.lora_rank if mode == "lora" and adapted else 0
        return _linear(rows, *size, trained=mode == "full", rank=rank, gradient=gradient, dora=towers.use_dora)

    def block(rows: int, layers: Sequence[Linear], mode: Mode, *, entry: bool, within: bool) -> Flops:
        """Linear layers of a block. `entry`: its input needs a gradient; `within`: its inner activations need one."""
        found = Flops()
        for one in layers:
            gradient = entry if one.role == "in" else within
            adapted = everything or one.role != "mlp"
            found += linear(rows, (one.inputs, one.outputs), mode, gradient=gradient, adapted=adapted)
        return found

    again = attention == "full"
    windows = vision.full_windows(vision_lengths) if window_lengths is None else window_lengths
    pixels = (vision.pixels, vision.width)
    parts = {"vision": linear(patches, pixels, outside_of_blocks(towers, "vision"), gradient=False, adapted=False)}
    for place in range(vision.depth):
        mode, entry, within = backward_of(towers, "vision", place)
        parts["vision"] += block(patches, vision.block, mode, entry=entry, within=within)
        segments = vision_lengths if vision.window is None or place in vision.full_blocks else windows
        parts["vision"] += _attention(segments, segments, vision.width, within, causal=False, again=again)

    mode = towers.merger
    parts["merger"] = Flops()
    for _ in range(vision.mergers):
        for place, one in enumerate(vision.merger):
            gradient = below_merger or mode == "full" or (mode == "lora" and place > 0)
            parts["merger"] += linear(merged, (one.inputs, one.outputs), mode, gradient=gradient)

    parts["language"] = Flops()
    width = text.heads * text.head_dim
    for place, layer in enumerate(text.layers):
        mode, entry, within = backward_of(towers, "language", place)
        parts["language"] += block(tokens, text.linears(layer), mode, entry=entry, within=within)
        for rows, size in _of_experts(layer, tokens, text.width):
            parts["language"] += linear(rows, size, mode, gradient=within, adapted=False)
        if layer.recurrent is None:
            keys, causal = key_lengths or lengths, attention == "causal"
            parts["language"] += _attention(lengths, keys, width, within, causal=causal, again=again)
        else:
            parts["language"] += _delta_rule(layer.recurrent, tokens, within, trained=mode == "full")
    mode = outside_of_blocks(towers, "language")
    parts["head"] = linear(supervised, (text.width, text.vocab), mode, gradient=True, adapted=False)
    return parts


def total(parts: dict[str, Flops]) -> float:
    """All operations of a micro-batch."""
    return sum(part.total for part in parts.values())


def _linear(
    rows: int, inputs: int, outputs: int, *, trained: bool, rank: int, gradient: bool, dora: bool = False
) -> Flops:
    """A linear layer and its LoRA matrices.

    Args:
        rows: rows of its input.
        inputs: channels of its input.
        outputs: channels of its output.
        trained: whether its weight needs a gradient.
        rank: of its LoRA matrices, 0 for none.
        gradient: whether its input needs a gradient.
        dora: whether the adapter is DoRA's, which computes the lengths of the weight's rows once for all rows.
    """
    lengths = 2 * rank * (inputs * outputs + rank * (inputs + outputs)) if dora else 0
    dense, down, up = (2 * rows * size for size in (inputs * outputs, inputs * rank, rank * outputs))
    backward = dense * (trained + gradient) + down * (1 + gradient) + 2 * up
    return Flops(forward=dense + down + up + lengths, backward=backward)


def _attention(
    lengths: Sequence[int], key_lengths: Sequence[int], width: int, backward: bool, *, causal: bool, again: bool
) -> Flops:
    """Attention over all heads in each segment: two matmuls forward, four backward (five if `again`).

    The causal mask removes half of the scores of a segment's own tokens, and none of those of a prompt before it.
    """
    scores = sum(n * (keys - n / 2 if causal else keys) for n, keys in zip(lengths, key_lengths, strict=True))
    matmul = 2 * scores * width
    return Flops(forward=2 * matmul, backward=(5 if again else 4) * matmul * backward)


def _of_experts(layer: Layer, tokens: int, width: int) -> list[tuple[int, tuple[int, int]]]:
    """Rows and size of the matmuls of router and experts, without the linear layers of the shared expert."""
    experts = layer.experts
    if experts is None:
        return []
    chosen = tokens * experts.active
    found = [(tokens, (width, experts.count)), (chosen, (width, 2 * experts.inner)), (chosen, (experts.inner, width))]
    return [*found, (tokens, (width, 1))] if experts.shared else found


def _delta_rule(net: Recurrent, tokens: int, backward: bool, *, trained: bool) -> Flops:
    """The convolution and the state of a gated delta net, without its linear layers. The state is never trained.

    For each token and value head, the state is read by the key, written by key and value, and read by the query. Each
    of these products needs two more in backward, and the convolution one, or two if it trains.
    """
    convolved = 2 * tokens * net.taps * (2 * net.keys + net.values)
    products = 3 * 2 * tokens * net.value_heads * net.key_dim * net.value_dim
    return Flops(forward=convolved + products, backward=backward * (convolved * (1 + trained) + 2 * products))
