"""Check `--lr_scheduler_kwargs` and `--optim_args` for each schedule and optimizer (transformers 5.17 to 5.23).

transformers reads both only after model and data are loaded, and ignores most unknown names.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from vlft.config.kinds import Bool, Kind, Number, Word
from vlft.config.values import Values

_ABOVE = Number(low=0, open_low=True)
_FROM_0 = Number(low=0)
_SHARE = Number(low=0, high=1)
_BELOW_1 = Number(low=0, high=1, open_low=True, open_high=True)
_STEPS = Number(whole=True, low=0)
_SHAPE = Word(words=("linear", "cosine", "1-sqrt"))
_MODE, _THRESHOLD = Word(words=("min", "max")), Word(words=("rel", "abs"))
_PLATEAU: dict[str, Kind] = {
    "mode": _MODE,
    "factor": _BELOW_1,
    "patience": _STEPS,
    "threshold": _FROM_0,
    "threshold_mode": _THRESHOLD,
    "cooldown": _STEPS,
    "min_lr": _FROM_0,
    "eps": _FROM_0,
}
_MIN_LR: dict[str, Kind] = {"num_cycles": _ABOVE, "min_lr": _FROM_0, "min_lr_rate": _SHARE}

#: `--lr_scheduler_type` -> argument -> its kind.
SCHEDULES: Mapping[str, Mapping[str, Kind]] = {
    "linear": {},
    "cosine": {"num_cycles": _ABOVE},
    "cosine_with_restarts": {"num_cycles": Number(whole=True, low=1)},
    "polynomial": {"lr_end": _FROM_0, "power": _ABOVE},
    "constant": {},
    "constant_with_warmup": {},
    "inverse_sqrt": {"timescale": Number(whole=True, low=1)},
    "reduce_lr_on_plateau": _PLATEAU,
    "cosine_with_min_lr": _MIN_LR,
    "cosine_warmup_with_min_lr": _MIN_LR | {"warmup_lr_rate": _SHARE},
    "warmup_stable_decay": {
        "num_decay_steps": _STEPS,
        "num_stable_steps": _STEPS,
        "warmup_type": _SHAPE,
        "decay_type": _SHAPE,
        "min_lr_ratio": _SHARE,
        "num_cycles": _ABOVE,
    },
    "greedy": _PLATEAU
    | {
        "warmup": _STEPS,
        "max_lr": _FROM_0,
        "verbose": Bool(),
        "smooth": Bool(),
        "window_size": Number(whole=True, low=1),
        "reset_start": _STEPS,
    },
}
#: `--lr_scheduler_type` -> arguments (exactly one of them must be set), and an example.
NEEDED: Mapping[str, tuple[tuple[str, ...], str]] = {
    "cosine_with_min_lr": (("min_lr", "min_lr_rate"), '{"min_lr_rate": 0.1}'),
    "cosine_warmup_with_min_lr": (("min_lr", "min_lr_rate"), '{"min_lr_rate": 0.1}'),
    "warmup_stable_decay": (("num_decay_steps",), '{"num_decay_steps": 100}'),
}

_MOMENT = Number(low=0, high=1, open_high=True)
_MIX: dict[str, Kind] = {"beta1": _MOMENT, "beta2": _MOMENT, "beta3": _MOMENT, "alpha": _FROM_0, "eps": _ABOVE,
                         "t_alpha": _STEPS, "t_beta3": _STEPS}  # fmt: skip
_DTYPE = Word(words=("float32", "bfloat16", "float16"))
#: `--optim` -> argument of `--optim_args` that has an effect -> its kind.
OPTIM_ARGS: Mapping[str, Mapping[str, Kind]] = {
    "sgd": {"momentum": _MOMENT, "dampening": _MOMENT, "nesterov": Bool()},
    "adagrad": {"lr_decay": _FROM_0, "eps": _ABOVE},
    "rmsprop": {"momentum": _MOMENT, "alpha": _MOMENT, "eps": _ABOVE, "centered": Bool()},
    "adamw_anyprecision": {
        "use_kahan_summation": Bool(),
        **dict.fromkeys(("momentum_dtype", "variance_dtype", "compensation_buffer_dtype"), _DTYPE),
    },
    **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), _MIX),
    "grokadamw": dict.fromkeys(
        ("alpha_init", "lamb", "gamma", "grokking_signal_decay_rate", "gradient_clipping"), _FROM_0
    ),
    **{name: {"bf16_stochastic_round": Bool()} for name in ("adamw_torch_4bit", "adamw_torch_8bit")},
    # transformers reads any word for these two as true (5.17 to 5.23).
    "stable_adamw": {"max_lr": _ABOVE, **dict.fromkeys(("kahan_sum", "decouple_lr"), Word(words=("true",)))},
}


def scheduler_problems(values: Values) -> Iterator[str]:
    """Yield a message for each error in the arguments of the schedule and the optimizer."""
    name, text = str(values.of("lr_scheduler_type")), values.of("lr_scheduler_kwargs")
    if name in ("reduce_lr_on_plateau", "greedy") and values.of("eval_strategy") == "no":
        yield (
            f"--lr_scheduler_type {name} follows evaluations: it needs --eval_path FILE or --eval_split 0.05, and "
            "--eval_strategy steps or epoch"
        )
    said: Any = {}
    if text is not None:
        try:
            said = json.loads(str(text))
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            yield f'--lr_scheduler_kwargs {text}: must be a JSON object such as {{"num_cycles": 0.5}}'
            return
    yield from _named(f"--lr_scheduler_type {name}", "--lr_scheduler_kwargs", said, SCHEDULES.get(name, {}))
    needed, example = NEEDED.get(name, ((), ""))
    if needed and len(set(needed) & set(said)) != 1:
        which = f"one of {' and '.join(needed)}" if len(needed) > 1 else needed[0]
        yield f"--lr_scheduler_type {name} needs {which}: --lr_scheduler_kwargs '{example}'"
    if name == "polynomial":
        yield from _ends_lower(values, said)
    if (text := values.of("optim_args")) is not None:
        yield from _optim_args(str(values.of("optim")), str(text))


def _ends_lower(values: Values, said: Mapping[str, Any]) -> Iterator[str]:
    """Check `lr_end`. transformers compares it with the optimizer's default rate, which is --learning_rate."""
    end = said.get("lr_end", 1e-7)
    if isinstance(end, int | float) and not end < values.of("learning_rate"):
        yield (
            f"--lr_scheduler_type polynomial ends at lr_end {end:g}, which must be below --learning_rate "
            f"{values.of('learning_rate'):g}: --lr_scheduler_kwargs '{{\"lr_end\": 0}}'"
        )


