"""Read the sizes of a model from its config. This is the only module that reads or writes sizes in a config.

`VisionNames` and `TextNames` hold the keys of a family.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, NoReturn

from vlft.errors import CheckpointError
from vlft.families.sizes import Experts, Layer, Recurrent, Sizes, TextSizes, VisionSizes


@dataclass(frozen=True, kw_only=True)
class VisionNames:
    """The keys of `VisionSizes` in `vision_config`. Defaults are the keys that Qwen's families share.

    Attributes:
        inner: None if the config has `inner_ratio` instead, the ratio of inner channels to width.
        mlp_linears: the number itself, since no config has a key for it.
        deepstack: key of the list of blocks with a merger of their own; None without such blocks.
        window: key of the side of a window in pixels; None without windows.
        full_blocks: key of the list of blocks without windows.
        positions: key of the number of learnt positions; None without such positions.
        tokens_per_second: None if positions do not depend on time.
    """

    width: str
    out: str
    inner: str | None = None
    inner_ratio: str = "mlp_ratio"
    mlp_linears: int = 2
    deepstack: str | None = None
    window: str | None = None
    full_blocks: str = "fullatt_block_indexes"
    positions: str | None = None
    tokens_per_second: str | None = None
    depth: str = "depth"
    heads: str = "num_heads"
    channels: str = "in_channels"
    patch: str = "patch_size"
    merge: str = "spatial_merge_size"
    temporal: str = "temporal_patch_size"

    @property
    def keys(self) -> frozenset[str]:
        """Every key that `read_sizes` reads."""
        other = {"mlp_linears", "inner", "inner_ratio", *(() if self.window else ("full_blocks",))}
        return frozenset({getattr(self, f.name) for f in fields(self) if f.name not in other} - {None}) | {
            self.inner or self.inner_ratio
        }


@dataclass(frozen=True, kw_only=True)
class TextNames:
    """The keys of `TextSizes` in `text_config`.

    Attributes:
        inner: None if every layer has experts.
        head_dim: None if a head has width / heads channels.
        layer_kinds: key of a list with one entry per layer; it is shortened together with the layers.
        recurrent: whether the layers that this list calls `linear_attention` are gated delta nets.
        query_gate: whether the query's linear layer also computes a gate, since no config has a key for it.
        partial_rotary: whether rotary embedding leaves some channels of a head as they are.
        experts: key of the number of experts; None without experts.
        shared_expert: key of the channels of the shared expert; None without one.
        dense_layers: key of the list of layers without experts; None: all layers have them.
    """

    width: str = "hidden_size"
    inner: str | None = "intermediate_size"
    depth: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = "num_key_value_heads"
    head_dim: str | None = None
    vocab: str = "vocab_size"
    max_positions: str = "max_position_embeddings"
    layer_kinds: str = "layer_types"
    recurrent: bool = False
    query_gate: bool = False
    partial_rotary: bool = False
    experts: str | None = None
    shared_expert: str | None = None
    dense_layers: str | None = None

    @property
    def keys(self) -> frozenset[str]:
        """Every key that `read_sizes` reads."""
        other = {"recurrent", "query_gate", "partial_rotary", *(() if self.recurrent else ("layer_kinds",))}
        found = {getattr(self, f.name) for f in fields(self) if f.name not in other} - {None}
        return frozenset(found | ({*_RECURRENT.values()} if self.recurrent else set()) | self._of_experts)

    @property
    def _of_experts(self) -> set[str]:
        return {_ACTIVE, _EXPERT_INNER} if self.experts else set()


#: Attribute of `Recurrent` -> its key in `text_config`.
_RECURRENT = {
    "key_heads": "linear_num_key_heads",
    "value_heads": "linear_num_value_heads",
    "key_dim": "linear_key_head_dim",
    "value_dim": "linear_value_head_dim",
    "taps": "linear_conv_kernel_dim",
}
_ACTIVE, _EXPERT_INNER = "num_experts_per_tok", "moe_intermediate_size"


def read_sizes(config: Any, vision_names: VisionNames, text_names: TextNames) -> Sizes:
    """The sizes of a model, from transformers' config of the top class.

    Raises:
        CheckpointError: a size is not a whole number of at least 1.
    """
    v, t = vision_names, text_names
    vision, text = _Reader(config, "vision_config"), _Reader(config, "text_config")
    width, heads = text[t.width], text[t.heads]
    patch, merge = vision[v.patch], vision[v.merge]
    return Sizes(
        vision=VisionSizes(
            depth=vision[v.depth],
            width=vision[v.width],
            inner=vision[v.inner] if v.inner else int(vision[v.width] * vision.raw(v.inner_ratio)),
            mlp_linears=v.mlp_linears,
            heads=vision[v.heads],
            out=vision[v.out],
            channels=vision[v.channels],
            patch=patch,
            merge=merge,
            temporal=vision[v.temporal],
            deepstack=tuple(vision.raw(v.deepstack)) if v.deepstack else (),
            window=vision[v.window] // merge // patch if v.window else None,
            full_blocks=tuple(vision.raw(v.full_blocks)) if v.window else (),
            positions=math.isqrt(vision[v.positions]) if v.positions else None,
            tokens_per_second=vision[v.tokens_per_second] if v.tokens_per_second else None,
        ),
        text=TextSizes(
            width=width,
            layers=_layers(text, t),
            heads=heads,
            kv_heads=text[t.kv_heads],
            head_dim=text[t.head_dim] if t.head_dim else width // heads,
            query_gate=t.query_gate,
            partial_rotary=t.partial_rotary,
            vocab=text[t.vocab],
            tied=bool(config.tie_word_embeddings),
            max_positions=text[t.max_positions],
        ),
    )


def _layers(text: _Reader, names: TextNames) -> tuple[Layer, ...]:
    """The layers of a language model."""
    depth = text[names.depth]
    kinds = text.raw(names.layer_kinds) if names.recurrent else ["full_attention"] * depth
    if len(kinds) != depth:
        text.refuse(names.layer_kinds, f"a list of {depth} entries, one per layer")
    net = Recurrent(**{name: text[key] for name, key in _RECURRENT.items()}) if names.recurrent else None
    experts = None
    if names.experts:
        experts = Experts(
            count=text[names.experts],
            active=text[_ACTIVE],
            inner=text[_EXPERT_INNER],
            shared=text[names.shared_expert] if names.shared_expert else 0,
        )
    dense = (text.raw(names.dense_layers) or ()) if names.dense_layers else () if experts else range(depth)
    found = []
    for place, kind in enumerate(kinds):
        inner = text[names.inner] if place in dense and names.inner else 0
        recurrent = net if kind == "linear_attention" else None
        found.append(Layer(inner=inner, recurrent=recurrent, experts=None if place in dense else experts))
    return tuple(found)


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
            self.refuse(name, "a whole number of at least 1")
        return value

    def refuse(self, name: str, expected: str) -> NoReturn:
        """Refuse a value.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"{self._where}: {name} in the {self._part} of its config.json is {self.raw(name)!r}, expected {expected}. "
            "Download the model again."
        )


