"""Flags of preference training in other kits: their method, loss and weights, translated together.

The same weight has one meaning in DPO and another in ORPO, so no flag is translated alone. `Spoken` has a kit's names.
What else a kit calls by the name of a method is in `vlft.config.kits.features`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlft.config.kits.outcome import Becomes, Cannot, Outcome, Rule, Together, idle, is_false, renamed

METHODS = ("dpo", "orpo", "simpo")
OTHERS = "--method takes sft, dpo, orpo, simpo and grpo"
NO_NLL = "without the cross-entropy of cpo_alpha, which is 1 there by default"
#: The rule for flags that choose when the reference is computed.
COMPUTED_ONCE = idle("the reference is computed once, before the first step: --reference cached")
_LOSSES = ("sigmoid", "ipo", "hinge")
#: What a flag means -> method -> our flag. Without an entry the method does not have it.
_FLAGS: Mapping[str, Mapping[str, str]] = {
    "beta": {"dpo": "beta", "orpo": "orpo_lambda", "simpo": "beta"},
    "smoothing": {"dpo": "label_smoothing", "simpo": "label_smoothing"},
    "sft": {"dpo": "rpo_alpha"},
    "gamma": {"simpo": "simpo_gamma"},
    "orpo": {"orpo": "orpo_lambda"},
    "nll": {},  # the cross-entropy of CPO
}


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """A kit's names of preference training.

    Attributes:
        methods: flags that name the method.
        words: word of such a flag -> method of vlft. `METHODS` are always known.
        plain: words of such a flag that are not preference training; other rules translate them.
        loss: flags that name the loss, which may be a method.
        weights: the flag with the weight of each loss.
        meanings: flag -> its meaning, a key of `_FLAGS`.
        defaults: method -> the kit's defaults that differ from vlft's.
        notes: method -> what the kit does in another way.
    """

    methods: tuple[str, ...] = ("method",)
    words: Mapping[str, str] = field(default_factory=dict)
    plain: tuple[str, ...] = ("sft",)
    loss: tuple[str, ...] = ("loss_type", "dpo_loss")
    weights: str = "loss_weights"
    meanings: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> frozenset[str]:
        """All flags that `together` translates. vlft has some of them itself."""
        return frozenset((*self.methods, *self.loss, self.weights, *self.meanings, "method"))

    @property
    def rules(self) -> Mapping[str, Rule]:
        """The rules for flags that vlft calls otherwise, where nothing names a method."""
        ours = {name: next(iter(_FLAGS[meaning].values()), name) for name, meaning in self.meanings.items()}
        return {name: renamed(other) for name, other in ours.items() if name != other}

    @property
    def together(self) -> Together:
        """The rule that translates them."""
        return lambda said: _translate(self, said)


def _translate(spoken: Spoken, said: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], Outcome] | None:
    order = dict.fromkeys((*spoken.methods, "method", *spoken.loss, spoken.weights, *spoken.meanings))
    names = tuple(name for name in order if name in said)
    named = next((_word(said[name]) for name in (*spoken.methods, "method") if name in said), "")
    if named in spoken.plain or (not named and not any(name in said for name in spoken.loss)):
        return None
    if named == "grpo":  # its flags are translated by `vlft.config.kits.grpo`
        methods = tuple(name for name in dict.fromkeys((*spoken.methods, "method")) if name in said)
        return None if methods == ("method",) else (methods, Becomes(flags={"method": ("grpo",)}))
    method = spoken.words.get(named, named if named in METHODS else "")
    if named and not method:
        return names, Cannot(why=f"{named} is not supported: {OTHERS}")
    losses = _parts([word for name in spoken.loss for word in said.get(name, ())])
    losses = [loss.lower() for loss in losses] or [named] * (named in _LOSSES)
    weights = _parts(said.get(spoken.weights, ()))
    weights = weights if len(weights) == len(losses) else ["1"] * len(losses)
    unknown = [loss for loss in losses if loss not in (*_LOSSES, *METHODS, "sft")]
    if unknown and not named and not set(unknown) & _OF_PREFERENCES:
        return None  # a loss of another training
    if unknown:
        return names, Cannot(why=f"{unknown[0]} is not supported: --dpo_loss takes sigmoid, ipo or hinge, and {OTHERS}")
    method = next((loss for loss in losses if loss in METHODS), method or "dpo")
    flags: dict[str, tuple[str, ...]] = {"method": (method,)}
    lost: list[str] = []
    for loss, weight in zip(losses, weights, strict=True):
        if loss == "sft" and method == "dpo":
            flags["rpo_alpha"] = (weight,)
        elif loss in _LOSSES and method == "dpo":
            flags["dpo_loss"] = (loss,)
    for name, meaning in spoken.meanings.items():
        if name not in said or _none(said[name]):
            continue
        ours = _FLAGS[meaning].get(method)
        if ours is not None:
            flags[ours] = said[name]
        elif not _zero(said[name]):
            lost.append(f"{name} does not belong to {method}")
    flags |= {name: (value,) for name, value in spoken.defaults.get(method, {}).items() if name not in flags}
    note = "; ".join(filter(None, (*lost, spoken.notes.get(method, ""))))
    if flags == {name: said[name] for name in names} and not note:
        return None  # already flags of vlft
    return names, Becomes(flags=flags, note=note)


#: Losses of preference training that vlft does not have. Other losses belong to other training.
_OF_PREFERENCES = frozenset(
    (
        *("kto_pair", "kto", "bco_pair", "bco", "sppo_hard", "nca_pair", "aot", "aot_pair", "aot_unpaired", "robust"),
        *("apo_zero", "apo_down", "exo_pair", "discopop", "sigmoid_norm"),
    )
)


def _parts(words: Sequence[str]) -> list[str]:
    """The entries of a list, whichever way it is written."""
    parts = [part.strip(" []'\"") for word in words for part in word.replace(",", " ").split()]
    return [part for part in parts if part and not _none((part,))]


def _word(words: tuple[str, ...]) -> str:
    return "" if _none(words) else words[-1].lower()


def _none(words: tuple[str, ...]) -> bool:
    return not words or words[0].lower() in ("none", "null", "")


def _zero(words: tuple[str, ...]) -> bool:
    return is_false(words) or words[0].strip("0.") == ""