def _optim_args(optim: str, text: str) -> Iterator[str]:
    pairs = [part.partition("=") for part in text.replace(" ", "").split(",")]
    if not text.strip() or any(not equals or not key or not value for key, equals, value in pairs):
        yield f"--optim_args {text or 'is empty'}: must be name=value, or several, separated by commas"
        return
    said = {key: value for key, _, value in pairs}
    found = list(_named(f"--optim {optim}", "--optim_args", said, OPTIM_ARGS.get(optim, {})))
    yield from found
    if found:
        return
    nesterov = Bool().value(said.get("nesterov", "false"))
    if nesterov and (not float(said.get("momentum", 0)) or float(said.get("dampening", 0))):
        yield "--optim_args nesterov=true needs momentum above 0 and no dampening, such as momentum=0.9,nesterov=true"


def _named(owner: str, flag: str, said: Mapping[str, Any], kinds: Mapping[str, Kind]) -> Iterator[str]:
    for key, value in said.items():
        if key not in kinds:
            takes = f"it takes {', '.join(kinds)}" if kinds else "it takes no arguments"
            yield f"{flag}: {key} has no effect, {owner} does not take it; {takes}"
            continue
        word = str(value)
        if (problem := kinds[key].problem(word)) is not None:
            yield f"{flag}: {key} is {word}, {problem.text}"
