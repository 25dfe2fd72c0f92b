"""The part of the page of a GRPO run with the completions of a few prompts, from early to late steps."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vlft.report.answers import media_of, spread, title_of
from vlft.report.sampled import Sampled

SHOWN_ROWS = 6
SHOWN_REPEATED = 4  # rows that are shown at several steps
SHOWN_STEPS = 3  # of a row: the first, the last, and one between them


def shown_rows(found: Iterable[Sampled]) -> list[dict[str, Any]]:
    """Return the rows that are shown, for the template `report.html.j2`.

    Rows that were sampled at several steps come first, the most frequent ones before others. They show best what the
    run has learned. The others are spread evenly over the run.
    """
    found = list(found)
    often = sorted((one for one in found if len(one.steps) > 1), key=lambda one: -len(one.steps))
    often = often[: SHOWN_REPEATED if len(often) < len(found) else SHOWN_ROWS]
    once = sorted((one for one in found if len(one.steps) == 1), key=lambda one: one.steps[0]["step"])
    return [_shown(one) for one in [*often, *spread(once, SHOWN_ROWS - len(often))]]


def _shown(one: Sampled) -> dict[str, Any]:
    row = one.row
    pictures, files = media_of(row["media"])
    return {
        "title": title_of(row["file"], row),
        "turns": list(row["turns"]),
        "right": row["right"],
        "steps": spread(one.steps, SHOWN_STEPS),
        "of": len(one.steps),
        "pictures": pictures,
        "files": files,
    }
