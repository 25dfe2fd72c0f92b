"""Rows of an embedding or head that peft trained for some tokens (`trainable_token_indices`), as its files store them.

A row is stored as its new value, not as a difference. Neighbour: `vlft.checkpoint.adapter` reads the folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.errors import CheckpointError
from vlft.families import Family

PREFIX = "base_model.model."
#: In names of such rows.
ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Trained rows of one weight.

    Attributes:
        key: name in the adapter file.
        ids: of the tokens, in the order of the stored rows.
    """

    key: str
    ids: tuple[int, ...]


def token_rows(
    where: Path,
    settings: Mapping[str, Any],
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    family: Family,
) -> dict[str, TokenRows]:
    """Embedding or head (the name of its weight) -> its trained rows.

    Args:
        where: adapter_config.json.
        settings: its content.
        keys: name in peft's live model -> name in the adapter file.
        shapes: name in the adapter file -> shape.
        family: of the base.

    Raises:
        CheckpointError: the settings do not name the tokens of the stored rows, or name other weights.
    """
    asked = settings.get("trainable_token_indices")
    found: dict[str, TokenRows] = {}
    for live, key in keys.items():
        bare = live.removeprefix(PREFIX)
        if ROWS not in bare:
            continue
        name = bare.removesuffix(ROWS) + ".weight"
        ids = _ids_of(name, asked, family)
        if name not in family.ends or not ids or len(set(ids)) != len(ids) or shapes[key][:1] != (len(ids),):
            raise CheckpointError(
                f"{where}: trainable_token_indices is {asked!r}, but the adapter holds {list(shapes[key])} as {key}. "
                "Which rows these are is unknown. Copy both files of the adapter again."
            )
        found[name] = TokenRows(key=key, ids=ids)
    if asked and not found:
        raise CheckpointError(
            f"{where}: trainable_token_indices is {asked!r}, but the adapter holds no rows of tokens. Copy both files "
            "of the adapter again."
        )
    return found


def _ids_of(name: str, asked: Any, family: Family) -> tuple[int, ...]:
    """The ids for a weight: peft matches the end of a module's name. Not whole numbers: none."""
    module = name.removesuffix(".weight")
    if isinstance(asked, dict):
        names = (module, family.published_name(name).removesuffix(".weight"))
        asked = next((ids for key, ids in asked.items() if any(one.endswith(key) for one in names)), None)
    elif name != family.embedding:
        return ()
    if not isinstance(asked, list) or not all(isinstance(one, int) and one >= 0 for one in asked):
        return ()
    return tuple(asked)
