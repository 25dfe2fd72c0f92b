"""Number formats for the frozen linear layers of a language model, and their bytes. Needs no torch by itself.

Neighbours: `vlft.model.packed` quantises and computes.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vlft.errors import ConfigError
from vlft.families import Family, Sizes
from vlft.text import error_text

PACKAGE = "bitsandbytes"
INSTALL = f"pip install '{PACKAGE}>=0.48'"
BLOCK = 64  # weights that share a scale, in 4 bits
SCALES = 256  # scales that share a scale, if they are quantised too


def library() -> Any:
    """The module bitsandbytes. Importing it imports torch.

    Raises:
        ConfigError: it is not installed, or cannot be imported; ends with the command that installs it.
    """
    try:
        found = importlib.util.find_spec(PACKAGE) is not None
    except (ImportError, ValueError):  # it is partly removed
        found = False
    if not found:
        raise ConfigError(f"quantised weights need the package {PACKAGE}, which is not installed: {INSTALL}")
    try:
        import bitsandbytes
    except Exception as error:  # it looks for the libraries of CUDA, and fails in many ways (0.50)
        raise ConfigError(
            f"quantised weights need the package {PACKAGE}, which is installed but cannot be imported "
            f"({error_text(error)}). Repair it, for example: {INSTALL.replace('install', 'install --force-reinstall')}"
        ) from error
    return bitsandbytes


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

    @property
    def label(self) -> str:
        """Its name in messages."""
        return f"{self.kind}{', scales of 8 bits' if self.double else ''}"

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes that bitsandbytes keeps for a weight [O, D]: packed weights, scales and code tables."""
        weights = math.prod(shape)
        if self.kind == "int8":
            return weights + 4 * shape[0]
        blocks = -(-weights // BLOCK)
        codes = 4 * 16
        if not self.double:
            return -(-weights // 2) + 4 * blocks + codes
        return -(-weights // 2) + blocks + 4 * -(-blocks // SCALES) + codes + 4 * 256 + 4


def quantised_names(family: Family, names: Iterable[str]) -> list[str]:
    """The modules that are quantised, of all names of linear layers of a model."""
    return [name for name in names if re.fullmatch(family.lora_targets["language"], name)]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What quantising takes of a model.

    Attributes:
        weights: number of quantised weights.
        nbytes: bytes that hold them, with scales and code tables.
        largest: weights of the largest layer, which is dense while it is multiplied.
    """

    weights: int = 0
    nbytes: int = 0
    largest: int = 0


def packed_of(family: Family, sizes: Sizes, quantisation: Quantisation | None) -> Packed:
    """What quantising takes of a model that is not built."""
    if quantisation is None:
        return Packed()
    layout = family.layout(sizes)
    modules = [name.removesuffix(".weight") for name in layout if name.endswith(".weight")]
    shapes = [layout[f"{name}.weight"] for name in quantised_names(family, modules)]
    counts = [math.prod(shape) for shape in shapes]
    return Packed(weights=sum(counts), nbytes=sum(map(quantisation.nbytes, shapes)), largest=max(counts, default=0))
