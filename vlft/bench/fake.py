"""`vlft bench train --fake GPU`: the forecast of one training step on a GPU that need not be there.

The step takes one pack of a mix. The pack of the story mix is fixed, so that figures of different days compare. The
packs of other mixes are drawn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vlft import text
from vlft.bench.choices import PRESETS, Preset
from vlft.bench.mixes import CLIPS, Mix, draw_rows
from vlft.bench.sizes import SHAPES
from vlft.bench.work import BuiltIn, Say
from vlft.config.parse import Parsed
from vlft.families import Sizes
from vlft.model.build import build_config
from vlft.model.cards import predicted
from vlft.model.forecast import Forecast, Step
from vlft.model.load import load_config
from vlft.model.towers import Towers
from vlft.model.tracing import Load, numbers_of
from vlft.setup import open_base

PACK_TOKENS = 16384
#: A typical pack of the story mix: 7 rows with 26 pictures of its four sizes, 53,600 patches and 2,360 trained tokens.
STORY = Load(
    lengths=(600, 1100, 1600, 2100, 2700, 3500, 4784),
    vision_lengths=(*[768] * 8, *[1728] * 9, *[3072] * 5, *[4136] * 4),
    supervised=2360,
)
DRAWN_ROWS = 400


def bench_fake(parsed: Parsed, gpu: str, preset: Preset | None, built_in: BuiltIn, say: Say) -> dict[str, Any]:
    """Forecast one step.

    Args:
        parsed: parsed flags, with `DataFlags`, `ModelFlags` and `TrainFlags` in this order.
        gpu: a name in `vlft.model.cards.CARDS`.
        preset: towers to train; None: as the flags say, or `lora` if they say nothing.
        built_in: shape and mix.
        say: receives lines about progress.

    Returns:
        the document of `vlft bench train --fake --json`.

    Raises:
        ConfigError: the speed of the card is not known, or the flags cannot be carried out.
    """
    card = predicted(gpu, flag="--fake")
    data, model, args = parsed.flags
    if preset is None and not parsed.given & {"vision", "merger", "language"}:
        preset = "lora"
    if model.model_id is None:
        family, shape = SHAPES[built_in.shape]
        name = f"{built_in.shape} (random weights)"
        config = build_config(family, shape, built_in.processor(family, max_pixels=family.pixels[1]).tokenizer)
    else:
        name = model.model_id
        config, family = load_config(open_base(data, model, given=parsed.given).folder)
    chosen = ("language_blocks", "vision_blocks", "tokens")  # refused in bench
    settings = {one: getattr(model, one) for one in Towers.__dataclass_fields__ if one not in chosen}
    towers = Towers(**settings | (PRESETS[preset] if preset else {}))
    stored = getattr(config, "dtype", None)
    step = Step(
        config=config,
        family=family,
        towers=towers,
        load=pack_of(built_in.mix, family.sizes(config), seed=built_in.seed),
        numbers=numbers_of(
            stored if isinstance(stored, torch.dtype) else torch.bfloat16,
            torch.bfloat16,
            deepspeed=False,
        ),
        card=card,
        fused=args.liger != "false",
        delta="torch" if model.linear_attn == "torch" else "fla",
    )
    everything = ["vision", "language"] if towers.vision != "frozen" else ["language"]
    asked = everything if args.checkpointing == "true" else []
    say(f"one step of {name} on tensors without contents, as on {gpu}")
    found = replace(step, checkpointed=asked).whole()
    recomputed = None
    if not found.fits and not asked:
        say(f"it needs {found.peak_gb:.1f} GB of {card.gb:g}: again with gradient checkpointing")
        recomputed = replace(step, checkpointed=everything).whole()
    return {
        "base": name,
        "gpu": gpu.lower(),
        "preset": next(
            (one for one, modes in PRESETS.items() if modes == towers.modes), "/".join(towers.modes.values())
        ),
        "mix": built_in.mix,
        **_figures(found, asked),
        "with_checkpointing": None if recomputed is None else _figures(recomputed, everything),
        "torch": torch.__version__,
    }


def _figures(found: Forecast, checkpointed: list[str]) -> dict[str, Any]:
    return {"gradient_checkpointing": checkpointed, **found.as_json()}


def pack_of(mix: Mix, sizes: Sizes, *, seed: int) -> Load:
    """The shapes of a typical pack of a mix: of several packs, the one with the median number of patches.

    Args:
        mix: of the rows.
        sizes: of the model, for the number of patches of a picture.
        seed: of the rows.
    """
    if mix == "story":
        return STORY
    packs: list[Load] = []
    lengths: list[int] = []
    segments: list[int] = []
    supervised = 0
    cell, factor = sizes.vision.cell, sizes.vision.patch * sizes.vision.merge
    for row in draw_rows(mix, DRAWN_ROWS, seed=seed, scale="real"):
        media = [(width, height, 1) for width, height, _ in row.pictures]
        media += [(*CLIPS["real"], row.seconds)] if row.seconds else []
        steps = [_tokens(width, height, factor) for width, height, times in media for _ in range(times)]
        tokens = row.question + row.answer + 40 + sum(steps) + 3 * len(media)
        if lengths and sum(lengths) + tokens > PACK_TOKENS:
            packs.append(Load(lengths=tuple(lengths), vision_lengths=tuple(segments), supervised=supervised))
            lengths, segments, supervised = [], [], 0
        lengths.append(min(tokens, PACK_TOKENS))
        segments += [cell * one for one in steps]
        supervised += row.answer
    return sorted(packs, key=lambda pack: (pack.patches, pack.supervised))[len(packs) // 2]


def _tokens(width: int, height: int, factor: int) -> int:
    return max(1, round(width / factor)) * max(1, round(height / factor))


def table(document: dict[str, Any]) -> str:
    """Format the document for people."""
    assumed = document["assumed"]
    lines = [
        f"{document['base']} · {document['preset']} · one pack of the {document['mix']} mix: {document['tokens']:,} "
        f"tokens, {document['pictures']:,} pictures or time steps, {document['patches']:,} patches, "
        f"{document['supervised']:,} trained tokens",
        f"forecast for {document['gpu']}; nothing was measured. It assumes {assumed['matmul_tflops']:.0f} TFLOP/s in "
        f"matmuls, {assumed['attention_tflops']:.0f} in attention and {assumed['memory_tb_s']:.2f} TB/s",
        "",
    ]
    columns = {_words(document["gradient_checkpointing"]): document}
    if document["with_checkpointing"]:
        columns[_words(document["with_checkpointing"]["gradient_checkpointing"])] = document["with_checkpointing"]
    rows = [(title, *(form(one) for one in columns.values())) for title, form in _ROWS]
    lines += [text.table(("", *columns), rows), "", f"what costs most, {_words(document['gradient_checkpointing'])}:"]
    costs = [
        (
            one["module"],
            one["phase"],
            f"{one['ms']:.1f}",
            f"{one['kernels']:,}",
            f"{one['gb_matmul']:.1f}",
            f"{one['gb_attention']:.1f}",
            f"{one['gb_elementwise'] + one['gb_adapter']:.1f}",
        )
        for one in document["costs"]
    ]
    lines.append(text.table(("module", "in", "ms", "kernels", "GB matmul", "attention", "other"), costs))
    return "\n".join(lines)


def _words(checkpointed: list[str]) -> str:
    return f"recomputing {' and '.join(checkpointed)}" if checkpointed else "no recomputation"


_ROWS = (
    ("predicted ms", lambda one: f"{one['predicted_ms']:,.0f}"),
    ("predicted MFU", lambda one: f"{one['predicted_mfu']:.1%}"),
    ("predicted tokens/s", lambda one: f"{one['predicted_tokens_per_s']:,.0f}"),
    ("kernels", lambda one: f"{one['kernels']:,}"),
    ("host waits", lambda one: f"{one['host_syncs']:,}"),
    ("GB, base matmuls", lambda one: f"{one['gb_matmul']:,.0f}"),
    ("GB, attention", lambda one: f"{one['gb_attention']:,.0f}"),
    ("GB, everything else", lambda one: f"{one['gb_elementwise']:,.0f}"),
    (
        "peak memory, GB",
        lambda one: f"{one['peak_gb']:.1f} of {one['card_gb']:g}" + ("" if one["fits"] else ", does not fit"),
    ),
)
