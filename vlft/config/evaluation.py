"""Flags of evaluation that contradict each other: its rows, its metrics, the best checkpoint and early stopping.

`vlft.config.checks` calls it for train and plan. Imports nothing heavy unless `--eval_metric` is given.
"""

from __future__ import annotations

from collections.abc import Iterator

from vlft.config.values import Values
from vlft.errors import ConfigError
from vlft.metrics.names import NAMES

REPORT_ROWS = 4  # the flag's default; config.yaml of a run without evaluation also holds it


def problems(values: Values) -> Iterator[str]:
    """Yield a message for each combination of these flags that cannot be carried out."""
    if values.is_wrong("eval_path", "eval_split", "eval_strategy"):
        return  # whether the run evaluates is not known
    if values.of("method") == "grpo":
        return  # `vlft.config.grpo` refuses all of them
    for check in (_evaluation, _eval_metric, _best_by, _best, _stopping):
        yield from check(values)


def _evaluation(values: Values) -> Iterator[str]:
    when, path, part = values.of("eval_strategy"), values.every("eval_path"), values.of("eval_split")
    if path and part is not None:
        yield (f"--eval_path {path[0]} and --eval_split {part:g} both choose the evaluation rows. Drop one of the two.")
    named = "--eval_path" if path else "--eval_split"
    evaluates = bool(path) or part is not None
    if when != "no" and not evaluates:
        yield f"--eval_strategy {when} needs --eval_path FILE, or --eval_split 0.05"
    if evaluates and when == "no":
        yield f"{named} is given, but --eval_strategy is no: set it to steps or epoch"
    if values.of("eval_on_start") and not evaluates:
        yield "--eval_on_start true needs --eval_path or --eval_split, and --eval_strategy"
    rows = values.of("report_rows")
    if values.given("report_rows") and rows not in (0, REPORT_ROWS) and not evaluates:
        yield (
            f"--report_rows {rows} has no effect without --eval_path or --eval_split: it takes its rows from the "
            "evaluation data. Drop it, or set one of the two."
        )


def _best(values: Values) -> Iterator[str]:
    when, save = values.of("eval_strategy"), values.of("save_strategy")
    if save == "best" and when == "no":
        yield "--save_strategy best needs evaluations to compare: --eval_path FILE --eval_strategy steps or epoch"
    if save == "best" and not values.given("metric_for_best_model") and not values.of("load_best_model_at_end"):
        yield "--save_strategy best needs --metric_for_best_model eval_loss"
    if not values.of("load_best_model_at_end") or save == "best":
        return
    if when != save or when == "no":
        yield (
            f"--load_best_model_at_end true needs --eval_strategy and --save_strategy to be equal, not {when} and "
            f"{save}: checkpoints are compared by the evaluation at their step."
        )
    elif when == "steps":
        every = values.of("save_steps")
        step = values.of("eval_steps") or every
        if (every < 1) != (step < 1) or round(every * 10**6) % round(step * 10**6):
            yield (
                f"--load_best_model_at_end true needs --save_steps {every:g} to be a multiple of --eval_steps "
                f"{step:g}: checkpoints are compared by the evaluation at their step."
            )


def _best_by(values: Values) -> Iterator[str]:
    """Check the metric of the best checkpoint, and its direction."""
    name = str(values.of("metric_for_best_model") or "loss").removeprefix("eval_")
    higher: dict[str, bool] = {"loss": False} | _directions(values)
    if name not in higher:
        known = name in NAMES or ".py:" in name
        more = f" Add --eval_metric {name}." if known else ""
        yield (
            f"--metric_for_best_model {values.of('metric_for_best_model')}: an evaluation has no such metric. It has "
            f"{', '.join(f'eval_{one}' for one in higher)}.{more}"
        )
        return
    asked = values.of("greater_is_better")
    if values.given("greater_is_better") and asked is not None and asked != higher[name]:
        word = "higher" if higher[name] else "lower"
        yield (
            f"--greater_is_better {str(asked).lower()}: the best checkpoint would be the worst one, since a {word} "
            f"eval_{name} is better. Drop it."
        )


def _stopping(values: Values) -> Iterator[str]:
    patience = values.of("early_stopping_patience")
    if patience is None:
        if values.given("early_stopping_threshold") and values.of("early_stopping_threshold"):
            yield (
                f"--early_stopping_threshold {values.of('early_stopping_threshold'):g} has no effect without "
                "--early_stopping_patience. Add it, or drop the threshold."
            )
        return
    if values.of("eval_strategy") == "no":
        yield (
            f"--early_stopping_patience {patience} needs evaluations: --eval_path FILE or --eval_split 0.05, and "
            "--eval_strategy steps or epoch"
        )
    if not values.given("metric_for_best_model") and not values.of("load_best_model_at_end"):
        yield (
            f"--early_stopping_patience {patience} needs a metric to compare: --metric_for_best_model eval_loss. With "
            "--load_best_model_at_end true the run also ends with the best weights."
        )


def _directions(values: Values) -> dict[str, bool]:
    """Metric of `--eval_metric` -> whether higher is better; empty if one of them cannot be used."""
    if not values.given("eval_metric"):
        return {}
    from vlft.metrics import find

    try:
        return {metric.name: metric.higher for metric in find(values.every("eval_metric"))}
    except ConfigError:
        return {}


def _eval_metric(values: Values) -> Iterator[str]:
    words = values.every("eval_metric")
    if not words:
        return
    from vlft.metrics import find

    try:
        find(words)
    except ConfigError as error:
        yield f"--eval_metric: {error}"
    if values.of("eval_strategy") == "no":
        yield (
            f"--eval_metric {words[0]} needs evaluations: --eval_path FILE or --eval_split 0.05, and --eval_strategy "
            "steps or epoch"
        )
    if str(values.of("deepspeed") or "").startswith("zero3"):
        yield (
            f"--eval_metric {words[0]} needs a process that has all weights to answer with, and ZeRO-3 splits them. "
            "Use --deepspeed zero2, or drop --eval_metric and measure the finished model."
        )
