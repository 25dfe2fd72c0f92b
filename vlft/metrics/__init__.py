"""Metrics by name: pure functions of an answer and its right answers, for evaluation, training and rewards.

`find` returns the metrics of some names; `NAMES` and `DEFAULT` are plain text. numpy is imported by `find`, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlft.metrics.names import DEFAULT, NAMES, OWN

if TYPE_CHECKING:
    from vlft.metrics.case import Metric

__all__ = ["DEFAULT", "NAMES", "OWN", "find"]


def find(words: Sequence[str]) -> tuple[Metric, ...]:
    """Return the metrics of these names, each once, in order.

    Args:
        words: names of `NAMES`, or `FILE.py:FUNCTION` for a function of the user (`vlft.metrics.own`).

    Raises:
        ConfigError: a name is unknown, a package is not installed, or a file or function cannot be used.
    """
    from vlft.metrics.registry import metric_of

    return tuple(metric_of(word) for word in dict.fromkeys(words))
