"""What becomes of a foreign flag, and the small rules that the tables of kits are written in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vlft.config.kinds import FALSE, TRUE


@dataclass(frozen=True, kw_only=True)
class Becomes:
    """Flags of ours that say the same. `note`: what is still to do or to know, as a short sentence."""

    flags: Mapping[str, tuple[str, ...]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Idle:
    """The value changes nothing here; `why`, in a few words."""

    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Cannot:
    """vlft does not do this: `why`, and what to do instead, as sentences without the last dot."""

    why: str


Outcome = Becomes | Idle | Cannot
Rule = Callable[[tuple[str, ...]], Outcome]
#: Said names and values -> (the names it speaks of, what they are together).
Together = Callable[[Mapping[str, tuple[str, ...]]], tuple[tuple[str, ...], Outcome] | None]


@dataclass(frozen=True, kw_only=True)
class Kit:
    """One kit's flags.

    Attributes:
        name: as its users call it.
        rules: flag -> what a value of it is here.
        together: rules for flags that only mean something side by side; those are not asked alone.
        marks: names that only this kit has and that `rules` lacks, to tell whose command line it is.
    """

    name: str
    rules: Mapping[str, Rule]
    together: tuple[Together, ...] = ()
    marks: frozenset[str] = field(default_factory=frozenset)

    @property
    def names(self) -> frozenset[str]:
        """Every flag it speaks of."""
        return frozenset(self.rules) | self.marks


def is_true(words: tuple[str, ...]) -> bool:
    """Whether a flag is set: bare, or with any word for true."""
    return not words or words[0].lower() in TRUE


def is_false(words: tuple[str, ...]) -> bool:
    return bool(words) and words[0].lower() in (*FALSE, "", "none", "null")


def flag(name: str, *words: str, note: str = "") -> Becomes:
    """`--name words` of ours."""
    return Becomes(flags={name: words}, note=note)


def renamed(name: str, note: str = "") -> Rule:
    """The same value under our name."""
    return lambda words: Becomes(flags={name: words}, note=note)


def idle(why: str) -> Rule:
    """Changes nothing, whatever its value."""
    return lambda words: Idle(why=why)


def cannot(why: str) -> Rule:
    """Not done here, whatever its value."""
    return lambda words: Cannot(why=why)


def off(why: str) -> Rule:
    """Idle where it is switched off (false, empty, none or 0), and not done here otherwise."""

    def rule(words: tuple[str, ...]) -> Outcome:
        zero = bool(words) and words[0].strip("0.") == "" and words[0] != ""
        return Idle(why="off") if is_false(words) or zero else Cannot(why=why)

    return rule


def on(why: str) -> Rule:
    """Idle where it is switched on, and not done here otherwise."""
    return lambda words: Idle(why="always so") if is_true(words) else Cannot(why=why)


def switch(*, true: Outcome, false: Outcome) -> Rule:
    """By its truth."""
    return lambda words: true if is_true(words) else false


def by_word(words: Mapping[str, Outcome], other: Rule) -> Rule:
    """By its value, in any letter case."""
    return lambda said: words[" ".join(said).lower()] if " ".join(said).lower() in words else other(said)


NOT_SUPPORTED = "not supported"
QUANTISED = cannot(
    "quantised bases are not supported. --optim adamw_8bit (pip install bitsandbytes) saves optimizer memory, "
    "--gradient_checkpointing true activations, --deepspeed zero3 weights"
)


def dtype(words: tuple[str, ...]) -> Outcome:
    """`torch_dtype` and its like: bf16 and fp16 are autocast here, over the dtype the base is stored in."""
    word = words[0].lower() if words else ""
    if word in ("bfloat16", "bf16"):
        return flag("bf16", "true")
    if word in ("float16", "fp16"):
        return flag("fp16", "true")
    if word in ("float32", "fp32"):
        return flag("bf16", "false")
    return Idle(why="the dtype follows the base and --bf16")


def attention(words: tuple[str, ...]) -> Outcome:
    """Names of attention implementations."""
    word = words[0].lower() if words else ""
    if word in ("flash_attention_2", "flash_attn", "fa2", "flash_attn_2", "auto", "flash_attention", ""):
        return Idle(why="--attn auto takes the fastest kernel that is there")
    if word in ("flash_attention_3", "flash_attn_3", "fa3", "flash_attention_4", "fa4"):
        return flag("attn", "fa4")
    if word in ("sdpa", "eager", "disabled", "xformers"):
        return flag("attn", "sdpa")
    return flag("attn", "auto", note=f"{word} is unknown here")


def lora_target(words: tuple[str, ...]) -> Outcome:
    """Lists of modules: all linears, or those of attention."""
    names = {name.strip(" []'\"") for word in words for name in word.split(",")} - {""}
    if names <= {"all", "all-linear", "all_linear"} or names >= {"q_proj", "gate_proj"}:
        return flag("lora_target", "all")
    if names <= {"q_proj", "k_proj", "v_proj", "o_proj", "qkv", "proj"}:
        whole = "" if names >= {"q_proj", "k_proj", "v_proj", "o_proj"} else "it adapts q, k, v and o"
        return flag("lora_target", "attention", note=whole)
    return flag("lora_target", "all", note="here it is all linears, or those of attention")


_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tar")


def data(words: tuple[str, ...], *, to: str = "data_path") -> Becomes:
    """Names of data sets: files and folders stay, names of a registry need their files."""
    import os

    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    plain = [name.rpartition("#")[0] if name.rpartition("#")[2].isdigit() else name for name in names]
    note = ""
    if plain != names:
        note = "#N takes N rows: here --data_mix with cap does"
    if unknown := [name for name in plain if not (name.endswith(_FILES) or os.path.exists(name))]:
        plain = [f"{name}.json" if name in unknown else name for name in plain]
        note = f"{unknown[0]} is the name of a data set there: give its file or folder"
    extra = {"eval_strategy": ("epoch",)} if to == "eval_path" else {}
    return Becomes(flags={to: tuple(plain), **extra}, note=note)


def held_out(words: tuple[str, ...]) -> Outcome:
    """A share of the training rows to evaluate on."""
    if words and words[0].strip("0.") == "":
        return Idle(why="no rows are held out")
    return Becomes(
        flags={"eval_path": ("held_out.json",), "eval_strategy": ("epoch",)},
        note="rows are not split here: put held-out rows into a file of their own",
    )
