"""Rules for variants of LoRA and for chosen blocks, which several kits have under similar names."""

from __future__ import annotations

from vlft.config.kits.outcome import Becomes, Cannot, Idle, Outcome, Rule, by_word, flag, is_false, switch

DORA = switch(true=flag("use_dora", "true"), false=Idle(why="off"))
RSLORA = switch(true=flag("use_rslora", "true"), false=Idle(why="off"))
PISSA = Cannot(
    why="PiSSA and OLoRA change the weights of the base itself, so the adapter does not fit the base in its folder. "
    "Plain LoRA, --use_dora and --use_rslora do"
)
_INITIAL = Cannot(why="LoRA always starts from the base itself: A is random, B is zero")
#: Values of peft's `init_lora_weights`.
INITIAL: Rule = by_word(
    {"true": Idle(why="always so"), "": Idle(why="always so"), **dict.fromkeys(("pissa", "olora"), PISSA)},
    lambda words: PISSA if "".join(words).lower().startswith("pissa") else _INITIAL,
)


def loraplus(words: tuple[str, ...]) -> Outcome:
    """Translate the ratio of LoRA+. A value that is off has no effect."""
    return Idle(why="off") if is_false(words) or words == ("0",) else Becomes(flags={"loraplus_ratio": words})


def last_blocks(words: tuple[str, ...], tower: str) -> dict[str, tuple[str, ...]] | None:
    """The flags that train the last blocks of a tower in full; the first ones for a negative number; None for 0."""
    try:
        count = int("".join(words) or "0")
    except ValueError:
        count = 0
    if not count:
        return None
    chosen = f"last:{count}" if count > 0 else "0" if count == -1 else f"0-{-count - 1}"
    return {tower: ("full",), f"{tower}_blocks": (chosen,)}
