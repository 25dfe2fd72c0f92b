"""Outcomes of translating a flag of another kit, and the rules that the tables of the kits consist of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vlft.config.kinds import FALSE, TRUE


@dataclass(frozen=True, kw_only=True)
class Becomes:
    """The flag is translated into flags of vlft.

    Attributes:
        flags: name -> words.
        note: what the user still has to do or know, as a short sentence; "" if nothing.
    """

    flags: Mapping[str, tuple[str, ...]]
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Idle:
    """The value has no effect in vlft.

    Attributes:
        why: the reason, in a few words; "" if there is none to give.
    """

    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Cannot:
    """vlft does not support the value.

    Attributes:
        why: the reason and what to do instead, as sentences without the final full stop.
    """

    why: str


Outcome = Becomes | Idle | Cannot
Rule = Callable[[tuple[str, ...]], Outcome]
#: Flags that were given -> (names of the flags that the rule translates, their common outcome).
Together = Callable[[Mapping[str, tuple[str, ...]]], tuple[tuple[str, ...], Outcome] | None]
#: (flags that were given, their translation so far) -> flags of vlft for the kit's defaults.
Defaults = Callable[[Mapping[str, tuple[str, ...]], Mapping[str, tuple[str, ...]]], Mapping[str, tuple[str, ...]]]


@dataclass(frozen=True, kw_only=True)
class Kit:
    """The flags of one kit.

    Attributes:
        name: the kit's name in messages.
        rules: flag -> the rule that translates its value.
        together: rules for flags that have a meaning only in combination. They act before `rules`.
        marks: flags that only this kit has and that `rules` lacks. They identify its command lines.
        synonyms: flags of another kit -> the flag of `together` with the same meaning, for a file that mixes kits.
        defaults: its defaults that change what is trained and differ from vlft's.
        batch: its defaults of rows of a micro-batch on one device, and of accumulation; None: as many as 16 rows need.
        remark: what it does in another way with any flags; "" if nothing.
    """

    name: str
    rules: Mapping[str, Rule]
    together: tuple[Together, ...] = ()
    marks: frozenset[str] = field(default_factory=frozenset)
    synonyms: Mapping[str, str] = field(default_factory=dict)
    defaults: Defaults = lambda said, flags: {}
    batch: tuple[int, int | None] = (1, 1)
    remark: str = ""

    @property
    def names(self) -> frozenset[str]:
        """Every flag of the kit that vlft knows."""
        return frozenset(self.rules) | self.marks


def is_true(words: tuple[str, ...]) -> bool:
    """Whether a flag is set: without a value, or with a word for true."""
    return not words or words[0].lower() in TRUE


def is_false(words: tuple[str, ...]) -> bool:
    return bool(words) and words[0].lower() in (*FALSE, "", "none", "null")


def flag(name: str, *words: str, note: str = "") -> Becomes:
    """Return the outcome `--name words`."""
    return Becomes(flags={name: words}, note=note)


def renamed(name: str, note: str = "") -> Rule:
    """Return a rule that keeps the value under vlft's name of the flag."""
    return lambda words: Becomes(flags={name: words}, note=note)


def idle(why: str) -> Rule:
    """Return a rule for a flag that has no effect with any value."""
    return lambda words: Idle(why=why)


NEW_TOKENS = (
    "no tokens are added to a base. Save a base whose tokenizer and embedding have them (transformers: add_tokens, "
    "resize_token_embeddings, save_pretrained), then train them with --train_tokens"
)


def cannot(why: str) -> Rule:
    """Return a rule for a flag that is not supported with any value."""
    return lambda words: Cannot(why=why)


def off(why: str) -> Rule:
    """Return a rule for a flag that has no effect if it is off (false, empty, none or 0), and is not supported else."""

    def rule(words: tuple[str, ...]) -> Outcome:
        zero = bool(words) and words[0].strip("0.") == "" and words[0] != ""
        return Idle(why="off") if is_false(words) or zero else Cannot(why=why)

    return rule


def on(why: str) -> Rule:
    """Return a rule for a flag that has no effect if it is on, and is not supported else."""
    return lambda words: Idle(why="always so") if is_true(words) else Cannot(why=why)


def switch(*, true: Outcome, false: Outcome) -> Rule:
    """Return a rule with one outcome for a true value and one for a false value."""
    return lambda words: true if is_true(words) else false


