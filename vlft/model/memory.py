"""How much memory activations take, and so which tower has to recompute its own (gradient checkpointing).

`foretold` asks `vlft.model.activations`, as `vlft plan` does; `activations` is a rough count from shapes, which does
not see what LoRA's dropout and float32 masters keep. Neither has been compared with a GPU yet, so `MARGIN` is wide.

Letters: T tokens and P patches of the largest micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from vlft.families import Family, Layer, Sizes, TextSizes
from vlft.model import activations as saved
from vlft.model.towers import Towers
from vlft.model.tracing import Load, Numbers

Choice = Literal["auto", "true", "false"]
Part = Literal["vision", "language"]

MARGIN = 1.25  # on activations, for what is not counted and for fragments
USABLE = 0.92  # of the free memory
STATE_BYTES = 12  # of a trained weight beside itself: gradient and both moments of AdamW, float32
HEAD_BYTES = 2**30  # a chunk of the head's logits and what is made of it


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes that one tower keeps from forward to backward.

    Attributes:
        whole: of all its blocks. recomputed: under gradient checkpointing, the inputs of all blocks and one whole one.
    """

    whole: int
    recomputed: int


def activations(sizes: Sizes, towers: Towers, *, tokens: int, patches: int, element_bytes: int) -> dict[Part, Kept]:
    """What each tower keeps; nothing for a tower without a backward pass.

    Args:
        sizes: of the model.
        towers: what trains; the language model has a backward pass if anything does.
        tokens, patches: T and P.
        element_bytes: 2 under bf16 autocast, else 4.
    """
    text, vision = sizes.text, sizes.vision
    # Two norms, q, k, v, attention's output, the residual; the MLP's inner width before and after its activation.
    tower = vision.depth * (9 * vision.width + vision.mlp_linears * vision.inner)
    blocks = [_language_block(text, layer) for layer in text.layers]
    parts: dict[Part, tuple[bool, int, int, int, int]] = {
        "language": (True, tokens, sum(blocks), len(blocks) * text.width, max(blocks)),
        "vision": (towers.vision != "frozen", patches, tower, vision.depth * vision.width, tower // vision.depth),
    }
    return {
        part: Kept(whole=count * whole * element_bytes, recomputed=count * (inputs + largest) * element_bytes)
        if trains
        else Kept(whole=0, recomputed=0)
        for part, (trains, count, whole, inputs, largest) in parts.items()
    }


def _language_block(text: TextSizes, layer: Layer) -> int:
    """Values a token leaves in one layer: two norms (input, and what they hand on) and the residual; q and attention's
    output; k and v; gate, up, their product."""
    return 4 * text.width + 2 * text.heads * text.head_dim + 2 * text.kv_heads * text.head_dim + 3 * layer.inner


def foretold(
    config: Any, family: Family, towers: Towers, *, tokens: int, patches: int, numbers: Numbers, fused: bool
) -> dict[Part, Kept]:
    """What each tower keeps on a GPU; one block at work, merger and head are entered with the language model.

    Args:
        config: of the top class. towers: what trains.
        tokens, patches: T and P.
        numbers: what it computes in. fused: with fused RMSNorm and SwiGLU.
    """
    load = Load(lengths=(max(1, tokens),), vision_lengths=(patches,) if patches else (), supervised=max(1, tokens // 4))
    parts: tuple[Part, ...] = ("vision", "language")
    trains = [part for part in parts if part == "language" or towers.vision != "frozen"]
    whole, less = (
        saved.foretell(config, family, towers, load, numbers, device="cuda", checkpointed=some, fused=fused)
        for some in ((), trains)
    )
    beside = {"vision": 0, "language": whole.kept["merger"] + whole.kept["head"] + whole.block}
    return {
        part: Kept(whole=whole.kept[part] + beside[part], recomputed=less.kept[part] + beside[part]) for part in parts
    }


def choose_checkpointing(
    choice: Choice, kept: dict[Part, Kept], *, trained: int, device: torch.device, coming: int = 0
) -> tuple[tuple[Part, ...], str]:
    """The towers that recompute, and the same in words for the log.

    Args:
        choice: `--gradient_checkpointing`.
        kept: of `activations`.
        trained: weights that train on this device; their gradients and optimizer states have yet to find room.
        device: the model is on it already,
        coming: but for so many bytes of it.
    """
    needs: list[Part] = sorted((part for part in kept if kept[part].whole), key=lambda part: -kept[part].whole)
    if choice == "true":
        return tuple(needs), " and ".join(needs)
    if choice == "false" or device.type != "cuda":
        return (), "off"
    free = torch.cuda.mem_get_info(device)[0]
    return fit(needs, kept, room=int(free * USABLE) - STATE_BYTES * trained - HEAD_BYTES - coming)


def fit(needs: list[Part], kept: dict[Part, Kept], *, room: int) -> tuple[tuple[Part, ...], str]:
    """The fewest towers that have to recompute, the hungriest first, for the rest to fit into `room` bytes."""
    for count in range(len(needs) + 1):
        chosen = needs[:count]
        total = sum(kept[part].recomputed if part in chosen else kept[part].whole for part in needs)
        if total * MARGIN <= room or count == len(needs):
            break
    words = f"{' and '.join(chosen) or 'off'} (activations {total / 1e9:.1f} GB, room for {room / MARGIN / 1e9:.1f})"
    return tuple(chosen), words
