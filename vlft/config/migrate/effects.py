"""Flags of a translated run that could not act here, and values that vlft refuses beside others.

Neighbours: `settle` leaves these flags out or changes them, and lists why.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlft.config import grpo, preference
from vlft.config.kinds import Bool
from vlft.config.values import DEFAULTS

Flags = dict[str, tuple[str, ...]]
_LORA = ("lora_rank", "lora_alpha", "lora_dropout", "lora_target", "use_dora", "use_rslora", "loraplus_ratio")
_OF_EVALUATION = (
    *("load_best_model_at_end", "eval_on_start", "metric_for_best_model", "greater_is_better", "eval_metric"),
    *("early_stopping_patience", "early_stopping_threshold"),
)
SIZES = ("global_batch", "gradient_accumulation_steps", "per_device_train_batch_size")


def without_effect(flags: Flags) -> Iterator[tuple[str, str]]:
    """Yield (flag, why) for flags that the door would refuse, because they could not act."""

    def word(name: str, default: str = "") -> str:
        return flags[name][-1].lower() if flags.get(name) else default

    modes = {tower: word(tower, str(DEFAULTS[tower])) for tower in ("vision", "merger", "language")}
    for tower in ("vision", "merger"):
        if f"{tower}_lr" in flags and modes[tower] == "frozen":
            yield f"{tower}_lr", f"--{tower} is frozen"
    if "lora" not in modes.values():
        yield from ((name, "no tower is trained by LoRA") for name in _LORA if name in flags)
    if modes["language"] != "lora":
        yield from (
            (name, f"only a language model that trains by LoRA is quantised, and --language is {modes['language']}")
            for name in ("bits", "quant_type", "double_quant")
            if name in flags
        )
    method = word("method", "sft")
    yield from (
        (name, f"it belongs to another method than {method}")
        for name in (*preference.unused(method), *grpo.unused(method))
        if name in flags
    )
    if method != "sft" and word("lora_dropout", "0").strip("0."):
        where = "while completions are sampled" if method == "grpo" else "in preference training, as in the other kits"
        yield "lora_dropout", f"dropout is off {where}"
    if method == "grpo":
        if "deepspeed" in flags:
            yield "deepspeed", "it was not tried with --method grpo; processes that torchrun starts share the prompts"
        evaluation = (*grpo.EVALUATION, "per_device_eval_batch_size")
        yield from ((name, "a run with --method grpo does not evaluate") for name in evaluation if name in flags)
        return
    evaluates = "eval_path" in flags or "eval_split" in flags
    if "eval_path" in flags and "eval_split" in flags:
        yield "eval_split", "--eval_path sets the evaluation rows"
    if not evaluates and word("eval_strategy", "no") != "no":
        yield "eval_strategy", "no evaluation rows are set: --eval_path FILE or --eval_split 0.05"
    if not evaluates:
        for name in _OF_EVALUATION:
            if name in flags:
                yield name, "it needs evaluation rows: --eval_path FILE or --eval_split 0.05"
    if not evaluates and word("save_strategy") == "best":
        yield "save_strategy", "it needs evaluation rows: --eval_path FILE or --eval_split 0.05"
    if "optim_args" in flags and "optim" not in flags:
        yield "optim_args", "it belongs to another optimizer"
    if evaluates and word("eval_strategy", "no") == "no":
        yield from ((name, "--eval_strategy is no") for name in ("eval_path", "eval_split") if name in flags)
    if "global_batch" in flags:
        yield from ((name, "--global_batch sets the rows of a step") for name in SIZES[1:] if name in flags)
    if "logging_nan_inf_filter" in flags:
        yield "logging_nan_inf_filter", "no loss is hidden"
    if word("dataloader_num_workers") == "0" and "dataloader_prefetch_factor" in flags:
        yield "dataloader_prefetch_factor", "there are no loader processes"
    timeout = word("ddp_timeout")
    if timeout.isdigit() and int(timeout) < DEFAULTS["stall_timeout"] + 300 and "stall_timeout" not in flags:
        yield "ddp_timeout", "a process that stops is reported after --stall_timeout seconds"
    if word("deepspeed") and "max_nonfinite_steps" in flags:
        yield "max_nonfinite_steps", "DeepSpeed updates the weights before the gradient can be checked"


def adjusted(flags: Flags) -> Iterator[str]:
    """Change values that vlft refuses beside a quantised base or DoRA. Yields a note for each."""
    quantised = flags.get("bits", ("16",)) != ("16",)
    dora = "use_dora" in flags and Bool().value(flags["use_dora"][-1])
    what = f"--bits {flags['bits'][-1]}" if quantised else "--use_dora" if dora else ""
    zero = flags.get("deepspeed", ("",))[-1]
    if what and zero in ("zero3", "zero3_offload"):
        flags["deepspeed"] = (zero.replace("3", "2"),)
        yield f"--deepspeed {zero} became {flags['deepspeed'][0]}: ZeRO-3 cannot split the weights of {what}"
    if dora and flags.get("lora_dropout", ("by default",))[-1].strip("0."):
        flags["lora_dropout"] = ("0",)
        yield "--lora_dropout became 0: DoRA trains without dropout here"
