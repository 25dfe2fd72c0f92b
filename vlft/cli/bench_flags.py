"""The command line of `vlft bench`: data or train, its own flags, and every flag of `vlft train`."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence, Set
from typing import Any

from vlft.bench.choices import ORDERS, PRESETS, SIDES
from vlft.bench.mixes import MIXES
from vlft.bench.sizes import SHAPE_NAMES
from vlft.checkpoint import resolve_model
from vlft.cli.command import add_json
from vlft.cli.early import checked_types
from vlft.config.names import help_asked
from vlft.config.parse import FlagParser, Parsed
from vlft.errors import ConfigError
from vlft.model.cards import predicted
from vlft.model.quantised_files import is_stored_quantised

EXAMPLES = """\
examples:
  vlft bench data --data_path train.json --image_folder images --model_id Qwen/Qwen2-VL-2B-Instruct --baseline
  vlft bench train --config examples/lora_vision.yaml --model_id Qwen/Qwen2-VL-2B-Instruct \\
      --data_path train.json --image_folder images --steps 40 --baseline
  vlft bench train --shape 2b --preset lora --mix story --baseline      (random weights, drawn rows: no download)
  vlft bench train --shape tiny --steps 8 --baseline                    (on a CPU, in a minute)
  vlft bench train --fake h100 --shape 7b --preset lora                 (a forecast for a GPU, without one)
