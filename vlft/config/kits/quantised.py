"""How the kits ask for a quantised base (QLoRA), and what vlft makes of it.

Each kit has its own names for the number of bits, the number format and double quantisation. They have a meaning only
together. Neighbours: the tables of the kits use `Quantised`, `vlft.config.quantised` checks the flags of vlft.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from vlft.config.kits.outcome import Becomes, Cannot, Idle, Outcome, is_false, is_true

Said = Mapping[str, tuple[str, ...]]
KEPT = (
    "only linear layers of the language model are quantised; vision tower, merger, embedding and head keep their dtype"
)
_BITSANDBYTES = ("", "bnb", "bitsandbytes")


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """A kit's names for the settings of a quantised base; "" for one that it does not have.

    Attributes:
        bits: flag with the number of bits.
        four: switch for 4 bits.
        eight: switch for 8 bits.
        method: flag that names the library.
        kind: flag with the number format.
        double: switch for double quantisation.
        doubled: the kit's default of `double`.
        settings: flag with the keywords of transformers' BitsAndBytesConfig, as a JSON object.
        others: flags without an effect in vlft, such as the dtype of the computation.
        note: what the kit does in another way.
    """

    bits: str = ""
    four: str = ""
    eight: str = ""
    method: str = ""
    kind: str = ""
    double: str = ""
    doubled: bool = True
    settings: str = ""
    others: tuple[str, ...] = ()
    note: str = KEPT

    @property
    def names(self) -> frozenset[str]:
        """All flags that `together` translates."""
        named = (self.bits, self.four, self.eight, self.method, self.kind, self.double, self.settings)
        return frozenset((*named, *self.others)) - {""}

    def together(self, said: Said) -> tuple[tuple[str, ...], Outcome] | None:
        """Translate all of them together; None if none is given, or only some that other kits also have."""
        names = tuple(name for name in said if name in self.names)
        if not {self.bits, self.four, self.eight, self.method} & set(names):
            # Several kits have names such as bnb_4bit_quant_type: the one whose number of bits is given takes them.
            names = tuple(name for name in names if not name.startswith("bnb_"))
        return (names, self._outcome(said)) if names else None

    def _outcome(self, said: Said) -> Outcome:
        bits = self._bits(said)
        if bits is None:
            return Idle(why="the base keeps its stored dtype")
        method = " ".join(said.get(self.method, ())).lower()
        if method not in _BITSANDBYTES:
            return Cannot(why=f"{method} is not supported: --bits 4 and --bits 8 quantise by bitsandbytes")
        if bits not in ("4", "8"):
            return Cannot(why=f"a base is quantised to 4 or 8 bits, not {bits}: --bits 4")
        if bits == "8":
            return Becomes(flags={"bits": ("8",)}, note=self.note)
        given = dict(said) | self._settings(said)
        kind = " ".join(given.get(self.kind or "bnb_4bit_quant_type", ("nf4",))).lower()
        if kind not in ("nf4", "fp4"):
            return Cannot(why=f"the format {kind} is not supported: --quant_type nf4 or fp4")
        flags = {"bits": ("4",)} | ({"quant_type": (kind,)} if kind != "nf4" else {})
        double = self.double or "bnb_4bit_use_double_quant"
        if not (is_true(given[double]) if double in given else self.doubled):
            flags["double_quant"] = ("false",)
        return Becomes(flags=flags, note=self.note)

    def _bits(self, said: Said) -> str | None:
        """The number of bits; None for a base that is not quantised."""
        if self.bits in said and not is_false(said[self.bits]):
            bits = "".join(said[self.bits])
            return None if bits in ("16", "32") else bits
        for name, bits in ((self.four, "4"), (self.eight, "8")):
            if name in said and is_true(said[name]):
                return bits
        return None

    def _settings(self, said: Said) -> dict[str, tuple[str, ...]]:
        try:
            content = json.loads(" ".join(said.get(self.settings, ())) or "{}")
        except ValueError:
            return {}
        return {name: (str(value),) for name, value in content.items()} if isinstance(content, dict) else {}
