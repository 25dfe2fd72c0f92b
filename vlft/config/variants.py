"""Flags of LoRA's variants: DoRA, rsLoRA and LoRA+. Imports nothing heavy.

Neighbours: `vlft.config.checks` calls `problems` before anything is parsed.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlft.config.values import Values


def problems(values: Values, verb: str) -> Iterator[str]:
    """Yield a message for each combination of these flags with others that cannot be carried out."""
    yield from ()
