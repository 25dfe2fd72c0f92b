"""The size that a row must fit, and what `--over_length` does to a row that does not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

OverLength = Literal["error", "skip", "shrink", "drop_media"]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The size that a row must fit, and how it is made to fit.

    Attributes:
        how: `shrink` lowers the pixel budgets of its media, `drop_media` drops the last of them.
        tokens: most tokens of a row, from `--max_length` and `--pack_tokens`.
        patches: most patches of a row, from `--pack_patches`; None without packing.
    """

    how: Literal["shrink", "drop_media"]
    tokens: int
    patches: int | None

    def over(self, tokens: int, patches: int) -> bool:
        """Whether a row with `tokens` tokens and `patches` patches is too large."""
        return tokens > self.tokens or (self.patches is not None and patches > self.patches)

    @property
    def limit(self) -> str:
        """The limit as text, with the flags that set it."""
        if self.patches is None:
            return f"{self.tokens:,} tokens are allowed (--max_length)"
        return (
            f"{self.tokens:,} tokens and {self.patches:,} patches are allowed (--max_length, --pack_tokens, "
            "--pack_patches)"
        )


def fit_of(over_length: OverLength, length: int, pack: tuple[int, int] | None) -> Fit | None:
    """Return the size that `--over_length` makes rows fit; None if it changes no row."""
    if over_length == "error" or over_length == "skip":
        return None
    if pack is None:
        return Fit(how=over_length, tokens=length, patches=None)
    return Fit(how=over_length, tokens=min(length, pack[0]), patches=pack[1])
