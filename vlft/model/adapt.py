"""Where a live model keeps its parts, and what each feature word of its family means for a forward pass.

The only module that touches the insides of transformers' vision-language models. `vlft.families` has the words;
nothing here or elsewhere asks which family a model is of.

Letters as in `vlft.model.forward`; P patches, N merged patches.
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

# ---- where things are


def bare(model: Any) -> Any:
    """The top model of transformers, without PEFT around it."""
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
    """The blocks of a tower, in order; what gradient checkpointing recomputes one at a time."""
    return tower(model, part).blocks if part == "vision" else tower(model, part).layers


def mergers(model: Any) -> list[torch.nn.Module]:
    """The modules between ViT and language model, whose output the latter takes."""
    found: list[torch.nn.Module] = []
    for prefix, name in family_of(model).tower_prefixes:
        if name == "merger":
            module = bare(model).get_submodule(prefix.rstrip("."))
            found += module if isinstance(module, torch.nn.ModuleList) else [module]
    return found


def fused_norms(model: Any) -> list[torch.nn.Module]:
    """RMSNorms that a fused kernel may stand in for."""
    return list(_matching(model, family_of(model).fused_norms))


def fused_mlps(model: Any) -> list[torch.nn.Module]:
    """Gated MLPs whose activation and product a fused kernel may make."""
    return list(_matching(model, family_of(model).fused_mlps))


def _matching(model: Any, pattern: str) -> Iterator[torch.nn.Module]:
    fits = re.compile(pattern).fullmatch
    return (module for name, module in bare(model).named_modules() if fits(name))


# ---- attention and checkpointing


def attend_by(model: Any, part: Part, name: str) -> None:
    """Make a tower attend by a function registered with transformers.

    transformers gives the ViT one variable-length call only under a name with "flash" in it, and refuses such names at
    load; so the model is loaded with sdpa and renamed here (works on 5.17 to 5.23).
    """
    live = bare(model)
    for config in family_of(live).attention_configs(live.config, part):
        config._attn_implementation_internal = name


def recompute(model: Any, part: Part, function: Any) -> None:
    """Have a tower's blocks called through a function that recomputes them.

    Not through `gradient_checkpointing_enable`: that also hooks the ViT's patch embedding so that its output needs a
    gradient, which sends a frozen ViT through backward and recomputation (seen on transformers 5.17 and 5.23).
    """
    tower(model, part)._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)


# ---- the flat forward


@dataclass(frozen=True, kw_only=True)
class Features:
    """What the vision tower yields for a batch.

    Attributes:
        embeds_NH: in place of the embeddings of pad tokens.
        layers_NH: with `deepstack`, one for each of the first language layers, added to what comes out of it.
    """

    embeds_NH: torch.Tensor
    layers_NH: tuple[torch.Tensor, ...] = ()

    def first(self, count: int) -> Features:
        """Those of the first merged patches. With none of them left every merger still has a gradient, of zeros."""
        return Features(
            embeds_NH=self.embeds_NH[:count], layers_NH=tuple(features[:count] for features in self.layers_NH)
        )


def install(model: Any) -> None:
    """Prepare a loaded model for the flat forward, as its family's features need it."""
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
        grid, positions, cu_seqlens, lengths: the batch's `vision_grid`, `vision_positions`, ...; a tower that is handed
            all of them reads nothing back from the device.
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
    """Of tokens, [1, T] -> [1, T, H]."""
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
        embeds_TH: of all tokens, features in place.
        rows: int64 [N], places of the features in the row.
        position_ids: int64 [4, 1, T] as in a batch. The model is handed the three of M-RoPE: the places within samples
            would make transformers build a mask of [T, T] from them, and our attention goes by `cu_seqlens`.

    Returns:
        hidden_TH.
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
    """Stands in for `_deepstack_process`: takes places as well as a mask, whose count the host would wait for."""
    if visual_pos_masks.dtype == torch.bool:
        return type(self)._deepstack_process(self, hidden_states, visual_pos_masks, visual_embeds)
    return hidden_states.index_add(1, visual_pos_masks, visual_embeds[None].to(hidden_states.dtype))
