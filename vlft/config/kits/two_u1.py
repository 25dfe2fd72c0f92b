"""Flags of 2U1/Qwen2-VL-Finetune (src/params.py, src/train/train_sft.py at 6695161)."""

from __future__ import annotations

from collections.abc import Mapping

from vlft.config.kits.adapters import UNSUPPORTED
from vlft.config.kits.outcome import (
    Becomes,
    Cannot,
    Idle,
    Kit,
    Outcome,
    attention,
    by_word,
    cannot,
    flag,
    idle,
    is_false,
    is_true,
    off,
    renamed,
    starting_adapter,
    switch,
)
from vlft.config.kits.preferences import COMPUTED_ONCE
from vlft.config.kits.quantised import KEPT, Quantised
from vlft.config.kits.variants import DORA, last_blocks

_TOWERS = {
    "vision": ("freeze_vision_tower", "vision_lora", "unfreeze_topk_vision", "lora_namespan_exclude"),
    "merger": ("freeze_merger", "tune_merger", "vision_lora", "lora_namespan_exclude"),
    "language": ("freeze_llm", "lora_enable", "unfreeze_topk_llm"),
}
_SPOKEN = ("freeze_vision_tower", "freeze_llm", "freeze_merger", "tune_merger", "lora_enable", "vision_lora")
_NAMES = (*_SPOKEN, "lora_namespan_exclude")
#: Flag for the last blocks of a tower -> the tower.
_TOP_K = {"unfreeze_topk_llm": "language", "unfreeze_topk_vision": "vision"}


def towers(said: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], Outcome] | None:
    """Translate the booleans that set what trains, all together, into one word for each tower.

    2U1's kit trains every tower in full that is not frozen, and requires a tower to be frozen for LoRA. If a line sets
    both booleans of the language model, it is read as a line of that kit: towers it does not mention train in full.
    """
    names = tuple(name for name in (*_NAMES, *_TOP_K) if name in said)
    blocks = {tower: flags for name, tower in _TOP_K.items() if (flags := last_blocks(said.get(name, ()), tower))}
    if not set(names) & set(_SPOKEN) and not blocks:
        if "lora_namespan_exclude" in said:
            return names, _excluded(said["lora_namespan_exclude"])
        return (names, Idle(why="off")) if names else None

    def true(name: str) -> bool:
        return name in said and is_true(said[name])

    vision_lora = true("vision_lora") and not _excludes(said, "visual")
    merger_lora = vision_lora and not _excludes(said, "merger")
    chosen: dict[str, str] = {}
    if "freeze_vision_tower" in said or vision_lora:
        chosen["vision"] = "lora" if vision_lora else "frozen" if true("freeze_vision_tower") else "full"
    if {"freeze_merger", "tune_merger"} & set(said) or merger_lora:
        free = true("tune_merger") or ("freeze_merger" in said and not true("freeze_merger"))
        chosen["merger"] = "full" if free else "lora" if merger_lora else "frozen"
    if "freeze_llm" in said or true("lora_enable"):
        chosen["language"] = "lora" if true("lora_enable") else "frozen" if true("freeze_llm") else "full"
    if "language" in chosen and len(set(names) & {"freeze_llm", "lora_enable"}) == 2:
        chosen = {"vision": "full", "merger": "full"} | chosen
    chosen = {tower: chosen[tower] for tower in _TOWERS if tower in chosen}
    flags = {tower: (mode,) for tower, mode in chosen.items()}
    note = ""
    if blocks and true("lora_enable"):
        note = "with lora_enable the chosen blocks are frozen again, there as here"
    elif blocks:
        # A tower that trains anyway trains all of its blocks.
        flags |= {k: v for tower, one in blocks.items() if chosen.get(tower) != "full" for k, v in one.items()}
    if not flags:
        return names, Idle(why="off")
    if chosen.get("language") == "full" and "lora" in chosen.values():
        note = "LoRA on another tower needs --language lora or frozen"
    return names, Becomes(flags=flags, note=note)


