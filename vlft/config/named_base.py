"""How a base counts pixels, as far as a script of another kit tells it: by config.json, or by name if there is none.

`vlft.config.kits.swift` and `vlft.config.migrate.clips` use it. All other code has the config (`Family.of`).
"""

from __future__ import annotations

import re
from pathlib import Path

from vlft.families import DEFAULT, FAMILIES, Family
from vlft.model_files import read_json

#: Names of Qwen3-VL and of all later models.
_LATER = re.compile(r"qwen-?3", re.IGNORECASE)


def counted_like(model: str) -> Family:
    """A family with the same pixels of a token and the same rule for videos as a base. It may be another one.

    Args:
        model: folder or hub id of the base; "" if the script does not name it.

    Raises:
        CheckpointError: config.json in the folder cannot be read.
    """
    file = Path(model).expanduser() / "config.json"
    if model and file.is_file():
        return FAMILIES.get(str(read_json(file).get("model_type")), DEFAULT)
    if _LATER.search(model) is None:
        return DEFAULT
    return next(family for family in FAMILIES.values() if family.video_rule == "processor")
