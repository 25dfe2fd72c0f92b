"""Reserve stdout for one JSON document. Output of libraries, subprocesses and C code goes to stderr.

DeepSpeed's logger, for example, opens stdout when it is imported.
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
    """Redirect everything printed in the block to stderr, except the document passed to the yielded function.

    Args:
        wanted: whether `--json` is set; otherwise nothing is redirected.

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
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)  # NaN is not valid JSON
    # Half a surrogate pair is valid in JSON but not in UTF-8, so it is written as an escape.
    stream.write(text.encode("utf-8", "backslashreplace").decode("utf-8") + "\n")
    stream.flush()


def _descriptor(stream: TextIO) -> int | None:
    """Return the file descriptor of a stream; None if it has none, as in tests and notebooks."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None
