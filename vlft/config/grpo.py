"""Flags of `--method grpo`: what they are, their defaults, and which other flags they exclude.

Imports nothing heavy: `vlft.config.checks` compares the flags before anything is parsed. `vlft.config.rewards` reads
the words of `--reward`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from vlft.config.rewards import read_rewards
from vlft.config.row_flags import flag
from vlft.config.values import DEFAULTS, Values
from vlft.errors import ConfigError

Rollout = Literal["hf", "vllm"]
GENERATIONS = 8
COMPLETION = 256
PRINTED = 8
#: Flags that change nothing of what is trained.
FREE = ("reward_timeout", "equal_rewards_steps", "log_completions", "num_completions_to_print")
#: Flags of other features that have no effect with GRPO or were not tried with it -> why, and what to do.
REFUSED: Mapping[str, str] = {
    "pack_tokens": "completions are padded, not packed",
    "pack_patches": "completions are padded, not packed",
    "cache_vision_features": "a picture is encoded again for each completion, and nothing is read from the cache",
    "over_length": "a prompt is not cut or shrunk. Raise --max_length, or skip such rows with --on_bad_row skip",
}
#: Flags of evaluations during the run.
EVALUATION = (
    *("eval_path", "eval_split", "eval_strategy", "eval_on_start", "eval_metric", "load_best_model_at_end"),
    *("metric_for_best_model", "greater_is_better", "early_stopping_patience", "early_stopping_threshold"),
)


@dataclass
class GrpoFlags:
    """How a run learns from rewards. The names are those of TRL."""

    reward: list[str] = field(
        default_factory=list,
        metadata={
            "help": "what a completion is worth, one or more, which are added: exact_match, edit_ratio, iou, "
            "format:REGEX, or FILE.py:FUNCTION with TRL's signature reward(completions, **columns)"
        },
    )
    num_generations: int = flag(GENERATIONS, "completions of a prompt, which are compared with each other")
    temperature: float = flag(1.0, "temperature at which completions are sampled")
    top_p: float = flag(1.0, "sample from the most likely tokens that together have this probability")
    rollout: Rollout = flag("hf", "what samples completions: hf, generate of transformers; vllm is not supported yet")
    reward_timeout: float = flag(60, "seconds that one call of a reward may take before the run ends with a message")
    equal_rewards_steps: int = flag(
        10, "steps in a row without any difference of rewards in a group, after which the run says so"
    )
    log_completions: Literal["auto", "true", "false"] = flag(
        "auto",
        "keep a sample of the completions in completions.jsonl and in the report; true: also print some at each "
        "logged step; false: keep none",
    )
    num_completions_to_print: int = flag(
        PRINTED, "most completions that --log_completions true prints at a logged step"
    )


#: The flags of GRPO. `DataFlags` declares the length of a completion, which also decides which rows are refused.
NAMES = (*(one.name for one in fields(GrpoFlags)), "max_completion_length")


def settings_of(method: str, *flags: object) -> dict[str, Any]:
    """The flags of GRPO with their values: what a run and the resumed run have in common.

    Args:
        method: `--method`.
        flags: the objects that hold them.
    """
    same = [name for name in NAMES if name not in FREE] if method == "grpo" else []
    return {name: getattr(one, name) for one in flags for name in same if hasattr(one, name)}


def unused(method: str) -> list[str]:
    """Names of the flags of GRPO that a method does not use."""
    return [] if method == "grpo" else sorted(NAMES)


def defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of other flags that GRPO changes.

    The micro-batch holds the completions of one prompt; the rate is TRL's 1e-6 for full weights of the language model
    or the vision tower, or of a merger alone, and ten times as much for LoRA; dropout would sample from another model
    than is trained.

    Args:
        values: flag -> value, for the flags that were given.
    """
    if values.get("method") != "grpo":
        return {}
    modes = [values.get(tower, DEFAULTS[tower]) for tower in ("language", "vision", "merger")]
    full = "full" in modes[:2] or ("full" in modes and "lora" not in modes)
    return {
        "packing": False,
        "per_device_train_batch_size": values.get("num_generations", GENERATIONS),
        "learning_rate": 1e-6 if full else 1e-5,
        "lora_dropout": 0.0,
        "num_train_epochs": 1.0,
    }


