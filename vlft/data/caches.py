"""The user's folders for what vlft keeps between runs. Knows the environment; neither what is kept nor in what form."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_folder(environ: Mapping[str, str], *, variable: str, name: str) -> Path | None:
    """The folder that `variable` names, or `vlft/NAME` in the user's cache folder.

    Returns:
        None where the variable is 0 or empty, or nobody knows the user's home: nothing is kept.
    """
    given = environ.get(variable)
    if given is not None:
        return None if given.strip() in ("", "0") else Path(given)
    cache = environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache):  # the XDG specification has relative ones ignored
        return Path(cache) / "vlft" / name
    home = os.path.expanduser("~")
    return Path(home) / ".cache" / "vlft" / name if os.path.isabs(home) else None