"""

#: Flags of `bench data` and of `bench train`. Each of the two refuses the flags of the other.
ONLY = {
    "data": ("rows", "workers"),
    "train": (
        *("steps", "skip_steps", "preset", "timeout", "fake"),
        *("baseline_side", "baseline_order", "baseline_batch", "baseline_checkpointing"),
    ),
}
#: Flags of a measurement, which have no effect on a forecast.
MEASURED = ("steps", "skip_steps", "rounds", "timeout", "work", "out", "baseline")
#: Flags of train that a forecast uses.
FORECAST = frozenset({
    *("model_id", "model_revision", "vision", "merger", "language", "lora_rank", "lora_dropout", "lora_target"),
    *("linear_attn", "use_liger_kernel", "gradient_checkpointing"),
})  # fmt: skip
STEPS = 30
OUT = "bench-out"


class BenchParser(FlagParser):
    """Parse `data` or `train`, which becomes `extra.what`, and the flags."""

    def __init__(self) -> None:
        super().__init__(
            "bench",
            self._types,
            usage="vlft bench {data,train} [--baseline] [--json] [any flag of vlft train]",
            description="data: measure how many pictures, rows and tokens a second the loader prepares. train: measure "
            "how many tokens a second a model trains on, and padding, waiting, memory and, on a known GPU, MFU. "
            "--baseline also measures stock transformers on the same rows in the same call, so that both numbers come "
            "from the same machine at the same time. Both take every flag of vlft train. Without --model_id the base "
            "has random weights, which are as fast as trained ones. Without --data_path rows are generated.",
            epilog=EXAMPLES,
        )
        add, number = self._add, {"type": int, "metavar": "N"}
        add("baseline", "also measure stock transformers on the same rows", action="store_true")
        add_json(self, "a table")
        add("out", f"folder for the JSON file and the Markdown line (default: {OUT})", metavar="DIR")
        add("work", "folder for bases and rows, which is kept (default: a temporary folder)", metavar="DIR")
        add("rounds", "measurements of each side, in turns; the median counts (default: data 3, train 1)", **number)
        add("mix", "generated rows: lengths and kinds of media (default: story)", choices=MIXES)
        add("mix_seed", "random seed of generated rows and random weights (default: 0)", **number)
        add("shape", "size of a base with random weights (default: 2b on a GPU, else tiny)", choices=SHAPE_NAMES)
        add("rows", "data: most rows of a pass (default: 64)", **number)
        add("workers", "data: loader processes (default: 1)", **number)
        add("steps", f"train: optimizer steps of a run (default: {STEPS})", **number)
        add("skip_steps", "train: first steps that are not counted (default: 5, at most a third)", **number)
        add("preset", "train: what trains, instead of --vision, --merger and --language", choices=tuple(PRESETS))
        add("baseline_side", "train: the baseline: stock transformers + peft, the same with our kernels, or both "
            "(default: both)", choices=(*SIDES, "both"))  # fmt: skip
        add("baseline_order", "train: order of the baseline's rows: random, grouped by length, or both (default: both)",
            choices=(*ORDERS, "both"))  # fmt: skip
        add("baseline_batch", "train: rows of a micro-batch of the baseline (default: the fastest that fits)", **number)
        add("baseline_checkpointing", "train: gradient checkpointing of the baseline (default: the faster setting)",
            choices=("true", "false"))  # fmt: skip
        add("fake", "train: forecast one step on this GPU, e.g. h100, without a GPU: kernels, bytes, memory, time",
            metavar="GPU")  # fmt: skip
        add("timeout", "train: most seconds of one run (default: no limit)", type=float, metavar="S")

    def _add(self, name: str, text: str, **kind: Any) -> None:
        self.add_argument(f"--{name}", help=text, **kind)

    def parse(self, argv: Sequence[str]) -> Parsed:
        """Parse as `FlagParser.parse`, and refuse flags that have no effect.

        Raises:
            UsageError: the first word is neither data nor train, or a flag is wrong or has no effect.
            ConfigError: the errors of `FlagParser.parse`.
        """
        if help_asked(argv):
            return super().parse(argv)
        if not argv or argv[0] not in ONLY:
            self.error(
                f"the first word must be data or train, not {argv[0]!r}" if argv else "write data or train after bench"
            )
        self._what = argv[0]
        self._passed = {word.split("=")[0][2:].replace("-", "_") for word in argv if word.startswith("--")}
        parsed = super().parse(argv[1:])
        if self._what == "train" and parsed.flags[2].world_size > 1:
            self.error("only one process can measure. Start it without torchrun")
        return parsed

    def _types(self, values: Mapping[str, Any], extra: Namespace) -> tuple[type, ...]:
        extra.what = self._what
        self._check(extra, values.keys())
        types = checked_types(values, extra)
        if self._what == "train" and "model_id" in values:
            folder = resolve_model(values["model_id"], values.get("model_revision"))
            if is_stored_quantised(folder):
                raise ConfigError(
                    f"{values['model_id']}: its files are quantised, and vlft bench compares with a trainer of 16 "
                    "bits. Use the unquantised model, or vlft train."
                )
        return types

    def _check(self, extra: Namespace, given: Set[str]) -> None:
        [other] = set(ONLY) - {extra.what}
        for name in ONLY[other]:
            if getattr(extra, name) is not None:
                self.error(f"--{name} is a flag of bench {other}, and has no effect on bench {extra.what}. Drop it")
        for ours, theirs in (("shape", "model_id"), ("mix", "data_path")):
            if getattr(extra, ours) is not None and theirs in given:
                self.error(f"--{ours} and --{theirs} exclude each other. Keep one")
        if extra.preset is not None and (towers := given & {"vision", "merger", "language"}):
            self.error(f"--preset {extra.preset} and --{sorted(towers)[0]} both set what trains. Keep one")
        if not extra.baseline:
            for name in ("baseline_side", "baseline_order", "baseline_batch", "baseline_checkpointing"):
                if getattr(extra, name) is not None:
                    self.error(f"--{name} has no effect without --baseline")
        if extra.fake is not None:
            self._check_fake(extra, given)
        elif extra.what == "train":
            steps = extra.steps or STEPS
            if extra.skip_steps is not None and extra.skip_steps >= steps:
                self.error(f"--skip_steps {extra.skip_steps} leaves none of {steps} steps. Raise --steps")

    def _check_fake(self, extra: Namespace, given: Set[str]) -> None:
        """Refuse a card whose speed is not known, and flags of the command line that a forecast does not use."""
        predicted(extra.fake, flag="--fake")
        for name in MEASURED:
            if getattr(extra, name):
                self.error(f"--{name} has no effect with --fake, which measures nothing. Drop one of the two")
        if "data_path" in given:
            self.error("--data_path has no effect with --fake, which reads no rows: --mix sets their sizes. Drop it")
        if extra.mix_seed is not None and extra.mix in (None, "story"):
            self.error("--mix_seed has no effect with --fake on the story mix, whose pack is fixed. Drop it")
        if without := sorted(given - FORECAST):
            passed = [f"--{name}" for name in without if {name, f"no_{name}"} & self._passed]
            uses = ", ".join(f"--{name}" for name in sorted(FORECAST))
            if passed:
                self.error(
                    f"{', '.join(passed)} {'has' if len(passed) == 1 else 'have'} no effect with --fake, which "
                    f"forecasts one pack in bf16 on one GPU. Of the flags of train it uses {uses}. Drop the others"
                )
            print(f"note: these flags of the YAML do not change a forecast: {', '.join(without)}", file=sys.stderr)