def defaults(
    said: Mapping[str, tuple[str, ...]], flags: Mapping[str, tuple[str, ...]]
) -> Mapping[str, tuple[str, ...]]:
    """Return the defaults of 2U1's kit: every tower that is not frozen trains in full; rates; LoRA; GRPOArguments."""
    full = dict.fromkeys(_TOWERS, ("full",)) | {"lora_rank": ("64",), "lora_alpha": ("16",)}
    if flags.get("method") == ("grpo",):
        rewards = ("src/train/reward_funcs.py:accuracy_reward,format_reward",)
        return full | {"learning_rate": ("1e-6",), "beta": ("0.04",), "temperature": ("0.9",), "reward": rewards}
    return full | {"learning_rate": ("5e-5",)}


def _excludes(said: Mapping[str, tuple[str, ...]], part: str) -> bool:
    return any(part in word for word in said.get("lora_namespan_exclude", ()))


def _excluded(words: tuple[str, ...]) -> Outcome:
    names = {name.strip(" []'\"") for word in words for name in word.split(",")} - {""}
    if names <= {"lm_head", "embed_tokens", "embed_token"}:
        return Idle(why="LoRA is never applied to the embedding or the head")
    return Cannot(why="LoRA is set for each tower: --vision, --merger and --language take full, lora or frozen")


def _adapter(words: tuple[str, ...]) -> Outcome:
    found = starting_adapter(words)
    if isinstance(found, Becomes):
        note = f"{found.note}; train_sft.py of Qwen2-VL-Finetune takes this flag, but does not read it"
        return Becomes(flags=found.flags, note=note)
    return found


_RESIZED = cannot("a picture keeps its aspect ratio. Set its size with --image_min_pixels and --image_max_pixels")
_FRAMES = cannot("a frame keeps its aspect ratio. Set its size with --video_min_pixels and --video_max_pixels")
_QUANTISED = Quantised(
    bits="bits",
    kind="quant_type",
    double="double_quant",
    note=f"{KEPT}. With transformers 5 Qwen2-VL-Finetune also quantises the vision tower",
)
_LIGER = switch(true=flag("use_liger_kernel", "auto"), false=flag("use_liger_kernel", "false"))

KIT = Kit(
    name="Qwen2-VL-Finetune",
    together=(towers, _QUANTISED.together),
    defaults=defaults,
    batch=(8, 1),
    synonyms={
        "freeze_vit": "freeze_vision_tower",
        "freeze_aligner": "freeze_merger",
        "freeze_multi_modal_projector": "freeze_merger",
        "freeze_language_model": "freeze_llm",
    },
    marks=frozenset((*_NAMES, *_TOP_K)) | _QUANTISED.names,
    rules={
        "use_liger": _LIGER,
        "use_liger_loss": _LIGER,
        "lora_weight_path": _adapter,
        "num_lora_modules": by_word(
            {"-1": Idle(why="all linear layers of a tower")}, cannot("LoRA is set for each tower")
        ),
        "lora_bias": UNSUPPORTED["lora_bias"],
        "use_dora": DORA,
        "max_seq_length": renamed("max_length"),
        "model_max_length": renamed("max_length"),
        "projector_lr": renamed("merger_lr"),
        "image_resized_width": _RESIZED,
        "image_resized_height": _RESIZED,
        "video_resized_width": _FRAMES,
        "video_resized_height": _FRAMES,
        "min_pixels": renamed("image_min_pixels"),
        "max_pixels": renamed("image_max_pixels"),
        "disable_flash_attn2": switch(true=flag("attn", "sdpa"), false=Idle(why="--attn auto picks the fastest")),
        "attn_implementation": attention,
        "lazy_preprocess": idle("rows are prepared in the workers"),
        "group_by_modality_length": idle("rows are packed and never padded"),
        "eval_image_folder": lambda words: (
            Idle(why="off") if is_false(words) else Cannot(why="--image_folder also applies to --eval_path")
        ),
        "head_lr": off("classification heads are not trained here"),
        "precompute_ref_log_probs": COMPUTED_ONCE,
        "vision_tower_lr": renamed("vision_lr"),
    },
)
