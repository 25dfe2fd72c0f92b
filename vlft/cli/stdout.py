"""Keep stdout for one JSON document. What libraries, subprocesses and C code print meanwhile goes to stderr.

DeepSpeed's logger, for one, takes hold of stdout at import.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO


@contextlib.contextmanager
def json_only(wanted: bool) -> Iterator[Callable[[Any], None]]:
    """Send everything printed in the block to stderr, but for what the yielded function is given.

    Args:
        wanted: whether `--json` was asked for; otherwise nothing is redirected.

    Yields:
        A function that writes its argument as the one JSON document on the real stdout.
    """
    if not wanted:
        yield lambda document: _write(document, sys.stdout)
        return
    with contextlib.ExitStack() as undo:
        real = sys.stdout
        out, err = _descriptor(sys.stdout), _descriptor(sys.stderr)
        if out is not None and err is not None:
            sys.stdout.flush()
            saved = os.dup(out)
            real = undo.enter_context(os.fdopen(saved, "w", encoding="utf-8"))
            undo.callback(os.dup2, saved, out)
            os.dup2(err, out)
        undo.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield lambda document: _write(document, real)


def _write(document: Any, stream: TextIO) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)  # NaN is no JSON
    # Half a surrogate pair, which JSON may hold and UTF-8 may not, goes out as the escape it came in as.
    stream.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
    stream.flush()


def _descriptor(stream: TextIO) -> int | None:
    """The descriptor behind a stream; None for one that has none, as in tests and notebooks."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None