def with_blocks(
    config: Any, vision: Sequence[int], language: Sequence[int], vision_names: VisionNames, text_names: TextNames
) -> Any:
    """A copy of a config whose two towers have only the blocks at these places. Each block keeps its kind."""
    small = copy.deepcopy(config)
    visual, text = small.vision_config, small.text_config
    places = {vision_names.deepstack, vision_names.full_blocks if vision_names.window else None}
    for part, key, kept in (
        *((visual, key, vision) for key in places if key),
        *((text, key, language) for key in (text_names.dense_layers,) if key),
    ):
        there = getattr(part, key) or ()
        setattr(part, key, [new for new, old in enumerate(kept) if old in there])
    setattr(visual, vision_names.depth, len(vision))
    setattr(text, text_names.depth, len(language))
    if (kinds := getattr(text, text_names.layer_kinds, None)) is not None:
        setattr(text, text_names.layer_kinds, [kinds[place] for place in language])
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


def patch_sizes(vision: Mapping[str, Any], names: VisionNames) -> dict[str, Any]:
    """The sizes of patches in a `vision_config`, by their keys in the files of processors."""
    keys = {"patch_size": names.patch, "temporal_patch_size": names.temporal, "merge_size": names.merge}
    return {ours: vision[theirs] for ours, theirs in keys.items() if theirs in vision}


def plain_vision(found: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The `vision_config` of a config.json; None if it has none, as that of a text model."""
    vision = found.get("vision_config")
    return vision if isinstance(vision, dict) else None


#: Key of a part -> the value that transformers gives it if a file leaves it out.
_LEFT_OUT: Mapping[str, Mapping[str, Any]] = {"vision_config": {"in_channels": 3}, "text_config": {}}
#: One of so many layers has softmax attention if a file does not list the kinds of layers (transformers 5.17 to 5.23).
_INTERVAL = 4


def plain_config(
    found: Mapping[str, Any], vision_names: VisionNames, text_names: TextNames, *, where: str
) -> SimpleNamespace | None:
    """A config.json as an object that `read_sizes` reads; None if it lacks a size, or a size is not a number."""
    text, vision = found.get("text_config", found), found.get("vision_config")  # older files are flat
    if not isinstance(text, dict) or not isinstance(vision, dict) or "tie_word_embeddings" not in found:
        return None
    if text.get("tie_word_embeddings") and not found["tie_word_embeddings"]:
        return None  # which of the two counts differs between families (transformers 5.17 to 5.23)
    parts = {
        "vision_config": (vision, vision_names.keys),
        "text_config": (_with_kinds(text, text_names), text_names.keys),
    }
    made = {}
    for part, (values, keys) in parts.items():
        whole = {**_LEFT_OUT[part], **values}
        if not all(isinstance(whole.get(key), int | float | list) for key in keys):
            return None
        made[part] = SimpleNamespace(**whole)
    return SimpleNamespace(_name_or_path=where, tie_word_embeddings=found["tie_word_embeddings"], **made)


#: Key that transformers writes for Qwen3-VL-MoE -> the key in the published files, which is also the attribute.
_WRITTEN = {"num_local_experts": "num_experts"}


def _with_kinds(text: Mapping[str, Any], names: TextNames) -> dict[str, Any]:
    """The text config with the lists that transformers derives if a file leaves them out or has null."""
    text = {_WRITTEN.get(key, key): value for key, value in text.items()}
    whole, depth, interval = dict(text), text.get(names.depth), text.get("full_attention_interval", _INTERVAL)
    if (
        names.recurrent
        and whole.get(names.layer_kinds) is None
        and isinstance(depth, int)
        and isinstance(interval, int)
    ):
        full = set(range(interval - 1, depth, interval)) if interval > 0 else set()
        whole[names.layer_kinds] = ["full_attention" if n in full else "linear_attention" for n in range(depth)]
    if names.dense_layers and whole.get(names.dense_layers) is None:
        whole[names.dense_layers] = []
    return whole
