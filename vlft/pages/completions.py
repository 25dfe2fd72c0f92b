"""Completions of a GRPO run as pages show them: those of a prompt at a step, by their rewards, equal ones once.

`vlft.train.grpo.completions` writes the lines of `completions.jsonl`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SHOWN = 8  # completions of a prompt at a step
FACTS = 16  # rewards and columns of a completion
#: What a damaged file may raise here.
MALFORMED = (AttributeError, KeyError, TypeError, ValueError, OverflowError)


def described(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description of the row of a line, with the types that pages expect.

    Raises:
        one of `MALFORMED`: it is no such line.
    """
    return {
        "file": str(line["file"]),
        "index": int(line["index"]),
        "id": line["id"],
        "turns": [{"role": str(turn["role"]), "text": str(turn["text"])} for turn in line["turns"]],
        "right": str(line["right"]),
        "media": [{"kind": str(medium["kind"]), "path": str(medium["path"])} for medium in line["media"]],
    }


def ranked(line: Mapping[str, Any], most: int = SHOWN) -> dict[str, Any]:
    """Return the completions of a line for the macro `completions` of `parts.html.j2`.

    Args:
        line: of `completions.jsonl`.
        most: completions that are shown: the best, the worst, and others spread between them.

    Raises:
        one of `MALFORMED`: it is no such line.
    """
    found: dict[Any, dict[str, Any]] = {}
    for one in line["completions"]:
        reward, advantage = float(one["reward"]), float(one["advantage"])
        rewards = list(one["rewards"].items())
        facts = (rewards if len(rewards) > 1 else []) + list((one.get("extra") or {}).items())
        shown = [f"{name} {_short(value)}" for name, value in facts[:FACTS]]
        text, stopped = str(one["completion"]), bool(one["cut"])
        same = found.setdefault(
            (text, stopped, reward, *shown),
            {"text": text, "cut": stopped, "reward": reward, "advantage": advantage, "facts": shown, "times": 0}
            | {"rewards": {str(name): _short(value) for name, value in rewards[:FACTS]}},
        )
        same["times"] += 1
    if not found:
        raise ValueError("no completions")
    several = sorted(found.values(), key=lambda one: -one["reward"] if math.isfinite(one["reward"]) else math.inf)
    some = several
    if len(several) > most:
        some = [several[place * (len(several) - 1) // max(1, most - 1)] for place in range(most)]
    count = sum(one["times"] for one in several)
    return {
        "step": int(line["step"]),
        "mean": f"{sum(one['reward'] * one['times'] for one in several) / count:.3g}",
        "said": [{**one, "reward": f"{one['reward']:.3g}", "advantage": f"{one['advantage']:+.2f}"} for one in some],
        "count": count,
        "more": count - sum(one["times"] for one in some),
    }


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, int | float) else str(value)
