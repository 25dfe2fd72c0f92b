"""One measured run of vlft's own training in its own process: `python -m vlft.bench.ours FLAGS.yaml`.

It does the same as `vlft train --config FLAGS.yaml` up to the last step. The weights are not written.
"""

from __future__ import annotations

import sys
from typing import Any

from vlft.config.parse import FlagParser
from vlft.train.folder import RunFolder
from vlft.train.run import train


def run(argv: list[str]) -> None:
    """Train as the flags say."""
    unwritten: Any = _skip_writing
    RunFolder.finish = unwritten  # type: ignore[method-assign]
    train(FlagParser("train").parse(argv))


def _skip_writing(folder: RunFolder, *args: Any, **kwargs: Any) -> None:
    print("a benchmark: the weights are not written")


if __name__ == "__main__":
    run(["--config", sys.argv[1]])
