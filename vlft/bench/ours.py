"""One measured run of vlft's own training in its own process: `python -m vlft.bench.ours FLAGS.yaml`.

It does the same as `vlft train --config FLAGS.yaml` up to the last step. The weights are not written. What runs is
written to `RAN` beside the run folder, for a forecast of the same step (`vlft.bench.predicted`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlft.config.parse import FlagParser, Parsed
from vlft.model import adapt
from vlft.train import run as training
from vlft.train.folder import RunFolder
from vlft.train.model_setup import prepare_model

RAN = "ran.json"


def run(argv: Sequence[str]) -> None:
    """Train as the flags say."""
    carry_out(FlagParser("train").parse(argv))


def carry_out(parsed: Parsed) -> None:
    """Train as the parsed flags say."""
    unwritten: Any = _skip_writing
    noting: Any = _prepare
    RunFolder.finish = unwritten  # type: ignore[method-assign]
    training.prepare_model = noting
    training.train(parsed)


def _skip_writing(folder: RunFolder, *args: Any, **kwargs: Any) -> None:
    print("a benchmark: the weights are not written")


def _prepare(base: Any, args: Any, **kwargs: Any) -> tuple[Any, dict[str, str]]:
    """`prepare_model`, which also notes what runs."""
    model, chosen = prepare_model(base, args, **kwargs)
    ran = {
        "checkpointed": [
            part for part in adapt.PARTS if getattr(adapt.blocks(model, part)[0], "gradient_checkpointing", False)
        ],
        "fused": any("forward" in vars(norm) for norm in adapt.fused_norms(model)),
        "delta": chosen.get("gated delta nets", "torch"),
    }
    (Path(args.output_dir).parent / RAN).write_text(json.dumps(ran), encoding="utf-8")
    return model, chosen


if __name__ == "__main__":
    run(["--config", sys.argv[1]])