def by_word(words: Mapping[str, Outcome], other: Rule) -> Rule:
    """Return a rule with an outcome for each value, in any letter case, and another rule for other values."""
    return lambda said: words[" ".join(said).lower()] if " ".join(said).lower() in words else other(said)


def dtype(words: tuple[str, ...]) -> Outcome:
    """Translate `torch_dtype` and similar flags. In vlft bf16 and fp16 are autocast over the base's own dtype."""
    word = words[0].lower() if words else ""
    if word in ("bfloat16", "bf16", "bf16-mixed", "bf16-true"):
        return flag("bf16", "true")
    if word in ("float16", "fp16", "16-mixed"):
        return flag("fp16", "true")
    if word in ("float32", "fp32", "no", "32-true"):
        return flag("bf16", "false")
    return Idle(why="the dtype follows the base and --bf16")


def attention(words: tuple[str, ...]) -> Outcome:
    """Translate names of attention implementations."""
    word = words[0].lower() if words else ""
    if word in ("flash_attention_2", "flash_attn", "fa2", "flash_attn_2", "auto", "flash_attention", ""):
        return Idle(why="--attn auto picks the fastest kernel that is installed")
    if word in ("flash_attention_3", "flash_attn_3", "fa3"):
        return flag("attn", "fa3")
    if word in ("flash_attention_4", "flash_attn_4", "fa4"):
        return flag("attn", "fa4")
    if word in ("sdpa", "eager", "disabled", "xformers"):
        return flag("attn", "sdpa")
    return flag("attn", "auto", note=f"{word} is unknown here")


def lora_target(words: tuple[str, ...]) -> Outcome:
    """Translate a list of modules into all linear layers, or only the ones of attention."""
    names = {name.strip(" []'\"") for word in words for name in word.split(",")} - {""}
    if names <= {"all", "all-linear", "all_linear"} or names >= {"q_proj", "gate_proj"}:
        return flag("lora_target", "all")
    if names <= {"q_proj", "k_proj", "v_proj", "o_proj", "qkv", "proj"}:
        whole = "" if names >= {"q_proj", "k_proj", "v_proj", "o_proj"} else "it adapts q, k, v and o"
        return flag("lora_target", "attention", note=whole)
    return flag("lora_target", "all", note="vlft adapts all linear layers, or only the ones of attention")


def starting_adapter(words: tuple[str, ...]) -> Outcome:
    """Translate the adapters that training starts from. vlft starts from one."""
    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    if not names or is_false((names[0],)):
        return Idle(why="off")
    if len(names) > 1:
        return Cannot(why="a run starts from one adapter: vlft merge each of the others, then --model_id OUT")
    return flag("adapter", names[0], note="its towers, rank and alpha apply")


_FILES = (".json", ".jsonl", ".parquet", ".csv", ".tar")


def filled_in(name: str) -> str:
    """Return a placeholder for a value that the user must fill in: `<name>`, without blanks."""
    return name if name.startswith("<") else f"<{'_'.join(name.replace('<', '').replace('>', '').split())}>"


def data(words: tuple[str, ...], *, to: str = "data_path") -> Becomes:
    """Translate names of data sets. Files and folders are kept; a registry's name becomes a placeholder."""
    import os

    names = [name.strip() for word in words for name in word.split(",") if name.strip()]
    plain = [name.rpartition("#")[0] if name.rpartition("#")[2].isdigit() else name for name in names]
    notes = ["#N takes N rows: use --data_mix with cap"] if plain != names else []
    if unknown := [name for name in plain if not (name.endswith(_FILES) or os.path.exists(name))]:
        plain = [filled_in(name) if name in unknown else name for name in plain]
        notes.append("the name of a data set: write its file or folder instead")
    note = "; ".join(notes)
    extra = {"eval_strategy": ("epoch",)} if to == "eval_path" else {}
    return Becomes(flags={to: tuple(plain), **extra}, note=note)


def held_out(words: tuple[str, ...]) -> Outcome:
    """Translate a share or a number of the training rows that is held out for evaluation."""
    if words and words[0].strip("0.") == "":
        return Idle(why="no rows are held out")
    return Becomes(flags={"eval_split": words[:1] or ("0.1",), "eval_strategy": ("epoch",)})


def patience(words: tuple[str, ...]) -> Outcome:
    """Translate the number of evaluations without a better result after which training stops."""
    if is_false(words):
        return Idle(why="off")
    return Becomes(flags={"early_stopping_patience": words, "metric_for_best_model": ("eval_loss",)})
