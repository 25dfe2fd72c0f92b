"""How much memory activations take, and so which towers need gradient checkpointing.

`estimate` uses `vlft.model.activations`, as `vlft plan` does. `activations` is a rough count from shapes, without what
LoRA's dropout and float32 masters save. Neither has been compared with a GPU yet, so `MARGIN` is wide.

Letters: T tokens and P patches of the largest micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlft.families import Family, Layer, Sizes, TextSizes
from vlft.model.activations import Saved
from vlft.model.chosen import first_backward
from vlft.model.towers import Towers
from vlft.model.traced import Delta
from vlft.model.tracing import Load, Numbers

Choice = Literal["auto", "true", "false"]
Part = Literal["vision", "language"]

MARGIN = 1.25  # factor on activations, for tensors that are not counted and for fragmentation
USABLE = 0.92  # share of the free memory
STATE_BYTES = 12  # per trained weight, in addition to it: gradient and both moments of AdamW, float32
HEAD_BYTES = 2**30  # a chunk of the head's logits and what is computed from it


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that one tower saves between forward and backward.

    Attributes:
        whole: without gradient checkpointing: the activations of all blocks.
        recomputed: with gradient checkpointing: the inputs of all blocks, and the activations of one block.
    """

    whole: int
    recomputed: int


def activations(sizes: Sizes, towers: Towers, *, tokens: int, patches: int, element_bytes: int) -> dict[Part, Kept]:
    """Bytes that each tower saves, roughly; none for a tower without a backward pass.

    Args:
        sizes: of the model.
        towers: what trains; the language model has a backward pass if anything trains.
        tokens: T.
        patches: P.
        element_bytes: 2 under bf16 autocast, otherwise 4.
    """
    text, vision = sizes.text, sizes.vision
    # Two norms, q, k, v, attention's output and the residual; the MLP's inner width before and after its activation.
    block = 9 * vision.width + vision.mlp_linears * vision.inner
    blocks = [_language_block(text, layer) for layer in text.layers][first_backward(towers, "language") :]
    start = first_backward(towers, "vision")
    run = 0 if start is None else vision.depth - start  # blocks of the ViT with a backward pass
    parts: dict[Part, tuple[bool, int, int, int, int]] = {
        "language": (True, tokens, sum(blocks), len(blocks) * text.width, max(blocks)),
        "vision": (start is not None, patches, run * block, run * vision.width, block),
    }
    return {
        part: Kept(whole=count * whole * element_bytes, recomputed=count * (inputs + largest) * element_bytes)
        if trains
        else Kept(whole=0, recomputed=0)
        for part, (trains, count, whole, inputs, largest) in parts.items()
    }


def _language_block(text: TextSizes, layer: Layer) -> int:
    """Values saved per token in one layer.

    Two norms (input and output) and the residual. Attention: q, its gate and the result; k and v. A gated delta net:
    queries, keys and values before and after the convolution; the gate and the result. MLP: gate, up and their product,
    for each expert that computes a token; experts also save their inputs and results.
    """
    if (net := layer.recurrent) is not None:
        mixer = 2 * (2 * net.keys + net.values) + 3 * net.values
    else:
        queries = text.heads * text.head_dim
        mixer = (3 if text.query_gate else 2) * queries + 2 * text.kv_heads * text.head_dim
    mlp = 3 * layer.inner
    if (experts := layer.experts) is not None:
        mlp = 3 * (experts.active * experts.inner + experts.shared) + 2 * experts.active * text.width
    return 4 * text.width + mixer + mlp


def estimate(
    config: Any,
    family: Family,
    towers: Towers,
    *,
    tokens: int,
    patches: int,
    numbers: Numbers,
    fused: bool,
    delta: Delta = "fla",
) -> dict[Part, Kept]:
    """Bytes that each tower saves on a GPU. The language model's include merger, head and one recomputed block.

    Args:
        config: transformers' config of the top class.
        family: of the config.
        towers: what trains.
        tokens: T.
        patches: P.
        numbers: the dtypes it computes in.
        fused: whether fused kernels run.
        delta: what computes the delta rule of gated delta nets.
    """
    load = Load(lengths=(max(1, tokens),), vision_lengths=(patches,) if patches else (), supervised=max(1, tokens // 4))
    parts: tuple[Part, ...] = ("vision", "language")
    trains = [part for part in parts if part == "language" or towers.vision != "frozen"]
    saved = Saved(
        config=config, family=family, towers=towers, load=load, numbers=numbers, device="cuda", fused=fused, delta=delta
    )
    whole, less = saved.estimate(), saved.estimate(trains)
    extra = {"vision": 0, "language": whole.kept["merger"] + whole.kept["head"] + whole.block}
    return {
        part: Kept(whole=whole.kept[part] + extra[part], recomputed=less.kept[part] + extra[part]) for part in parts
    }


def choose_checkpointing(
    choice: Choice, kept: dict[Part, Kept], *, trained: int, device: torch.device, coming: int = 0
) -> tuple[tuple[Part, ...], str]:
    """Choose the towers that recompute their activations.

    Args:
        choice: `--gradient_checkpointing`.
        kept: bytes that each tower saves, from `activations` or `estimate`.
        trained: weights that train on this device; their gradients and optimizer states are not allocated yet.
        device: where the model is.
        coming: bytes of the model that are not on the device yet.

    Returns:
        the towers, and a text for the log.
    """
    needs: list[Part] = sorted((part for part in kept if kept[part].whole), key=lambda part: -kept[part].whole)
    if choice == "true":
        return tuple(needs), " and ".join(needs)
    if choice == "false" or device.type != "cuda":
        return (), "off"
    free = torch.cuda.mem_get_info(device)[0]
    return fit(needs, kept, room=int(free * USABLE) - STATE_BYTES * trained - HEAD_BYTES - coming)


def fit(needs: list[Part], kept: dict[Part, Kept], *, room: int) -> tuple[tuple[Part, ...], str]:
    """Choose the fewest towers that must recompute so that activations fit into `room` bytes, the largest tower first.

    Returns:
        the towers, and a text for the log.
    """
    for count in range(len(needs) + 1):
        chosen = needs[:count]
        total = sum(kept[part].recomputed if part in chosen else kept[part].whole for part in needs)
        if total * MARGIN <= room or count == len(needs):
            break
    words = f"{' and '.join(chosen) or 'off'} (activations {total / 1e9:.1f} GB, room for {room / MARGIN / 1e9:.1f})"
    return tuple(chosen), words