def problems(values: Values) -> Iterator[str]:
    """Yield a message for each flag of GRPO that has no effect or cannot be carried out."""
    method = values.of("method")
    if method != "grpo":
        for name in NAMES:
            if values.given(name):
                shown = " ".join(map(str, values.every(name)))
                yield (
                    f"--{name} {shown} has no effect with --method {method}: it belongs to --method grpo. Drop one of "
                    "the two."
                )
        return
    try:
        read_rewards(values.every("reward"))
    except ConfigError as error:
        yield str(error)
    yield from _others(values)
    yield from _batches(values)


def _others(values: Values) -> Iterator[str]:
    evaluates = [
        f"--{name}" for name in EVALUATION if values.given(name) and values.of(name) not in (None, False, "no", 0)
    ]
    if values.of("save_strategy") == "best":
        evaluates.append("--save_strategy best")
    if evaluates:
        yield (
            f"{', '.join(evaluates)}: a run with --method grpo does not evaluate, because TRL's trainer would need "
            "completions for it. Leave evaluation out, and evaluate the model of the run: vlft eval"
        )
    for name, why in REFUSED.items():
        if values.given(name) and values.of(name) not in (False, "error", "skip"):
            yield f"--{name} has no effect with --method grpo: {why}."
    if values.given("packing") and values.of("packing"):
        yield "--packing true has no effect with --method grpo: completions are padded, not packed. Drop it."
    if values.of("lora_dropout"):
        yield (
            f"--lora_dropout {values.of('lora_dropout'):g} with --method grpo: completions would be sampled with parts "
            "of the model dropped, and scored with other parts dropped. Drop it; the default is 0."
        )
    if values.of("turns") == "split":
        yield (
            "--turns split with --method grpo: a completion answers the last question of a row. Write a row for each "
            "question, or drop it."
        )
    if values.of("rollout") == "vllm":
        yield (
            "--rollout vllm is not supported yet: vLLM takes no LoRA on the vision tower or merger, and no prompt with "
            "several pictures from TRL (huggingface/trl issue 4488). Use --rollout hf."
        )
    if str(values.of("bits")) != "16":
        yield (
            f"--bits {values.of('bits')} with --method grpo: TRL rounds the adapter of a quantised base to bf16. Use "
            "--bits 16."
        )
    if values.given("deepspeed"):
        yield (
            f"--deepspeed {values.of('deepspeed')} with --method grpo was not tried. Drop it: processes that torchrun "
            "starts share the prompts of a step."
        )
    if values.given("num_completions_to_print") and values.of("log_completions") not in ("true", True):
        many = values.of("num_completions_to_print")
        if many != PRINTED:
            yield (
                f"--num_completions_to_print {many} has no effect without --log_completions true, which prints "
                "completions. Add it, or drop this one."
            )
    if values.of("beta"):
        yield from _reference(values)


def _reference(values: Values) -> Iterator[str]:
    if values.given("adapter"):
        yield (
            f"--beta {values.of('beta'):g} with --adapter {values.of('adapter')}: the reference is the model without "
            "its adapter, which is not the start of this run. Merge the adapter first, or drop --beta."
        )
    elif "lora" not in [values.of(tower) for tower in ("vision", "merger", "language")]:
        yield (
            f"--beta {values.of('beta'):g} needs an adapter that can be switched off for the reference, and no tower "
            "is lora. Drop it, or use lora."
        )


def _batches(values: Values) -> Iterator[str]:
    group = values.of("num_generations") or GENERATIONS
    world = values.of("gpus") or int(os.environ.get("WORLD_SIZE", "1"))  # vlft plan has --gpus
    size = values.of("per_device_train_batch_size") if values.given("per_device_train_batch_size") else group
    if values.given("global_batch"):
        wanted = values.of("global_batch") * group
        if wanted % (size * world):
            yield (
                f"--global_batch {values.of('global_batch')} x {group} completions (--num_generations) is not a "
                f"multiple of {size * world} (--per_device_train_batch_size {size} x {world} processes). Change one of "
                "them."
            )
        return
    accumulation = values.of("gradient_accumulation_steps") or 1
    if size * world * accumulation % group:
        yield (
            f"a step has {size * world * accumulation} completions (--per_device_train_batch_size {size} x "
            f"--gradient_accumulation_steps {accumulation} x {world} processes), which is not a multiple of "
            f"--num_generations {group}. Change one of them."
        )
