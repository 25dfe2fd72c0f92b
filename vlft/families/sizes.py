"""Sizes of a model as plain numbers, independent of the keys of its config.json.

`vlft.families.configs` reads them from a config. All other code (LoRA counts, operations, memory, attention, plan,
bench) uses `Sizes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

#: Role of a linear layer in a block: `in` computes query, key, value and gates from the block's input, `out` projects
#: the result of attention, and `mlp` is any other layer.
Role = Literal["in", "out", "mlp"]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A linear layer of a block.

    Attributes:
        inputs: number of input channels.
        outputs: number of output channels.
        role: what it does in the block.
    """

    inputs: int
    outputs: int
    role: Role


@dataclass(frozen=True, kw_only=True)
class VisionSizes:
    """The vision tower and its mergers.

    Attributes:
        depth: number of blocks.
        width: channels of a patch between blocks.
        inner: channels inside a block's MLP.
        mlp_linears: number of linear layers in that MLP, 3 if it is gated.
        heads: number of attention heads.
        out: channels of a merged patch, equal to those of a token.
        channels: number of colours.
        patch: side of a patch in pixels.
        merge: side of a merged patch in patches.
        temporal: frames of a patch.
        deepstack: blocks whose output a merger of its own maps to features for the first language layers.
        window: side of an attention window in merged patches; None: every block attends within a whole time step.
        full_blocks: with windows, the blocks that attend within a whole time step.
        positions: side of the learnt grid of positions, which is interpolated; None: rotary positions only.
        tokens_per_second: positions that one second of video takes; None: one position per time step.
    """

    depth: int
    width: int
    inner: int
    mlp_linears: int
    heads: int
    out: int
    channels: int
    patch: int
    merge: int
    temporal: int
    deepstack: tuple[int, ...] = ()
    window: int | None = None
    full_blocks: tuple[int, ...] = ()
    positions: int | None = None
    tokens_per_second: int | None = None

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def mergers(self) -> int:
        """Number of mergers. Each computes features of every merged patch."""
        return 1 + len(self.deepstack)

    @property
    def pixels(self) -> int:
        """Number of values in a patch."""
        return self.channels * self.temporal * self.patch**2

    @property
    def cell(self) -> int:
        """Number of patches in a merged patch."""
        return self.merge**2

    def full_windows(self, lengths: Sequence[int]) -> tuple[int, ...]:
        """Patches of each window, if all windows are full except one at the end of each segment; () without windows.

        Args:
            lengths: patches of each segment.
        """
        if self.window is None:
            return ()
        full = self.window**2 * self.cell
        return tuple(min(full, length - start) for length in lengths for start in range(0, length, full))

    @property
    def block(self) -> tuple[Linear, ...]:
        """Linear layers of one block. Query, key and value are one layer."""
        width, inner = self.width, self.inner
        into = Linear(inputs=width, outputs=inner, role="mlp")
        return (
            Linear(inputs=width, outputs=3 * width, role="in"),
            Linear(inputs=width, outputs=width, role="out"),
            *(into for _ in range(self.mlp_linears - 1)),
            Linear(inputs=inner, outputs=width, role="mlp"),
        )

    @property
    def merger(self) -> tuple[Linear, ...]:
        """Linear layers of one merger."""
        wide = self.width * self.cell
        return (
            Linear(inputs=wide, outputs=wide, role="mlp"),
            Linear(inputs=wide, outputs=self.out, role="mlp"),
        )


@dataclass(frozen=True, kw_only=True)
class Recurrent:
    """The gated delta net of a layer, in place of softmax attention. Its state does not grow with the sample.

    Attributes:
        key_heads: number of query heads, and of key heads.
        value_heads: number of value heads, a multiple of `key_heads`.
        key_dim: channels of a query or key head.
        value_dim: channels of a value head.
        taps: tokens that its convolution sees.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def keys(self) -> int:
        """Channels of all keys, and of all queries."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Channels of all values."""
        return self.value_heads * self.value_dim


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The gated MLPs of a layer; a router chooses some of them for each token.

    Attributes:
        count: number of experts.
        active: number of experts that compute a token.
        inner: channels inside one expert.
        shared: channels inside the expert that computes every token; 0 if there is none.
    """

    count: int
    active: int
    inner: int
    shared: int = 0


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of the language model: it mixes tokens, and then a gated MLP maps each of them.

    Attributes:
        inner: channels inside the MLP; 0 with experts.
        recurrent: its gated delta net; None: softmax attention over the whole sample.
        experts: in place of a single MLP.
    """

    inner: int
    recurrent: Recurrent | None = None
    experts: Experts | None = None


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """The language model.

    Attributes:
        width: channels of a token between layers.
        layers: its layers, in order.
        heads: number of query heads.
        kv_heads: number of key and value heads.
        head_dim: channels of a head; may differ from `width / heads`.
        query_gate: whether the query's linear layer also computes a gate for the result of attention.
        partial_rotary: whether rotary embedding leaves some channels of a head as they are.
        vocab: rows of the embedding and of the head.
        tied: whether the head is the embedding.
        max_positions: tokens of the longest sample that it supports.
    """

    width: int
    layers: tuple[Layer, ...]
    heads: int
    kv_heads: int
    head_dim: int
    query_gate: bool = False
    partial_rotary: bool = False
    vocab: int
    tied: bool
    max_positions: int

    def linears(self, layer: Layer) -> tuple[Linear, ...]:
        """Linear layers of one layer, without the experts that a router chooses from and without routers."""
        width = self.width
        if (delta := layer.recurrent) is not None:
            into: tuple[int, ...] = (2 * delta.keys + delta.values, delta.values, delta.value_heads, delta.value_heads)
            result = delta.values
        else:
            result, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
            into = (result * (2 if self.query_gate else 1), keys, keys)
        inner = layer.experts.shared if layer.experts else layer.inner
        mlp = ((width, inner), (width, inner), (inner, width)) if inner else ()
        return (
            *(Linear(inputs=width, outputs=outputs, role="in") for outputs in into),
            Linear(inputs=result, outputs=width, role="out"),
            *(Linear(inputs=inputs, outputs=outputs, role="mlp") for inputs, outputs in mlp),
        )


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All sizes of a model."""

    vision: VisionSizes
    text: TextSizes

    @property
    def consistent(self) -> bool:
        """Whether the ViT's channels divide into heads, and query heads into groups."""
        vision, text = self.vision, self.text
        return vision.width % vision.heads == 0 and text.heads % text.kv_heads == 0
