"""`vlft bench`: measure how fast rows are prepared, and how fast a model trains on them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vlft.cli.bench_flags import OUT, STEPS, BenchParser
from vlft.cli.command import Write, command

if TYPE_CHECKING:
    from vlft.config.parse import Parsed

_say = partial(print, flush=True)


def parser() -> BenchParser:
    """Build the command line of `vlft bench`."""
    return BenchParser()


@command(parser)
def run(parsed: Parsed, write: Write) -> int:
    """Measure, print a table or one JSON document, and save both."""
    import torch

    from vlft.bench import report
    from vlft.bench.work import BuiltIn
    from vlft.demo.tiny import tiny_processor

    extra = parsed.extra
    shape: Any = extra.shape or ("2b" if torch.cuda.is_available() or extra.fake else "tiny")
    built_in = BuiltIn(shape=shape, mix=extra.mix or "story", processor=tiny_processor, seed=extra.mix_seed or 0)
    if extra.fake is not None:
        from vlft.bench.fake import bench_fake, table

        document = bench_fake(parsed, extra.fake, extra.preset, built_in, _say)
        if extra.json:
            write(document)
        else:
            print("\n" + table(document))
        return 0
    document = _data(parsed, built_in) if extra.what == "data" else _train(parsed, built_in)
    if extra.json:
        write(document)
    else:
        print("\n" + report.table(extra.what, document))
    print(f"saved: {report.save(extra.out or OUT, extra.what, document)}", flush=True)
    return 0


def _data(parsed: Parsed, built_in: Any) -> dict[str, Any]:
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


def _train(parsed: Parsed, built_in: Any) -> dict[str, Any]:
    from vlft.bench.choices import ORDERS, SIDES
    from vlft.bench.train import TrainBench, bench_train

    extra = parsed.extra
    steps = extra.steps or STEPS
    orders = ORDERS if extra.baseline_order in (None, "both") else (extra.baseline_order,)
    plan = TrainBench(
        steps=steps,
        skip=min(5, steps // 3) if extra.skip_steps is None else extra.skip_steps,
        rounds=extra.rounds or 1,
        preset=extra.preset,
        orders=orders if extra.baseline else (),
        sides=tuple(SIDES) if extra.baseline_side in (None, "both") else (extra.baseline_side,),
        baseline_batch=extra.baseline_batch,
        baseline_checkpointing=None if extra.baseline_checkpointing is None else extra.baseline_checkpointing == "true",
        timeout=extra.timeout,
        work=extra.work,
    )
    return bench_train(parsed, plan, built_in, _say)
