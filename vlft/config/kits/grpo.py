"""Flags of GRPO in other kits: TRL's GRPOConfig and scripts, 2U1's train_grpo.py, ms-swift's `--rlhf_type grpo`.

Most of these names mean something else, or nothing, in other trainings, so `vlft.config.translate` asks here only if
the flags are those of GRPO, and before it asks anything else. Where vlft has the flag, its name is TRL's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vlft.config.grpo import NAMES
from vlft.config.kits.outcome import Becomes, Cannot, Idle, Outcome, Rule, cannot, idle, is_false, off
from vlft.config.rewards import BUILT_IN

#: Flags that name the method. Each kit has one of them.
_METHODS = ("method", "rlhf_type", "rl")
#: Flags of GRPO that vlft has. Kits have other flags of the same names.
OURS = (*NAMES, "beta")
#: Reward of a kit -> ours, and how ours differs. Patterns: TRL's think_format_reward, ms-swift's and 2U1's format.
_REWARDS: Mapping[str, tuple[str, str]] = {
    **dict.fromkeys(
        ("accuracy", "accuracy_reward"), ("exact_match", "accuracy also reads formulas, and parts of a text")
    ),
    **dict.fromkeys(("format", "format_reward"), (r"format:<think>.*?</think>\s*<answer>.*?</answer>", "")),
    "think_format_reward": ("format:<think>(?!.*<think>).*?</think>.*", ""),
}
_OWN = "Write it as a function: --reward FILE.py:FUNCTION"


def asked(said: Mapping[str, Sequence[str]]) -> bool:
    """Whether flags are those of GRPO: one names it, or rewards are given and no method is.

    Args:
        said: flag -> its words.
    """
    named = next((said[name][-1].lower() for name in _METHODS if said.get(name)), "")
    return named == "grpo" or (not named and "reward_funcs" in said)


def rule_of(name: str) -> Rule | None:
    """The rule for a flag of a GRPO run; None if it means the same in other trainings."""
    return cannot(_VLLM) if name.startswith("vllm_") else _RULES.get(name)


def _rewards(words: tuple[str, ...]) -> Outcome:
    names = [name.strip(" []'\"") for word in words for name in word.split(",")]
    ours, notes, unknown = [], [], []
    for name in filter(None, names):
        if name in BUILT_IN or ".py:" in name or name.startswith("format:"):
            ours.append(name)
        elif name in _REWARDS:
            ours.append(_REWARDS[name][0])
            notes.append(_REWARDS[name][1])
        elif all(part.isidentifier() for part in name.split(".")) and "." in name:
            ours.append("{}.py:{}".format(*name.replace(".", "/").rpartition("/")[::2]))
        else:
            unknown.append(name)
    if not ours:
        return Cannot(why=f"vlft has no such reward: {', '.join(unknown) or 'none is named'}. {_OWN}")
    if unknown:
        notes.append(f"without {', '.join(unknown)}, which vlft does not have. {_OWN}")
    return Becomes(flags={"method": ("grpo",), "reward": tuple(ours)}, note="; ".join(filter(None, notes)))


def _weights(words: tuple[str, ...]) -> Outcome:
    each = [part for word in words for part in word.strip("[]").replace(",", " ").split()]
    if is_false(words) or all(part in ("1", "1.0") for part in each):
        return Idle(why="rewards are added")
    return Cannot(
        why="rewards are added as they are. Multiply them by their weights in a function: --reward FILE.py:FUNCTION"
    )


def _fixed(*values: str, why: str) -> Rule:
    """A rule for a setting that has TRL's default here. Other values are not supported."""

    def rule(words: tuple[str, ...]) -> Outcome:
        return Idle(why="always so") if " ".join(words).lower() in values else Cannot(why=why)

    return rule


_VLLM = "vLLM does not sample completions yet. --rollout hf does"
_SAMPLED = "completions are sampled with --temperature and --top_p only"
_LOSS = "the loss is dapo, TRL's default, and its settings have TRL's defaults"
_SAME = ("none", "null")
_AT_ONCE = cannot(
    "the completions of a step are sampled at once. --per_device_train_batch_size counts completions, --global_batch "
    "prompts"
)
_MODEL = cannot(f"a reward is a function, not a model. {_OWN}, which may load a model")
_RULES: Mapping[str, Rule] = {
    "reward_funcs": _rewards,
    "reward_weights": _weights,
    **dict.fromkeys(
        (
            "reward_model",
            "reward_model_name_or_path",
            "reward_model_type",
            "reward_adapters",
            "reward_processing_classes",
        ),
        _MODEL,
    ),
    "reward_model_plugin": _MODEL,
    "external_plugins": cannot(f"plugins are not supported. {_OWN}"),
    "loss_type": _fixed("dapo", why=_LOSS),
    "epsilon": _fixed("0.2", *_SAME, why=_LOSS),
    "epsilon_high": _fixed("0.2", *_SAME, why=_LOSS),
    "delta": _fixed(*_SAME, why=_LOSS),
    "scale_rewards": _fixed("group", "true", "", why=_LOSS),
    "importance_sampling_level": _fixed("token", why=_LOSS),
    "mask_truncated_completions": off(_LOSS),
    "overlong_filter": off(_LOSS),
    "top_entropy_quantile": _fixed("1", "1.0", why=_LOSS),
    "num_iterations": _fixed("1", why="completions are used for one update"),
    "steps_per_generation": _AT_ONCE,
    "generation_batch_size": _AT_ONCE,
    "num_generations_eval": idle("a run with --method grpo does not evaluate"),
    "top_k": _fixed("0", "-1", *_SAME, why=_SAMPLED),
    "min_p": _fixed("0", "0.0", *_SAME, why=_SAMPLED),
    "repetition_penalty": _fixed("1", "1.0", *_SAME, why=_SAMPLED),
    "generation_kwargs": _fixed("{}", *_SAME, why=_SAMPLED),
    "use_vllm": off(_VLLM),
    "max_prompt_length": cannot("no prompt is cut. --max_length limits a prompt with its completion"),
    "sync_ref_model": off("the reference is the start of the run"),
}
