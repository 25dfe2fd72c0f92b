"""Flags of preference tuning (`--method dpo`, `orpo`, `simpo`): what they are, which of them act, and their defaults.

Imports nothing heavy: `vlft.config.checks` compares the flags before anything is parsed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from vlft.config.row_flags import flag
from vlft.config.values import Values

DpoLoss = Literal["sigmoid", "ipo", "hinge"]
Reference = Literal["cached", "live", "none"]

#: Method -> the flags of `PreferenceFlags` that it uses.
USED: Mapping[str, tuple[str, ...]] = {
    "sft": (),
    "dpo": ("dpo_loss", "beta", "rpo_alpha", "label_smoothing", "reference"),
    "orpo": ("orpo_lambda",),
    "simpo": ("beta", "simpo_gamma", "label_smoothing"),
    "grpo": ("beta",),
}
#: Methods that read preference rows.
METHODS = ("dpo", "orpo", "simpo")
#: Method -> default of `--beta`. That of SimPO is its paper's (arXiv 2405.14734, section 4).
BETA: Mapping[str, float] = {"dpo": 0.1, "simpo": 2.0}


@dataclass
class PreferenceFlags:
    """How a run learns from preference rows."""

    dpo_loss: DpoLoss = flag("sigmoid", "loss of --method dpo")
    beta: float | None = flag(
        None,
        "dpo and grpo: how strongly the model is kept near the reference; simpo: scale of the rewards (default: 0.1 "
        "for dpo, 2 for simpo, 0 for grpo)",
    )
    rpo_alpha: float = flag(0.0, "dpo: weight of the cross-entropy per token of the chosen answers, added to the loss")
    label_smoothing: float = flag(0.0, "dpo (sigmoid) and simpo: probability that the answers of a row are swapped")
    simpo_gamma: float = flag(1.0, "simpo: by how much the reward of the chosen answer should be higher")
    orpo_lambda: float = flag(0.1, "orpo: weight of the odds ratio; TRL calls it beta")
    reference: Reference = flag(
        "cached",
        "dpo: log-probabilities of the model at its start. cached: computed once, before the first step; live: with "
        "the adapter switched off, in every step; none: no reference",
    )


def beta_of(method: str, flags: PreferenceFlags) -> float:
    """`--beta`, or its default for this method; 0 for a method without it."""
    return BETA.get(method, 0.0) if flags.beta is None else flags.beta


def settings_of(method: str, flags: PreferenceFlags) -> dict[str, Any]:
    """The flags that a method uses, with their values: what a run and the resumed run have in common."""
    return {name: beta_of(method, flags) if name == "beta" else getattr(flags, name) for name in USED[method]}


def unused(method: str) -> list[str]:
    """Names of the flags of `PreferenceFlags` that a method does not use, in alphabetical order."""
    return sorted({name for names in USED.values() for name in names} - set(USED[method]))


def defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of other flags that the method changes. Preference tuning moves a trained model by little.

    Args:
        values: flag -> value, for the flags that were given.
    """
    if values.get("method", "sft") not in METHODS:
        return {}
    full = "full" in (values.get("language"), values.get("vision"))
    return {"learning_rate": 5e-7 if full else 5e-6, "lora_dropout": 0.0, "num_train_epochs": 1.0}


def problems(values: Values) -> Iterator[str]:
    """Yield a message for each flag of preference tuning that has no effect or cannot be carried out."""
    method = values.of("method")
    for name in unused(method):
        if values.given(name) and values.of(name) != getattr(PreferenceFlags, name):
            of = " or ".join(other for other, names in USED.items() if name in names)
            yield (
                f"--{name} {values.of(name)} has no effect with --method {method}: it belongs to --method {of}. Drop "
                "one of the two."
            )
    if method not in METHODS:
        return
    if values.of("beta") == 0 and "beta" in USED[method]:
        yield f"--beta is 0, must be more than 0 with --method {method}: nothing would be learned from the answers."
    yield from _losses(values, method)
    if values.given("lora_dropout") and values.of("lora_dropout"):
        yield (
            f"--lora_dropout {values.of('lora_dropout'):g} with --method {method}: the two answers of a row would be "
            "compared with different parts of the model dropped. Drop it; the default is 0."
        )
    if values.given("turns") and values.of("turns") != "auto":
        yield (
            f"--turns {values.of('turns')} has no effect with --method {method}: only the last answers of a preference "
            "row are trained. Drop it."
        )
    if method == "dpo" and values.of("reference") == "live":
        yield from _live(values)


def _losses(values: Values, method: str) -> Iterator[str]:
    kind = values.of("dpo_loss") or PreferenceFlags.dpo_loss
    if method == "dpo" and kind != "sigmoid" and values.of("label_smoothing"):
        yield (
            f"--label_smoothing {values.of('label_smoothing'):g} has no effect with --dpo_loss {kind}. Drop it, or use "
            "--dpo_loss sigmoid."
        )


def _live(values: Values) -> Iterator[str]:
    if values.given("adapter"):
        yield (
            f"--reference live with --adapter {values.of('adapter')}: with the adapter switched off, the model is the "
            "base and not the start of the run. Use --reference cached."
        )
    elif "lora" not in [values.of(tower) for tower in ("vision", "merger", "language")]:
        yield (
            "--reference live needs an adapter that can be switched off, and no tower is lora: the reference would "
            "change with each step. Use --reference cached."
        )
    if str(values.of("deepspeed") or "").startswith("zero3"):
        yield "--reference live with ZeRO-3 would gather all weights twice in a step. Use --reference cached."
