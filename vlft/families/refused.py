"""Model types that users try and vlft does not train, each with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from vlft.families.family import Family

_SPEECH = "a model for speech; vlft trains on text, pictures and videos"
_TEXT = "a text model, without a vision tower"
_OTHER = "another vision-language family, with another vision tower and another processor"

_REASONS: dict[str, tuple[str, ...]] = {
    _SPEECH: (
        "qwen2_5_omni", "qwen2_5_omni_thinker", "qwen3_omni_moe", "qwen3_omni_moe_thinker", "qwen2_audio", "qwen3_asr",
    ),
    _TEXT: ("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next"),
    _OTHER: (
        "aria", "aya_vision", "cohere2_vision", "cosmos3_edge", "cosmos3_omni", "deepseek_vl", "deepseek_vl_v2",
        "ernie4_5_vl_moe", "gemma3", "gemma3n", "gemma4", "glm4v", "glm4v_moe", "glm46v", "got_ocr2", "idefics2",
        "idefics3", "internvl", "internvl_chat", "kimi_k25", "kimi_vl", "llama4", "llava", "llava_next",
        "llava_next_video", "llava_onevision", "minicpmv", "minicpmv4_6", "mistral3", "mllama", "molmo2", "ovis2",
        "paligemma", "phi4_multimodal", "pixtral", "smolvlm", "video_llama_3",
    ),
    "its n-gram embeddings alone take some 90 GB; it is not planned": ("qwen4_exp",),
    "only the language model of a Qwen4 model": ("qwen4_exp_text",),
    "a model that turns pages into vectors for search": ("colqwen2",),
}  # fmt: skip


def reasons(families: Iterable[Family]) -> Iterator[tuple[str, str]]:
    """Yield pairs of a model type that is not trained, and the reason.

    Args:
        families: those that are trained; files may hold one of their two parts.
    """
    for reason, types in _REASONS.items():
        yield from ((one, reason) for one in types)
    for family in families:
        yield (
            f"{family.model_type}_text",
            f"only the language model of a {family.label}, without its vision tower",
        )
        yield f"{family.model_type}_vision", f"only the vision tower of a {family.label}"
