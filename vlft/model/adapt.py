"""Access to the parts of a live model, and what each feature of its family changes in a forward pass.

This is the only module that touches the internals of transformers' vision-language models. `vlft.families` lists the
features of each family; no code here or elsewhere branches on the family itself.

Letters: those of `vlft.model.forward`; P patches, N merged patches.
"""

from __future__ import annotations

import itertools
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from vlft.families import Family, Sizes, VisionSizes
from vlft.families.family import BLOCK, LAYER
from vlft.model import recurrent, vision
from vlft.model.features import Features

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


def blocks_without_backward(model: Any, part: Part) -> list[torch.nn.Module]:
    """The first blocks of a tower, up to the first that trains. None of them if a weight before the tower trains."""
    visual, language = tower(model, "vision"), tower(model, "language")
    if part == "vision":
        inside = set(map(id, visual.blocks.parameters()))
        before = [p for p in _without_mergers(model) if id(p) not in inside]
    else:
        before = [*visual.parameters(), *language.embed_tokens.parameters()]
    if any(p.requires_grad for p in before):
        return []
    frozen = (not any(p.requires_grad for p in block.parameters()) for block in blocks(model, part))
    return list(itertools.compress(blocks(model, part), itertools.takewhile(bool, frozen)))


def mergers(model: Any) -> list[torch.nn.Module]:
    """The modules between ViT and language model. Their output enters the language model."""
    found: list[torch.nn.Module] = []
    prefixes = {prefix.rstrip(".") for prefix, name in family_of(model).tower_prefixes if name == "merger"}
    for name, module in bare(model).named_modules():
        if name in prefixes:  # a family need not have each of them
            found += module if isinstance(module, torch.nn.ModuleList) else [module]
    return found


def recurrent_layers(model: Any) -> list[torch.nn.Module]:
    """The gated delta nets of the language model, one for each layer that has one."""
    layers = zip(blocks(model, "language"), sizes_of(model).text.layers, strict=True)
    return [layer.get_submodule("linear_attn") for layer, sizes in layers if sizes.recurrent is not None]


def fused_norms(model: Any) -> list[torch.nn.Module]:
    """RMSNorms that a fused kernel may replace."""
    return list(_matching(model, family_of(model).fused_norms))


def before_experts(model: Any) -> list[torch.nn.Module]:
    """Norms whose result experts read. Autocast does not cast for experts, so it must keep its dtype."""
    layers = zip(blocks(model, "language"), sizes_of(model).text.layers, strict=True)
    return [layer.get_submodule("post_attention_layernorm") for layer, sizes in layers if sizes.experts is not None]


def fused_mlps(model: Any) -> list[torch.nn.Module]:
    """Gated MLPs whose activation and product a fused kernel may compute."""
    pattern = family_of(model).fused_mlps
    return list(_matching(model, pattern)) if pattern else []


def layer_norms(model: Any) -> list[torch.nn.Module]:
    """LayerNorms of the ViT and its mergers. Only linear layers read their results."""
    found = (module for module in tower(model, "vision").modules() if isinstance(module, torch.nn.LayerNorm))
    return [module for module in found if module.weight is not None and module.bias is not None]


def gated_norms(model: Any) -> list[torch.nn.Module]:
    """RMSNorms of gated delta nets. They multiply their result by a gate, and a linear layer reads it."""
    return [layer.get_submodule("norm") for layer in recurrent_layers(model)]


def quick_gelus(model: Any) -> list[torch.nn.Module]:
    """Activations of the ViT that torch computes in three passes."""
    from transformers.activations import QuickGELUActivation

    return [module for module in tower(model, "vision").modules() if isinstance(module, QuickGELUActivation)]


def attentions(model: Any, part: Part) -> list[torch.nn.Module]:
    """Modules of softmax attention of a tower."""
    return list(_matching(model, BLOCK + "attn" if part == "vision" else LAYER + "self_attn"))


def rotary_channels(model: Any, part: Part) -> int:
    """Channels of a head that rotary embedding turns."""
    if part == "vision":
        return sizes_of(model).vision.head_dim
    return 2 * tower(model, part).rotary_emb.inv_freq.shape[0]


def experts(model: Any) -> tuple[str, torch.dtype]:
    """The name of transformers' function for experts, and the dtype of their weights."""
    live = bare(model)
    dtype = next(p.dtype for name, p in live.named_parameters() if ".mlp.experts." in name)
    return live.get_experts_implementation()[""], dtype


def _matching(model: Any, pattern: str) -> Iterator[torch.nn.Module]:
    fits = re.compile(pattern).fullmatch
    return (module for name, module in bare(model).named_modules() if fits(name))


# ---- attention and checkpointing


def attend_by(model: Any, part: Part, name: str) -> None:
    """Set the attention function of a tower to one that is registered with transformers.

    transformers (5.17 to 5.23) calls the ViT's attention once, with variable lengths, only if the function's name has
    "flash" in it, and refuses such names at load. So the model is loaded with sdpa, and the name is changed here.
    """
    for config in family_of(model).attention_configs(bare(model).config, part):
        name_attention(config, name)


def name_attention(config: Any, name: str) -> None:
    """Set the attention function in one config."""
    config._attn_implementation_internal = name


def recompute(model: Any, part: Part, function: Any) -> None:
    """Call a tower's blocks through a function that recomputes them in the backward pass.

    This does not use `gradient_checkpointing_enable`, which also makes the output of the ViT's patch embedding require
    a gradient. A frozen ViT would then be recomputed and run backward (seen on transformers 5.17 and 5.23).
    """
    tower(model, part)._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)


# ---- the flat forward


