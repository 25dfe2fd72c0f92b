"""Access to the parts of a live model, and what each feature of its family changes in a forward pass.

This is the only module that touches the internals of transformers' vision-language models. `vlft.families` lists the
features of each family; no code here or elsewhere branches on the family itself.

Letters: those of `vlft.model.forward`; P patches, N merged patches.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlft.families import Family, Sizes

Part = Literal["vision", "language"]
PARTS: tuple[Part, ...] = ("vision", "language")

# ---- parts of the model


def bare(model: Any) -> Any:
    """The top model of transformers, without its PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def family_of(model: Any) -> Family:
    """The family of a live model."""
    return Family.of(bare(model).config.model_type)


def sizes_of(model: Any) -> Sizes:
    """The sizes of a live model."""
    return family_of(model).sizes(bare(model).config)


def tower(model: Any, part: Part) -> Any:
    """The module of a tower: the ViT with its mergers, or the language model without its head."""
    inner = bare(model).model
    return inner.visual if part == "vision" else inner.language_model


def head(model: Any) -> Any:
    """The linear layer that maps channels to logits."""
    return bare(model).lm_head


def blocks(model: Any, part: Part) -> Sequence[torch.nn.Module]:
    """The blocks of a tower, in order. Gradient checkpointing recomputes them one at a time."""
    return tower(model, part).blocks if part == "vision" else tower(model, part).layers


def mergers(model: Any) -> list[torch.nn.Module]:
    """The modules between ViT and language model. Their output enters the language model."""
    found: list[torch.nn.Module] = []
    for prefix, name in family_of(model).tower_prefixes:
        if name == "merger":
            module = bare(model).get_submodule(prefix.rstrip("."))
            found += module if isinstance(module, torch.nn.ModuleList) else [module]
    return found


def fused_norms(model: Any) -> list[torch.nn.Module]:
    """RMSNorms that a fused kernel may replace."""
    return list(_matching(model, family_of(model).fused_norms))


def fused_mlps(model: Any) -> list[torch.nn.Module]:
    """Gated MLPs whose activation and product a fused kernel may compute."""
    return list(_matching(model, family_of(model).fused_mlps))


def _matching(model: Any, pattern: str) -> Iterator[torch.nn.Module]:
    fits = re.compile(pattern).fullmatch
    return (module for name, module in bare(model).named_modules() if fits(name))


# ---- attention and checkpointing


def attend_by(model: Any, part: Part, name: str) -> None:
    """Set the attention function of a tower to one that is registered with transformers.

    transformers calls the ViT's attention once, with variable lengths, only if the name of the function contains
    "flash", and it refuses such names at load. So the model is loaded with sdpa, and the name is changed here (works on
    5.17 to 5.23).
    """
    live = bare(model)
    for config in family_of(live).attention_configs(live.config, part):
        config._attn_implementation_internal = name


def recompute(model: Any, part: Part, function: Any) -> None:
    """Call a tower's blocks through a function that recomputes them in the backward pass.

    This does not use `gradient_checkpointing_enable`, which also makes the output of the ViT's patch embedding require
    a gradient. A frozen ViT would then be recomputed and run backward (seen on transformers 5.17 and 5.23).
    """
    tower(model, part)._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)


# ---- the flat forward


@dataclass(frozen=True, kw_only=True)
class Features:
    """The result of the vision tower for a batch.

    Attributes:
        embeds_NH: features that replace the embeddings of pad tokens.
        layers_NH: with `deepstack`, one tensor for each of the first language layers, added to the layer's output.
    """

    embeds_NH: torch.Tensor
    layers_NH: tuple[torch.Tensor, ...] = ()

    def first(self, count: int) -> Features:
        """The features of the first merged patches. With `count` 0, every merger still gets a gradient of zeros."""
        return Features(
            embeds_NH=self.embeds_NH[:count], layers_NH=tuple(features[:count] for features in self.layers_NH)
        )


def install(model: Any) -> None:
    """Prepare a loaded model for the flat forward, as far as the features of its family require it."""
    if "deepstack" in family_of(model).features:
        language = tower(model, "language")
        language._deepstack_process = types.MethodType(_add_at_places, language)


def vision_features(
    model: Any,
    pixels_PX: torch.Tensor,
    *,
    grid: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
) -> Features:
    """The one vision call of a batch.

    Args:
        pixels_PX: float32, scaled.
        grid: `vision_grid` of the batch.
        positions: `vision_positions` of the batch.
        cu_seqlens: `vision_cu_seqlens` of the batch.
        lengths: `vision_lengths` of the batch. With these four the tower reads nothing back from the device.
    """
    visual = tower(model, "vision")
    out = visual(
        pixels_PX.to(visual.dtype),
        grid_thw=grid,
        position_ids=positions,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
        segment_lengths=lengths,
    )
    later = out.deepstack_features if "deepstack" in family_of(model).features else ()
    return Features(embeds_NH=out.pooler_output, layers_NH=tuple(later))


def embeddings(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """The embeddings of tokens, [1, T] -> [1, T, H]."""
    return tower(model, "language").embed_tokens(input_ids)


def hidden_states(
    model: Any,
    embeds_TH: torch.Tensor,
    features: Features,
    rows: torch.Tensor,
    *,
    position_ids: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: tuple[int, ...],
) -> torch.Tensor:
    """The language model on a flat row.

    Args:
        embeds_TH: embeddings of all tokens, with the vision features in place.
        features: what the vision tower returned.
        rows: int64 [N], places of the features in the row.
        position_ids: int64 [4, 1, T], as in a batch. Only the three rows of M-RoPE are passed on: from the fourth, the
            positions within samples, transformers would build a mask of [T, T]. Our attention uses `cu_seqlens`.

    Returns:
        hidden_TH: the last hidden states.
    """
    more: dict[str, Any] = {}
    if features.layers_NH:
        more = {"visual_pos_masks": rows, "deepstack_visual_embeds": list(features.layers_NH)}
    output = tower(model, "language")(
        inputs_embeds=embeds_TH[None],
        position_ids=position_ids[1:],
        attention_mask=None,
        use_cache=False,
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=max(lengths),
        max_length_k=max(lengths),
        segment_lengths=lengths,
        **more,
    )
    return output.last_hidden_state[0]


def _add_at_places(
    self: Any, hidden_states: torch.Tensor, visual_pos_masks: torch.Tensor, visual_embeds: torch.Tensor
) -> torch.Tensor:
    """Replaces `_deepstack_process`: also accepts places, since a mask makes the host wait for its count."""
    if visual_pos_masks.dtype == torch.bool:
        return type(self)._deepstack_process(self, hidden_states, visual_pos_masks, visual_embeds)
    return hidden_states.index_add(1, visual_pos_masks, visual_embeds[None].to(hidden_states.dtype))
