"""Sizes of a model as plain numbers, independent of the keys of its config.json.

This is the only module that reads or writes sizes in a config. `VisionNames` and `TextNames` hold the keys of a family;
all other code (LoRA counts, operations, memory, attention, plan, bench) uses `Sizes`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, Literal

from vlft.errors import CheckpointError

#: Role of a linear layer in a block: `in` computes query, key and value from the block's input, `out` projects the
#: result of attention, and `mlp` is any other layer.
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
        mergers: number of mergers; each computes features of every merged patch.
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
    mergers: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def pixels(self) -> int:
        """Number of values in a patch."""
        return self.channels * self.temporal * self.patch**2

    @property
    def cell(self) -> int:
        """Number of patches in a merged patch."""
        return self.merge**2

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
class Layer:
    """One layer of the language model: softmax attention over the whole sample, and a gated MLP.

    Attributes:
        inner: channels inside the MLP.
    """

    inner: int


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """The language model.

    Attributes:
        width: channels of a token between layers.
        layers: its layers, in order.
        heads: number of query heads.
        kv_heads: number of key and value heads.
        head_dim: channels of a head; may differ from `width / heads`.
        vocab: rows of the embedding and of the head.
        tied: whether the head is the embedding.
        max_positions: tokens of the longest sample that it supports.
    """

    width: int
    layers: tuple[Layer, ...]
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    max_positions: int

    def linears(self, layer: Layer) -> tuple[Linear, ...]:
        """Linear layers of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes: tuple[tuple[int, int, Role], ...] = (
            (self.width, queries, "in"),
            (self.width, keys, "in"),
            (self.width, keys, "in"),
            (queries, self.width, "out"),
            (self.width, layer.inner, "mlp"),
            (self.width, layer.inner, "mlp"),
            (layer.inner, self.width, "mlp"),
        )
        return tuple(Linear(inputs=inputs, outputs=outputs, role=role) for inputs, outputs, role in sizes)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """All sizes of a model."""

    vision: VisionSizes
    text: TextSizes

    @property
    def consistent(self) -> bool:
        """Whether channels divide into heads, and heads into groups."""
        vision, text = self.vision, self.text
        return vision.width % vision.heads == 0 and text.width % text.heads == 0 and text.heads % text.kv_heads == 0


@dataclass(frozen=True, kw_only=True)
class VisionNames:
    """The keys of `VisionSizes` in `vision_config`. Defaults are the keys that Qwen's families share.

    Attributes:
        inner: None if the config has `inner_ratio` instead, the ratio of inner channels to width.
        mlp_linears: the number itself, since no config has a key for it.
        more_mergers: key of a list with one entry for each merger after the first; None with a single merger.
    """

    width: str
    out: str
    inner: str | None = None
    inner_ratio: str = "mlp_ratio"
    mlp_linears: int = 2
    more_mergers: str | None = None
    depth: str = "depth"
    heads: str = "num_heads"
    channels: str = "in_channels"
    patch: str = "patch_size"
    merge: str = "spatial_merge_size"
    temporal: str = "temporal_patch_size"

    @property
    def keys(self) -> frozenset[str]:
        """Every key that `read_sizes` reads."""
        other = {"mlp_linears", "inner", "inner_ratio"}
        return frozenset({getattr(self, f.name) for f in fields(self) if f.name not in other} - {None}) | {
            self.inner or self.inner_ratio
        }


@dataclass(frozen=True, kw_only=True)
class TextNames:
    """The keys of `TextSizes` in `text_config`.

    Attributes:
        head_dim: None if a head has width / heads channels.
        layer_kinds: key of a list with one entry per layer; it is shortened together with the layers.
    """

    width: str = "hidden_size"
    inner: str = "intermediate_size"
    depth: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str | None = None
    vocab: str = "vocab_size"
    max_positions: str = "max_position_embeddings"
    layer_kinds: str = "layer_types"

    @property
    def keys(self) -> frozenset[str]:
        """Every key that `read_sizes` reads."""
        return frozenset({getattr(self, f.name) for f in fields(self) if f.name != "layer_kinds"} - {None})


