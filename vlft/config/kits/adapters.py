"""Settings of peft's adapters that vlft does not train, each with its reason. All kits share them, and users of peft.

The reasons are from runs of peft 0.21 on a tiny base with a tied head: each variant was trained, saved, loaded on the
untouched base, switched off and merged.
"""

from __future__ import annotations

from vlft.config.kits.outcome import Cannot, Idle, Outcome, Rule, by_word, cannot, off

_PLAIN = "Use --language lora, also with --use_dora or --use_rslora"
_CHANGES_BASE = (
    "changes the base's weights when the adapter is attached, so the adapter does not fit the base as published, and a "
    f"reference with the adapter switched off is not the base. {_PLAIN}"
)
#: Start of LoRA's matrices -> why vlft does not use it.
INITS = {
    "pissa": f"PiSSA {_CHANGES_BASE}",
    "olora": f"OLoRA {_CHANGES_BASE}",
    "eva": f"EVA needs a pass over the data before training, without which peft starts plain LoRA. {_PLAIN}",
    "loftq": "LoftQ replaces the base's weights and needs CUDA and scipy. Use --bits 4, which trains on the base as "
    "quantised",
    "corda": f"CorDA {_CHANGES_BASE}",
    "lora_ga": f"LoRA-GA {_CHANGES_BASE}",
    "orthogonal": f"an orthogonal start is not supported. {_PLAIN}",
    "gaussian": "the start of LoRA's A matrices cannot be chosen: it is peft's own. Drop it",
}
_TOKENS = (
    "peft would save a copy of the whole embedding, and where the head is tied to it, merging changes the head too. "
    "Use --train_tokens for single tokens"
)
_PROMPTS = (
    "prompt tuning trains a prompt and no weights, so there is nothing to merge. --vision, --merger and --language "
    "take full, lora or frozen"
)
_BIAS = (
    "biases beside LoRA are not supported: switching the adapter off would not bring the base back, and peft refuses "
    "to merge lora_bias where a layer has none. --vision full or --merger full train biases"
)
_BLOCKS = "LoRA is set for each tower. Blocks are named by --language_blocks and --vision_blocks"
_ONE = "every LoRA matrix has one rank and one alpha: --lora_rank and --lora_alpha"


def initialised(words: tuple[str, ...]) -> Outcome:
    """Answer `init_lora_weights`: how LoRA's matrices start."""
    word = (words[0] if words else "true").lower()
    if word in ("true", "default", "kaiming"):
        return Idle(why="always so")
    known = next((why for name, why in INITS.items() if word.replace("-", "_").startswith(name)), None)
    return Cannot(why=known or f"LoRA starts from zero updates, always. {_PLAIN}")


def _kind(words: tuple[str, ...]) -> Outcome:
    """Answer `peft_type`: LORA, or another kind of adapter."""
    word = (words[0] if words else "").upper()
    if word in ("LORA", ""):
        return Idle(why="an adapter is always LoRA")
    if "PROMPT" in word or "P_TUNING" in word or "PREFIX" in word:
        return Cannot(why=_PROMPTS)
    return Cannot(why=f"{word} is not supported. {_PLAIN}")


def _unless_idle(why: str, *idle: str) -> Rule:
    """Refuse a flag, except for values that change nothing."""
    return by_word(dict.fromkeys(("", "null", *idle), Idle(why="off")), cannot(why))


#: Flag -> its rule.
UNSUPPORTED: dict[str, Rule] = {
    **dict.fromkeys(("init_lora_weights", "init_weights", "peft_init_lora_weights"), initialised),
    **dict.fromkeys(("use_pissa", "pissa", "pissa_init", "pissa_convert", "pissa_iter"), off(INITS["pissa"])),
    **dict.fromkeys(("use_olora", "olora"), off(INITS["olora"])),
    **dict.fromkeys(("use_eva", "eva", "eva_config"), _unless_idle(INITS["eva"], "false")),
    **dict.fromkeys(("use_loftq", "loftq", "loftq_config", "loftq_bits", "loftq_iter"), off(INITS["loftq"])),
    **dict.fromkeys(("use_corda", "corda", "corda_config"), _unless_idle(INITS["corda"], "false")),
    **dict.fromkeys(("use_lora_ga", "lora_ga", "lora_ga_config"), _unless_idle(INITS["lora_ga"], "false")),
    **dict.fromkeys(("lora_bias", "bias", "train_bias"), _unless_idle(_BIAS, "none", "false")),
    **dict.fromkeys(("layers_to_transform", "layers_pattern", "exclude_modules"), _unless_idle(_BLOCKS)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), _unless_idle(_ONE, "{}")),
    "trainable_token_indices": _unless_idle("tokens are named by --train_tokens"),
    "ensure_weight_tying": off(_TOKENS),
    "lora_on_embeddings": off(_TOKENS),
    "peft_type": _kind,
    **dict.fromkeys(
        ("num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text", "prefix_projection", "token_dim",
         "encoder_hidden_size", "encoder_reparameterization_type", "use_prompt_tuning", "use_p_tuning",
         "use_prefix_tuning", "prompt_tuning", "p_tuning", "prefix_tuning", "pre_seq_len"),
        off(_PROMPTS),
    ),
    **{
        name: off(f"{label} is not supported. {_PLAIN}")
        for name, label in {
            "use_qalora": "QA-LoRA",
            "qalora_group_size": "QA-LoRA",
            "use_bdlora": "BD-LoRA",
            "velora_config": "VeLoRA",
            "monteclora_config": "MonteCLoRA",
            "arrow_config": "Arrow",
            "alora_invocation_tokens": "aLoRA",
            "use_alora": "aLoRA",
            "megatron_config": "Megatron's LoRA",
            "megatron_core": "Megatron's LoRA",
            "layer_replication": "replication of layers",
            "target_parameters": "LoRA on parameters of experts",
            "lora_fan_in_fan_out": "fan_in_fan_out, which no Qwen-VL needs,",
            "fan_in_fan_out": "fan_in_fan_out, which no Qwen-VL needs,",
            "use_vera": "VeRA",
            "use_adalora": "AdaLoRA",
            "use_loha": "LoHa",
            "use_lokr": "LoKr",
            "use_oft": "OFT",
            "use_boft": "BOFT",
            "use_ia3": "(IA)3",
            "use_randlora": "RandLoRA",
            "use_delora": "DeLoRA",
            "use_lora_fa": "LoRA-FA",
        }.items()
    },
}  # fmt: skip