def install(model: Any) -> None:
    """Prepare a loaded model for the flat forward, as far as the features of its family require it."""
    features = family_of(model).features
    if "deepstack" in features:
        language = tower(model, "language")
        language._deepstack_process = types.MethodType(_add_at_places, language)
    if "windows" in features:
        full = sizes_of(model).vision.full_blocks
        for place, block in enumerate(blocks(model, "vision")):
            # Called again at each recomputation, and copied with the block by PEFT.
            block.register_forward_pre_hook(
                vision.over_steps if place in full else vision.over_windows, with_kwargs=True
            )
    for layer in recurrent_layers(model):
        recurrent.bind(layer, recurrent.torch_rule)
    vision.embed_by_matmul(tower(model, "vision").patch_embed)
    for merger in mergers(model):
        vision.keep_autocast(merger)


def pixel_dtype(model: Any, device: torch.device) -> torch.dtype:
    """The dtype in which the vision tower takes pixels that are on a device."""
    return vision.pixel_dtype(tower(model, "vision"), device)


def _without_mergers(model: Any) -> Iterator[torch.nn.Parameter]:
    """The parameters of the vision tower, without those of its mergers."""
    family = family_of(model)
    for name, part in tower(model, "vision").named_children():
        if family.tower_of(f"model.visual.{name}.") == "vision":
            yield from part.parameters()


def vision_features(
    model: Any,
    pixels_PX: torch.Tensor,
    *,
    grid: torch.Tensor,
    positions: torch.Tensor,
    cu_seqlens: torch.Tensor,
    lengths: Sequence[int],
    meta: Mapping[str, Any],
) -> Features:
    """The one vision call of a batch. With its arguments the tower reads nothing back from the device.

    Args:
        pixels_PX: scaled, in `pixel_dtype`.
        grid: `vision_grid` of the batch.
        positions: `vision_positions` of the batch.
        cu_seqlens: `vision_cu_seqlens` of the batch.
        lengths: `vision_lengths` of the batch.
        meta: `vision_meta` of the batch.
    """
    visual, sizes = tower(model, "vision"), sizes_of(model).vision
    if not lengths:  # a batch without pictures and without a placeholder
        none_NH = pixels_PX.new_zeros(0, sizes.out)
        return Features(embeds_NH=none_NH, layers_NH=(none_NH,) * len(sizes.deepstack))
    more: dict[str, Any] = {}
    if sizes.window is not None:
        more["window_index"], more["cu_window_seqlens"] = meta["window_index"], meta["window_cu_seqlens"]
        more["window_lengths"] = meta["window_lengths"]
        more["max_window_seqlen"] = max(meta["window_lengths"])
    if sizes.positions is not None:
        more["interp_indices"], more["interp_weights"] = vision.interpolation(
            meta, positions, cu_seqlens, side=sizes.positions
        )
    with vision.without_needless_autocast(_without_mergers(model), pixels_PX.device):
        out = visual(
            pixels_PX,
            grid_thw=grid,
            position_ids=positions,
            cu_seqlens=cu_seqlens,
            max_seqlen=max(lengths),
            segment_lengths=lengths,
            **more,
        )
    return _features_of(out, sizes)


def _features_of(out: Any, sizes: VisionSizes) -> Features:
    """The features in the result of a vision tower."""
    return Features(embeds_NH=out.pooler_output, layers_NH=tuple(out.deepstack_features if sizes.deepstack else ()))


def watch_features(model: Any, act: Callable[[Features], object]) -> None:
    """Call a function with the features of every call of the vision tower."""
    sizes = sizes_of(model).vision

    def hook(module: torch.nn.Module, args: Any, out: Any) -> None:
        act(_features_of(out, sizes))

    tower(model, "vision").register_forward_hook(hook)


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
    branches: Mapping[str, Any] | None = None,
) -> torch.Tensor:
    """The language model on a flat row.

    Args:
        embeds_TH: embeddings of all tokens, with the vision features in place.
        features: what the vision tower returned.
        rows: int64 [N], places of the features in the row.
        position_ids: int64 [4, 1, T], as in a batch. Only the three rows of M-RoPE are passed on: from the fourth, the
            positions within samples, transformers would build a mask of [T, T]. Our attention uses `cu_seqlens`.
        cu_seqlens: int32 [S + 1], bounds of the segments of queries.
        lengths: tokens of each segment of queries.
        branches: `branches` of the batch, the keys of each segment; None: they are the segment itself.

    Returns:
        hidden_TH: the last hidden states.

    Raises:
        ValueError: branches, and layers that read the row in order and cannot share a prompt.
    """
    more: dict[str, Any] = {"cu_seq_lens_k": cu_seqlens, "max_length_k": max(lengths)}
    if features.layers_NH:
        more |= {"visual_pos_masks": rows, "deepstack_visual_embeds": list(features.layers_NH)}
    if branches is not None:
        more |= {"kv_rows": branches["kv_rows"], "key_lengths": branches["key_lengths"]}
        more |= {"cu_seq_lens_k": branches["cu_seqlens_k"], "max_length_k": max(branches["key_lengths"])}
    if "recurrent" in family_of(model).features:
        if branches is not None:
            raise ValueError("gated delta nets cannot share a prompt: repeat its tokens for each answer")
        more["segments"] = recurrent.Segments(lengths=tuple(lengths), device=embeds_TH.device)
    output = tower(model, "language")(
        inputs_embeds=embeds_TH[None],
        position_ids=position_ids[1:],
        attention_mask=None,
        use_cache=False,
        cu_seq_lens_q=cu_seqlens,
        max_length_q=max(lengths),
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
