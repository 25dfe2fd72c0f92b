"""How the frozen linear layers of a language model are quantised (bitsandbytes).

Embedding, head, merger and vision tower keep their dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Quantisation:
    """A number format of bitsandbytes.

    Attributes:
        kind: nf4 and fp4 have 4 bits a weight and a scale for each 64 weights; int8 has a scale for each output row.
        double: whether the scales of nf4 and fp4 are quantised too.
    """

    kind: Literal["nf4", "fp4", "int8"]
    double: bool = False

    @classmethod
    def of(cls, *, bits: str, quant_type: Literal["nf4", "fp4"], double: bool) -> Quantisation | None:
        """The format of `--bits`, `--quant_type` and `--double_quant`; None for 16 bits."""
        if bits == "16":
            return None
        return cls(kind=quant_type, double=double) if bits == "4" else cls(kind="int8")

    @property
    def bits(self) -> int:
        """Bits of a weight, without its share of the scales."""
        return 8 if self.kind == "int8" else 4
