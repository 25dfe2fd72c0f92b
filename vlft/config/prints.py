"""Short hashes of settings, by which two recipes are compared."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from vlft.model_files import tokenizer_settings


def print_of(value: Any) -> str:
    """Return a short hash of the JSON of a value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def tokenizer_print(tokenizer: Any) -> str | None:
    """Return a short hash of the tokens that the tokenizer makes; None if it is not a fast one.

    What does not change them is left out, such as padding: transformers sets it, and `vlft.checkpoint.plain` does not.
    """
    if not tokenizer.is_fast:
        return None
    found, words = tokenizer_settings(tokenizer.backend_tokenizer.to_str())
    split = found["pre_tokenizer"] or {}
    parts = [{k: v for k, v in part.items() if k != "trim_offsets"} for part in split.get("pretokenizers", [split])]
    special = {name: str(text) for name, text in tokenizer.special_tokens_map.items() if not isinstance(text, list)}
    return print_of([found["model"]["type"], words, found["added_tokens"], found["normalizer"], parts, special])
