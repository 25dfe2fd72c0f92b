"""The record of a model family: its names, its features, and how its configs spell sizes.

It holds data only. `vlft.model.adapt` implements the features for a live model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

from vlft.errors import CheckpointError
from vlft.families.configs import (
    TextNames,
    VisionNames,
    attention_configs,
    patch_sizes,
    plain_config,
    plain_vision,
    read_sizes,
    with_blocks,
)
from vlft.families.layout import ParameterNames, layout
from vlft.families.sizes import Sizes

TOWERS = ("vision", "merger", "language")

#: What a model does in addition to placing vision features among the embeddings.
#: `windows`: most vision blocks attend within windows of a picture.
#: `interpolation`: a learnt grid of positions is interpolated to the size of each picture.
#: `deepstack`: features of earlier vision blocks are added to the hidden states of the first language layers.
#: `recurrent`: most language layers are gated delta nets, which carry a state along the sample.
#: `experts`: the MLPs of language layers are experts that a router chooses from. They and the router stay frozen.
Feature = Literal["windows", "interpolation", "deepstack", "recurrent", "experts"]

#: How files may store the experts of a layer. `fused`: as transformers holds them, one tensor [E, out, in] per matrix,
#: gate and up in one. `transposed`: the same as [E, in, out]. `each`: a tensor [out, in] per expert and matrix.
ExpertLayout = Literal["fused", "transposed", "each"]
#: What RMSNorms of a model multiply by.
Norm = Literal["w", "1 + w"]
#: How a model knows the time of a video's steps. See `Family.video_time`.
VideoTime = Literal["index", "seconds", "text"]
#: Who chooses the frames of a video and their size. See `Family.video_rule`.
VideoRule = Literal["qwen-vl-utils", "processor"]

LAYER = r"model\.language_model\.layers\.\d+\."
BLOCK = r"model\.visual\.blocks\.\d+\."
#: Linear layers of a language layer with softmax attention and one gated MLP.
DENSE_LAYER = LAYER + r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
ATTENTION = LAYER + r"self_attn\.(q|k|v|o)_proj"
#: RMSNorms of the language model. Some families normalise each head of query and key.
LAYER_NORMS = LAYER + r"(input_layernorm|post_attention_layernorm|self_attn\.(q|k)_norm)|model\.language_model\.norm"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A config of one size, with the keys of its family's config.json.

    Attributes:
        text: its `text_config`. Without `vocab_size` the vocabulary is as small as the tokenizer allows.
        vision: its `vision_config`.
        tied: whether the head is the embedding.
        dtype: of stored weights.
        std: standard deviation of random matrices.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    tied: bool
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    std: float = 0.02

    def but(
        self, *, text: Mapping[str, Any] | None = None, vision: Mapping[str, Any] | None = None, **more: Any
    ) -> Shape:
        """A copy with some entries of `text` and `vision`, or other attributes, replaced."""
        texts, visions = {**self.text, **(text or {})}, {**self.vision, **(vision or {})}
        return replace(self, text=texts, vision=visions, **more)


@dataclass(frozen=True, kw_only=True)
class Family:
    """One model family, with the names of transformers' modules and of published files.

    Attributes:
        model_type: its `model_type` in config.json.
        label: its name in messages.
        model_class: name of the class in transformers.
        config_class: name of the class in transformers.
        processor_class: name of the class in transformers.
        tokenizer_class: name of the class in transformers.
        image_processor_class: name of the class in transformers.
        video_processor_class: name of the class in transformers.
        vision_names: how its `vision_config` spells sizes.
        text_names: how its `text_config` spells sizes.
        parameter_names: how it names the modules that differ between families.
        tower_prefixes: (prefix of a parameter's name, tower) pairs; the first match wins.
        carried: prefixes of tensors in published files that transformers does not load, such as the heads that predict
            several tokens. They are copied into the weights that vlft writes.
        stored_experts: the layouts of experts that transformers reads for this family.
        lora_targets: tower -> linear layers that LoRA may adapt, as a full-match regex over module names.
        attention_targets: the subset of `lora_targets` for `--lora_target attention`.
        fused_norms: RMSNorms that a fused kernel may replace if it computes the same, as a full-match regex over module
            names. Linear layers, rotary embedding or experts read their results, and nothing else.
        fused_mlps: gated MLPs, likewise; None without such MLPs.
        features: the entries of `Feature` that apply.
        norm: what RMSNorms multiply by.
        video_time: how the model knows the time of a video's steps. index: positions count steps; seconds: positions
            count time; text: the time is written before each step, which has its own run of pad tokens.
        video_rule: who chooses the frames of a video and their size: qwen-vl-utils, with pixel limits per frame, or the
            model's own video processor, with pixel limits per clip.
        chat: how the published chat templates render a conversation. system: with a default system turn; bare: without
            one; thoughts: without one, answers have thoughts, and those of earlier answers are dropped.
        published: (prefix of a module name, prefix in published files) pairs; the first match wins.
        embedding: name of the parameter that maps ids to channels.
        head: name of the parameter that maps channels to ids.
        image_pad: token that is repeated once per merged patch of a picture.
        video_pad: token that is repeated once per merged patch of a video.
        vision_start: token before a picture or video.
        vision_end: token after a picture or video.
        start_of_turn: token that starts a turn; the role and a line break follow.
        end_of_turn: token that ends a turn, and is trained with an answer.
        end_of_text: token for padding, and the first token of a text in families that have one.
        control_tokens: texts that become control ids; refused in user text because they would forge turns or media.
        box_unit: unit of boxes in text: thousandths of the picture, or pixels of the resized picture.
        box_style: syntax: `<|box_start|>(x1,y1),(x2,y2)<|box_end|>` with `<|object_ref_start|>`, or JSON lists.
        pixels: (fewest, most) pixels of a picture and of a frame, from the published preprocessor_config.json.
        scaling: mean and deviation of each colour, in units of 0..1, from the same file.
        tiny: sizes of a model that trains on a laptop in seconds.
        shapes: short name -> published sizes.
    """

    model_type: str
    label: str
    model_class: str
    config_class: str
    processor_class: str
    tokenizer_class: str = "Qwen2Tokenizer"
    image_processor_class: str
    video_processor_class: str
    vision_names: VisionNames
    text_names: TextNames
    parameter_names: ParameterNames
    lora_targets: Mapping[str, str]
    attention_targets: Mapping[str, str]
    fused_norms: str = LAYER_NORMS
    fused_mlps: str | None = LAYER + "mlp"
    features: frozenset[Feature] = frozenset()
    norm: Norm = "w"
    video_time: VideoTime
    video_rule: VideoRule
    chat: Literal["system", "bare", "thoughts"] = "system"
    box_unit: Literal["0-1000", "pixels"]
    box_style: Literal["tokens", "json"]
    pixels: tuple[int, int]
    scaling: tuple[tuple[float, ...], tuple[float, ...]]
    tiny: Shape
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    carried: tuple[str, ...] = ()
    stored_experts: frozenset[ExpertLayout] = frozenset()
    published: tuple[tuple[str, str], ...] = ()
    tower_prefixes: tuple[tuple[str, str], ...] = (
        ("model.visual.merger.", "merger"),
        ("model.visual.deepstack_merger_list.", "merger"),
        ("model.visual.", "vision"),
        ("model.language_model.", "language"),
        ("lm_head.", "language"),
    )
    embedding: str = "model.language_model.embed_tokens.weight"
    head: str = "lm_head.weight"
    image_pad: str = "<|image_pad|>"
    video_pad: str = "<|video_pad|>"
    vision_start: str = "<|vision_start|>"
    vision_end: str = "<|vision_end|>"
    start_of_turn: str = "<|im_start|>"
    end_of_turn: str = "<|im_end|>"
    end_of_text: str = "<|endoftext|>"
    control_tokens: tuple[str, ...] = (
        "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
        "<|image_pad|>", "<|video_pad|>",
    )  # fmt: skip

    @staticmethod
    def of(model_type: object, *, where: str = "the model") -> Family:
        """The family of a `config.model_type`.

        Raises:
            CheckpointError: the type is missing or not supported; the message names it and the supported types.
        """
        family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
        if family is None:
            reason = f" ({REFUSED[model_type]})" if isinstance(model_type, str) and model_type in REFUSED else ""
            raise CheckpointError(
                f"{where}: model_type is {model_type!r}, not a Qwen-VL model that this version trains{reason}. "
                f"Supported: {', '.join(f'{f.label} ({t!r})' for t, f in FAMILIES.items())}. "
                "Set --model_id to such a model, e.g. Qwen/Qwen2-VL-2B-Instruct."
            )
        return family

    def sizes(self, config: Any) -> Sizes:
        """The sizes of a model of this family, from transformers' config.

        Raises:
            CheckpointError: a size is not a whole number of at least 1.
        """
        return read_sizes(config, self.vision_names, self.text_names)

    def sizes_of_shape(self, shape: Shape) -> Sizes:
        """The sizes of a shape with a vocabulary. Needs no transformers.

        Raises:
            ValueError: the shape lacks a size.
        """
        found = {"text_config": shape.text, "vision_config": shape.vision, "tie_word_embeddings": shape.tied}
        config = plain_config(found, self.vision_names, self.text_names, where=self.label)
        if config is None:
            raise ValueError(f"a shape of {self.label} lacks a size")
        return self.sizes(config)

    def plain_config(self, found: Mapping[str, Any], *, where: str) -> SimpleNamespace | None:
        """A config.json as an object with the attributes that `sizes` reads, and the ids of `config_tokens`.

        Args:
            found: the content of config.json.
            where: its folder, for messages.

        Returns:
            None if it lacks a size or an id that transformers would fill in, or if its sizes contradict each other.
        """
        config = plain_config(found, self.vision_names, self.text_names, where=where)
        if config is None or not self.sizes(config).consistent:
            return None
        for name in self.config_tokens:
            if found.get(name) is None:
                return None
            setattr(config, name, found[name])
        return config

    def layout(self, sizes: Sizes) -> dict[str, tuple[int, ...]]:
        """Name and shape of each parameter of `model_class`, without a tied head. Builds no model."""
        return layout(sizes, self.parameter_names)

    def with_blocks(self, config: Any, *, vision: Sequence[int], language: Sequence[int]) -> Any:
        """A copy of a config whose two towers have only the blocks at these places. Each block keeps its kind."""
        return with_blocks(config, vision, language, self.vision_names, self.text_names)

    def plain_patches(self, found: Mapping[str, Any]) -> dict[str, Any] | None:
        """The sizes of patches in a config.json, by their keys in processors' files; None without a vision tower."""
        vision = plain_vision(found)
        return None if vision is None else patch_sizes(vision, self.vision_names)

    @property
    def patch_sizes(self) -> dict[str, Any]:
        """The sizes of patches of all models of the family, by their keys in processors' files."""
        return patch_sizes(self.tiny.vision, self.vision_names)

    def is_of(self, model_type: object) -> bool:
        """Whether a `model_type` is that of this family."""
        return model_type == self.model_type

    def attention_configs(self, config: Any, tower: str) -> tuple[Any, ...]:
        """The parts of a config that set the attention function of a tower ("vision" or "language")."""
        return attention_configs(config, tower)

    @property
    def factor(self) -> int:
        """Side of a merged patch in pixels. The sides of resized pictures are multiples of it."""
        vision, names = self.tiny.vision, self.vision_names
        return vision[names.patch] * vision[names.merge]

    @property
    def ends(self) -> tuple[str, str]:
        """Names of embedding and head, which are one parameter in a tied model."""
        return self.embedding, self.head

    @property
    def config_tokens(self) -> dict[str, str]:
        """Key of config.json -> the token whose id it holds."""
        return {
            "image_token_id": self.image_pad,
            "video_token_id": self.video_pad,
            "vision_start_token_id": self.vision_start,
            "vision_end_token_id": self.vision_end,
        }

    def tower_of(self, parameter: str) -> str:
        """The tower (`vision`, `merger` or `language`) a parameter or module name of transformers belongs to.

        Raises:
            KeyError: it belongs to no tower.
        """
        for prefix, tower in self.tower_prefixes:
            if parameter.startswith(prefix):
                return tower
        raise KeyError(f"{parameter!r} belongs to no tower of {self.label}")

    def published_name(self, parameter: str) -> str:
        """The name a parameter has in published weight files (`model.visual.x` -> `visual.x`)."""
        for ours, theirs in self.published:
            if parameter.startswith(ours):
                return theirs + parameter[len(ours) :]
        return parameter


#: model_type -> family. `vlft.families` fills it.
FAMILIES: dict[str, Family] = {}
#: model_type -> why vlft does not train it. `vlft.families` fills it.
REFUSED: dict[str, str] = {}


def sizes_of(config: Any) -> Sizes:
    """The sizes of a model, from transformers' config and its `model_type`.

    Raises:
        CheckpointError: the family is not supported, or a size is not a whole number of at least 1.
    """
    return Family.of(config.model_type).sizes(config)
