"""`vlft bench`: how fast rows are prepared, and how fast a model trains on them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

EXAMPLES = """\
examples:
  vlft bench data --data_path train.json --image_folder images --model_id Qwen/Qwen2-VL-2B-Instruct --baseline
  vlft bench train --config examples/lora_vision.yaml --model_id Qwen/Qwen2-VL-2B-Instruct \\
      --data_path train.json --image_folder images --steps 40 --baseline
  vlft bench train --shape 2b --preset lora --mix story --baseline      (random weights, drawn rows: no download)
  vlft bench train --shape tiny --steps 8 --baseline                    (on a CPU, in a minute)
"""

#: Flags of one of the two, with the other refusing them.
ONLY = {
    "data": ("rows", "workers"),
    "train": ("steps", "skip_steps", "preset", "baseline_order", "baseline_batch", "baseline_checkpointing", "timeout"),
}


def run(argv: Sequence[str]) -> int:
    """Measure, print a table (or one JSON document), keep both."""
    from vlft.cli.stdout import json_only

    with json_only("--json" in argv) as write:
        from vlft.cli.quiet import quiet

        quiet()
        parser = _parser()
        what, rest = _split(parser, argv)
        parsed = parser.parse(rest)
        extra = parsed.extra
        _check(parser, what, parsed)

        import torch

        from vlft.bench import report
        from vlft.bench.work import BuiltIn
        from vlft.demo.tiny import tiny_processor

        shape: Any = extra.shape or ("2b" if torch.cuda.is_available() else "tiny")
        built_in = BuiltIn(shape=shape, mix=extra.mix or "story", processor=tiny_processor, seed=extra.mix_seed or 0)
        document = _data(parsed, built_in) if what == "data" else _train(parsed, built_in)
        if extra.json:
            write(document)
        else:
            print("\n" + report.table(what, document))
        print(f"kept: {report.save(extra.out, what, document)}", flush=True)
    return 0


def _data(parsed: Any, built_in: Any) -> dict[str, Any]:
    from vlft.bench.data import DataBench, bench_data

    extra, args = parsed.extra, parsed.flags[2]
    plan = DataBench(
        rows=extra.rows or 64,
        rounds=extra.rounds or 3,
        batch=args.per_device_train_batch_size if "per_device_train_batch_size" in parsed.given else 4,
        workers=1 if extra.workers is None else extra.workers,
        baseline=extra.baseline,
        work=extra.work,
    )
    return bench_data(parsed, plan, built_in, _say)


def _train(parsed: Any, built_in: Any) -> dict[str, Any]:
    from vlft.bench.train import ORDERS, TrainBench, bench_train

    extra = parsed.extra
    steps = extra.steps or 30
    orders = ORDERS if extra.baseline_order in (None, "both") else (extra.baseline_order,)
    plan = TrainBench(
        steps=steps,
        skip=min(5, steps // 3) if extra.skip_steps is None else extra.skip_steps,
        rounds=extra.rounds or 1,
        preset=extra.preset,
        orders=orders if extra.baseline else (),
        baseline_batch=extra.baseline_batch,
        baseline_checkpointing=None if extra.baseline_checkpointing is None else extra.baseline_checkpointing == "true",
        timeout=extra.timeout,
        work=extra.work,
    )
    return bench_train(parsed, plan, built_in, _say)


def _parser() -> Any:
    from vlft.bench.mixes import MIXES
    from vlft.bench.sizes import SHAPE_NAMES
    from vlft.bench.train import ORDERS, PRESETS
    from vlft.config.flags import DataFlags, ModelFlags, TrainFlags
    from vlft.config.parse import FlagParser

    parser = FlagParser(
        "bench",
        (DataFlags, ModelFlags, TrainFlags),
        usage="vlft bench {data,train} [--baseline] [--json] [any flag of vlft train]",
        description="data: how many pictures, rows and tokens a second the loader prepares. train: how many tokens a "
        "second a model trains on, with padding, waiting, memory and, on a known GPU, MFU. --baseline measures stock "
        "transformers on the same rows in the same call, so that a claim is a ratio of one machine in one hour. "
        "Both take every flag of vlft train. Where no --model_id is named, the base has random weights, which cost "
        "the same work; where no --data_path is, rows are drawn.",
        epilog=EXAMPLES,
    )
    for action in parser._actions:
        if action.dest not in ("help", "config"):
            action.help = argparse.SUPPRESS
    for group in parser._action_groups:
        if group.title not in ("options", "positional arguments"):
            group.title = group.description = None  # their flags are in the help of train

    def add(name: str, text: str, **kind: Any) -> None:
        parser.add_argument(f"--{name}", help=text, **kind)

    number: dict[str, Any] = {"type": int, "metavar": "N"}
    add("baseline", "measure stock transformers on the same rows, too", action="store_true")
    add("json", "print one JSON document instead of a table", action="store_true")
    add(
        "out", "folder for the JSON file and the Markdown line (default: bench-out)", metavar="DIR", default="bench-out"
    )
    add("work", "folder to build bases and rows in, and to keep (default: a temporary one)", metavar="DIR")
    add("rounds", "times each side is measured, in turns; the median counts (default: data 3, train 1)", **number)
    add("mix", "drawn rows: lengths and kinds of media (default: story)", choices=MIXES)
    add("mix_seed", "of the drawn rows and random weights (default: 0)", **number)
    add("shape", "sizes of a base with random weights (default: 2b on a GPU, else tiny)", choices=SHAPE_NAMES)
    add("rows", "data: most rows a pass goes over (default: 64)", **number)
    add("workers", "data: loader processes (default: 1)", **number)
    add("steps", "train: optimizer steps of a run (default: 30)", **number)
    add("skip_steps", "train: first steps that do not count (default: 5, at most a third)", **number)
    add("preset", "train: what trains, instead of --vision, --merger and --language", choices=tuple(PRESETS))
    add("baseline_order", "train: rows of the baseline at random, of like length together, or each (default: both)",
        choices=(*ORDERS, "both"))  # fmt: skip
    add("baseline_batch", "train: rows of a micro-batch of the baseline (default: the fastest that fits)", **number)
    add("baseline_checkpointing", "train: of the baseline (default: what is faster)", choices=("true", "false"))
    add("timeout", "train: seconds that one run may take (default: any)", type=float, metavar="S")
    return parser


def _split(parser: Any, argv: Sequence[str]) -> tuple[str, list[str]]:
    """`data` or `train`, and the rest; a call for help is answered here."""
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        raise SystemExit(0)
    if not argv or argv[0] not in ONLY:
        parser.error(f"say what to measure, first: data or train, not {argv[0]!r}" if argv else "data or train?")
    return argv[0], list(argv[1:])


def _check(parser: Any, what: str, parsed: Any) -> None:
    """Refuse flags that cannot act."""
    extra, given = parsed.extra, parsed.given
    [other] = set(ONLY) - {what}
    for name in ONLY[other]:
        if getattr(extra, name) is not None:
            parser.error(f"--{name} is of bench {other}, and cannot act on bench {what}. Drop it")
    for ours, theirs in (("shape", "model_id"), ("mix", "data_path")):
        if getattr(extra, ours) is not None and theirs in given:
            parser.error(f"--{ours} and --{theirs} exclude each other. Keep one")
    if extra.preset is not None and (towers := given & {"vision", "merger", "language"}):
        parser.error(f"--preset {extra.preset} says what --{sorted(towers)[0]} says. Keep one")
    if not extra.baseline:
        for name in ("baseline_order", "baseline_batch", "baseline_checkpointing"):
            if getattr(extra, name) is not None:
                parser.error(f"--{name} cannot act without --baseline")
    if what == "train":
        steps = extra.steps or 30
        if extra.skip_steps is not None and extra.skip_steps >= steps:
            parser.error(f"--skip_steps {extra.skip_steps} leaves none of {steps} steps. Give more --steps")
        if parsed.flags[2].world_size > 1:
            parser.error("one process measures; start it without torchrun")


def _say(line: str) -> None:
    print(line, flush=True)
