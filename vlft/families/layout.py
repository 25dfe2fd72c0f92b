"""Names and shapes of a model's parameters, from its sizes. Needs neither torch nor transformers.

`vlft plan` counts parameters with it, and compares it with the headers of the weights. A family names the modules that
it calls differently in `ParameterNames`. Everything else follows from `Sizes`.
"""

from __future__ import annotations

from dataclasses import dataclass

from vlft.families.sizes import Experts, Layer, Recurrent, Sizes, TextSizes, VisionSizes

Parameters = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class ParameterNames:
    """How a family names the modules that differ between families, and which of them have a bias.

    Attributes:
        mlp: linear layers of a ViT block's MLP, in the order of `VisionSizes.block`.
        merger: a merger's norm and its two linear layers.
        vision_norm_bias: whether the ViT's norms have a bias.
        patch_bias: whether the patch embedding has a bias.
        attention_bias: whether query, key and value of the language model have a bias.
        head_norms: whether the language model normalises each head of query and key.
    """

    mlp: tuple[str, ...]
    merger: tuple[str, str, str]
    vision_norm_bias: bool = True
    patch_bias: bool = False
    attention_bias: bool = False
    head_norms: bool = False


def layout(sizes: Sizes, names: ParameterNames) -> Parameters:
    """Name and shape of each parameter of transformers' top class, without a tied head."""
    text = sizes.text
    found = _vision(sizes.vision, names)
    found["model.language_model.embed_tokens.weight"] = (text.vocab, text.width)
    found["model.language_model.norm.weight"] = (text.width,)
    for place, layer in enumerate(text.layers):
        for name, shape in _layer(text, layer, names).items():
            found[f"model.language_model.layers.{place}.{name}"] = shape
    if not text.tied:
        found["lm_head.weight"] = (text.vocab, text.width)
    return found


def _module(shape: tuple[int, ...], *, bias: bool) -> Parameters:
    return {"weight": shape, **({"bias": shape[:1]} if bias else {})}


def _joined(modules: dict[str, Parameters]) -> Parameters:
    return {f"{module}.{name}": shape for module, found in modules.items() for name, shape in found.items()}


def _vision(vision: VisionSizes, names: ParameterNames) -> Parameters:
    pixels = (vision.width, vision.channels, vision.temporal, vision.patch, vision.patch)
    norm = _module((vision.width,), bias=names.vision_norm_bias)
    modules = {"model.visual.patch_embed.proj": _module(pixels, bias=names.patch_bias)}
    if vision.positions:
        modules["model.visual.pos_embed"] = _module((vision.positions**2, vision.width), bias=False)
    linears = ("attn.qkv", "attn.proj", *(f"mlp.{name}" for name in names.mlp))
    for block in range(vision.depth):
        prefix = f"model.visual.blocks.{block}."
        modules |= {f"{prefix}norm1": norm, f"{prefix}norm2": norm}
        for name, one in zip(linears, vision.block, strict=True):
            modules[prefix + name] = _module((one.outputs, one.inputs), bias=True)
    # Deepstack mergers normalise after they join the patches of a merged patch, the last merger before.
    wide = _module((vision.width * vision.cell,), bias=names.vision_norm_bias)
    mergers = {"model.visual.merger.": norm}
    mergers |= {f"model.visual.deepstack_merger_list.{place}.": wide for place in range(len(vision.deepstack))}
    for prefix, first in mergers.items():
        modules[prefix + names.merger[0]] = first
        for name, one in zip(names.merger[1:], vision.merger, strict=True):
            modules[prefix + name] = _module((one.outputs, one.inputs), bias=True)
    return _joined(modules)


def _layer(text: TextSizes, layer: Layer, names: ParameterNames) -> Parameters:
    """The parameters of one layer of the language model."""
    norm = _module((text.width,), bias=False)
    found = _joined({"input_layernorm": norm, "post_attention_layernorm": norm})
    if layer.recurrent is not None:
        found |= _recurrent(layer.recurrent)
        linears = [f"linear_attn.{name}" for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")]
    else:
        linears = [f"self_attn.{name}_proj" for name in "qkvo"]
        if names.head_norms:
            found |= {f"self_attn.{name}.weight": (text.head_dim,) for name in ("q_norm", "k_norm")}
    if layer.experts is not None:
        found |= _experts(layer.experts, text.width)
    mlp = "mlp.shared_expert" if layer.experts else "mlp"
    linears += [f"{mlp}.{name}_proj" for name in ("gate", "up", "down")]
    # A layer of experts without a shared one has no MLP of its own.
    for name, one in zip(linears, text.linears(layer), strict=False):
        bias = names.attention_bias and name.startswith("self_attn.") and one.role == "in"
        found |= _joined({name: _module((one.outputs, one.inputs), bias=bias)})
    return found


def _recurrent(net: Recurrent) -> Parameters:
    """The parameters of a gated delta net, without its linear layers."""
    return {
        "linear_attn.conv1d.weight": (2 * net.keys + net.values, 1, net.taps),
        "linear_attn.A_log": (net.value_heads,),
        "linear_attn.dt_bias": (net.value_heads,),
        "linear_attn.norm.weight": (net.value_dim,),
    }


def _experts(experts: Experts, width: int) -> Parameters:
    """The parameters of router and experts, without the linear layers of the shared expert."""
    found: Parameters = {
        "mlp.gate.weight": (experts.count, width),
        "mlp.experts.gate_up_proj": (experts.count, 2 * experts.inner, width),
        "mlp.experts.down_proj": (experts.count, width, experts.inner),
    }
    return found | ({"mlp.shared_expert_gate.weight": (1, width)} if experts.shared else {})
