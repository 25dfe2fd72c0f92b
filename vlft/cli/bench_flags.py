"""The command line of `vlft bench`: data or train, its own flags, and every flag of `vlft train`.

Imports transformers, so only inside `vlft.cli.bench.parser`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlft.bench.mixes import MIXES
from vlft.bench.sizes import SHAPE_NAMES
from vlft.bench.train import ORDERS, PRESETS
from vlft.cli.command import add_json
from vlft.config.flags import DataFlags, ModelFlags, TrainFlags
from vlft.config.names import help_asked
from vlft.config.parse import FlagParser, Parsed

EXAMPLES = """\
examples:
  vlft bench data --data_path train.json --image_folder images --model_id Qwen/Qwen2-VL-2B-Instruct --baseline
  vlft bench train --config examples/lora_vision.yaml --model_id Qwen/Qwen2-VL-2B-Instruct \\
      --data_path train.json --image_folder images --steps 40 --baseline
  vlft bench train --shape 2b --preset lora --mix story --baseline      (random weights, drawn rows: no download)
  vlft bench train --shape tiny --steps 8 --baseline                    (on a CPU, in a minute)
"""

#: Flags of one of the two, which the other refuses.
ONLY = {
    "data": ("rows", "workers"),
    "train": ("steps", "skip_steps", "preset", "baseline_order", "baseline_batch", "baseline_checkpointing", "timeout"),
}
STEPS = 30


class BenchParser(FlagParser):
    """Parses `data` or `train`, which becomes `extra.what`, and the flags."""

    def __init__(self) -> None:
        super().__init__(
            "bench",
            (DataFlags, ModelFlags, TrainFlags),
            usage="vlft bench {data,train} [--baseline] [--json] [any flag of vlft train]",
            description="data: how many pictures, rows and tokens a second the loader prepares. train: how many tokens "
            "a second a model trains on, with padding, waiting, memory and, on a known GPU, MFU. --baseline measures "
            "stock transformers on the same rows in the same call, so that a claim is a ratio of one machine in one "
            "hour. Both take every flag of vlft train. Without --model_id the base has random weights, which cost the "
            "same work; without --data_path rows are drawn.",
            epilog=EXAMPLES,
        )
        add, number = self._add, {"type": int, "metavar": "N"}
        add("baseline", "measure stock transformers on the same rows, too", action="store_true")
        add_json(self, "a table")
        add("out", "folder for the JSON file and the Markdown line (default: bench-out)", metavar="DIR",
            default="bench-out")  # fmt: skip
        add("work", "folder to build bases and rows in, and to keep (default: a temporary one)", metavar="DIR")
        add("rounds", "times each side is measured, in turns; the median counts (default: data 3, train 1)", **number)
        add("mix", "drawn rows: lengths and kinds of media (default: story)", choices=MIXES)
        add("mix_seed", "of the drawn rows and random weights (default: 0)", **number)
        add("shape", "sizes of a base with random weights (default: 2b on a GPU, else tiny)", choices=SHAPE_NAMES)
        add("rows", "data: most rows a pass goes over (default: 64)", **number)
        add("workers", "data: loader processes (default: 1)", **number)
        add("steps", f"train: optimizer steps of a run (default: {STEPS})", **number)
        add("skip_steps", "train: first steps that do not count (default: 5, at most a third)", **number)
        add("preset", "train: what trains, instead of --vision, --merger and --language", choices=tuple(PRESETS))
        add("baseline_order", "train: rows of the baseline at random, of like length together, or each (default: both)",
            choices=(*ORDERS, "both"))  # fmt: skip
        add("baseline_batch", "train: rows of a micro-batch of the baseline (default: the fastest that fits)", **number)
        add("baseline_checkpointing", "train: of the baseline (default: what is faster)", choices=("true", "false"))
        add("timeout", "train: seconds that one run may take (default: any)", type=float, metavar="S")

    def _add(self, name: str, text: str, **kind: Any) -> None:
        self.add_argument(f"--{name}", help=text, **kind)

    def parse(self, argv: Sequence[str]) -> Parsed:
        """As `FlagParser.parse`, and refuse flags that cannot act."""
        if help_asked(argv):
            return super().parse(argv)
        if not argv or argv[0] not in ONLY:
            self.error(f"say what to measure, first: data or train, not {argv[0]!r}" if argv else "data or train?")
        parsed = super().parse(argv[1:])
        parsed.extra.what = argv[0]
        self._check(parsed)
        return parsed

    def _check(self, parsed: Parsed) -> None:
        extra, given = parsed.extra, parsed.given
        [other] = set(ONLY) - {extra.what}
        for name in ONLY[other]:
            if getattr(extra, name) is not None:
                self.error(f"--{name} is of bench {other}, and cannot act on bench {extra.what}. Drop it")
        for ours, theirs in (("shape", "model_id"), ("mix", "data_path")):
            if getattr(extra, ours) is not None and theirs in given:
                self.error(f"--{ours} and --{theirs} exclude each other. Keep one")
        if extra.preset is not None and (towers := given & {"vision", "merger", "language"}):
            self.error(f"--preset {extra.preset} says what --{sorted(towers)[0]} says. Keep one")
        if not extra.baseline:
            for name in ("baseline_order", "baseline_batch", "baseline_checkpointing"):
                if getattr(extra, name) is not None:
                    self.error(f"--{name} cannot act without --baseline")
        if extra.what == "train":
            steps = extra.steps or STEPS
            if extra.skip_steps is not None and extra.skip_steps >= steps:
                self.error(f"--skip_steps {extra.skip_steps} leaves none of {steps} steps. Give more --steps")
            if parsed.flags[2].world_size > 1:
                self.error("one process measures; start it without torchrun")