def read_sizes(config: Any, vision_names: VisionNames, text_names: TextNames) -> Sizes:
    """The sizes of a model, from transformers' config of the top class.

    Raises:
        CheckpointError: a size is not a whole number of at least 1.
    """
    v, t = vision_names, text_names
    vision, text = _Reader(config, "vision_config"), _Reader(config, "text_config")
    width, heads = text[t.width], text[t.heads]
    return Sizes(
        vision=VisionSizes(
            depth=vision[v.depth],
            width=vision[v.width],
            inner=vision[v.inner] if v.inner else int(vision[v.width] * vision.raw(v.inner_ratio)),
            mlp_linears=v.mlp_linears,
            heads=vision[v.heads],
            out=vision[v.out],
            channels=vision[v.channels],
            patch=vision[v.patch],
            merge=vision[v.merge],
            temporal=vision[v.temporal],
            mergers=1 + (len(vision.raw(v.more_mergers)) if v.more_mergers else 0),
        ),
        text=TextSizes(
            width=width,
            layers=tuple(Layer(inner=text[t.inner]) for _ in range(text[t.depth])),
            heads=heads,
            kv_heads=text[t.kv_heads],
            head_dim=text[t.head_dim] if t.head_dim else width // heads,
            vocab=text[t.vocab],
            tied=bool(config.tie_word_embeddings),
            max_positions=text[t.max_positions],
        ),
    )


class _Reader:
    """Reads and checks the values of one part of a config."""

    def __init__(self, config: Any, part: str) -> None:
        self._part, self._values = part, getattr(config, part)
        self._where = getattr(config, "_name_or_path", None) or "the model"

    def raw(self, name: str) -> Any:
        return getattr(self._values, name)

    def __getitem__(self, name: str) -> int:
        value = self.raw(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(
                f"{self._where}: {name} in the {self._part} of its config.json is {value!r}, expected a whole number "
                "of at least 1. Download the model again."
            )
        return value


def with_depth(config: Any, blocks: int, vision_names: VisionNames, text_names: TextNames) -> Any:
    """A copy of a config with at most this number of blocks in each of the two towers."""
    small = copy.deepcopy(config)
    setattr(small.vision_config, vision_names.depth, blocks)
    setattr(small.text_config, text_names.depth, blocks)
    if (kinds := getattr(small.text_config, text_names.layer_kinds, None)) is not None:
        setattr(small.text_config, text_names.layer_kinds, kinds[:blocks])
    return small


def attention_configs(config: Any, tower: str) -> tuple[Any, ...]:
    """The parts of a config that set the attention function of a tower ("vision" or "language")."""
    return (config.vision_config,) if tower == "vision" else (config, config.text_config)


# ---- config.json as a dict


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config.json ties the head to the embedding. Flat and nested configs differ in where the key is."""
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config.json for a model whose head is not its embedding."""
    changed = {**config, "tie_word_embeddings": False}
    if "tie_word_embeddings" in (text := config.get("text_config") or {}):
        changed["text_config"] = {**text, "tie_word_embeddings": False}
    return changed


#: Key of a part -> the value that transformers gives it if a file leaves it out.
_LEFT_OUT: Mapping[str, Mapping[str, Any]] = {"vision_config": {"in_channels": 3}, "text_config": {}}


def plain_config(
    found: Mapping[str, Any], vision_names: VisionNames, text_names: TextNames, *, where: str
) -> SimpleNamespace | None:
    """A config.json as an object that `read_sizes` reads; None if it lacks a size, or a size is not a number."""
    text, vision = found.get("text_config", found), found.get("vision_config")  # older files are flat
    if not isinstance(text, dict) or not isinstance(vision, dict) or "tie_word_embeddings" not in found:
        return None
    parts = {"vision_config": (vision, vision_names.keys), "text_config": (text, text_names.keys)}
    made = {}
    for part, (values, keys) in parts.items():
        whole = {**_LEFT_OUT[part], **values}
        if not all(isinstance(whole.get(key), int | float | list) for key in keys):
            return None
        made[part] = SimpleNamespace(**whole)
    return SimpleNamespace(_name_or_path=where, tie_word_embeddings=found["tie_word_embeddings"], **made)
