"""Flags of LoRA's variants: DoRA, rsLoRA and LoRA+. Imports nothing heavy.

Neighbours: `vlft.config.checks` calls `problems` before anything is parsed. `vlft.config.kits.adapters` has the
variants that vlft does not train.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vlft.config.deepspeed import names_zero3
from vlft.config.values import Values

_TOWERS = ("vision", "merger", "language")
#: Why no run trains DoRA with dropout.
DROPOUT = (
    "DoRA scales the base's own output, so peft would drop inputs of the frozen weights too, and multiply by them a "
    "second time in each step. The default is 0 with DoRA"
)


def defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults of other flags that a variant changes.

    Args:
        values: flag -> value, or the word that sets it, for the flags that were given.
    """
    return {"lora_dropout": 0.0} if str(values.get("use_dora")).lower() == "true" else {}


def problems(values: Values, verb: str) -> Iterator[str]:
    """Yield a message for each combination of these flags with others that cannot be carried out."""
    used = [name for name in ("use_dora", "use_rslora", "loraplus_ratio") if values.of(name)]
    if used and verb != "bench":
        yield from _without_lora(values, used)
    if values.of("use_dora"):
        yield from _dora(values)


def _without_lora(values: Values, used: list[str]) -> Iterator[str]:
    if values.given("adapter") and not all(values.given(tower) for tower in _TOWERS):
        return  # the adapter decides, and is read later
    modes = {tower: values.of(tower) for tower in _TOWERS}
    if "lora" in modes.values():
        return
    shown = ", ".join(f"{tower} {mode}" for tower, mode in modes.items())
    for name in used:
        yield f"--{name} {_word(values.of(name))} has no effect: no tower is lora ({shown}). Drop it."


def _dora(values: Values) -> Iterator[str]:
    if values.given("lora_dropout") and values.of("lora_dropout"):
        yield f"--lora_dropout {values.of('lora_dropout'):g} with --use_dora true: {DROPOUT}. Drop one of the two."
    if values.given("deepspeed") and names_zero3(str(values.of("deepspeed"))):
        yield (
            f"--use_dora true with --deepspeed {values.of('deepspeed')}: DoRA needs the length of each row of every "
            "adapted weight, and ZeRO-3 splits the weights over the processes. Use --deepspeed zero2, or drop "
            "--use_dora."
        )


def _word(value: Any) -> str:
    return "true" if value is True else f"{value:g}"
