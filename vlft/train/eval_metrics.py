"""Metrics of the model's answers to all evaluation rows, at each evaluation (`--eval_metric`).

Batches of rows are dealt to the processes. Each sums the numbers of its answers, and the figures are computed from the
sums of all, so they do not depend on the number of processes. `vlft.metrics` has the metrics, `vlft.train.evaluating`
calls this.

Letters in shapes: R rows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vlft.answering import answers, speaker
from vlft.config.flags import DataFlags
from vlft.config.training import TrainFlags
from vlft.data.costs.packing import Budget
from vlft.errors import ConfigError, VlftError
from vlft.metrics import find
from vlft.metrics.case import Case, Metric
from vlft.model.generate import Sampling
from vlft.setup import Base, MeasuredRows
from vlft.setup.metric_rows import asked_at, check_metrics, last_samples
from vlft.setup.schedule import pack_budget
from vlft.train.answers import LONGER
from vlft.train.callbacks import EvaluationPutOff
from vlft.train.ranks import gather
from vlft.train.zero import shares_weights

MOST_ROWS = 32  # rows that are answered together with packing


@dataclass(frozen=True, kw_only=True)
class EvalMetrics:
    """The metrics of a run, and the batches of rows that are answered.

    Attributes:
        metrics: in the order of the flag.
        evaluated: the evaluation rows.
        base: encodes the rows.
        batches: places of samples in `evaluated`, with the most tokens of an answer to each.
    """

    metrics: tuple[Metric, ...]
    evaluated: MeasuredRows
    base: Base
    batches: tuple[tuple[tuple[int, int], ...], ...]

    @classmethod
    def of_run(cls, evaluated: MeasuredRows, base: Base, data: DataFlags, args: TrainFlags) -> EvalMetrics | None:
        """The metrics that the flags ask for; None if they ask for none.

        Raises:
            ConfigError: a metric is unknown, or no process has the weights to answer with.
        """
        if not args.eval_metric:
            return None
        if shares_weights(args):
            raise ConfigError(NO_WEIGHTS)
        last_R = last_samples(evaluated)
        costs = evaluated.costs.take(last_R)
        most_R = LONGER[0] * costs.supervised + LONGER[1]
        together = _together(
            costs.tokens + most_R, costs.patches, pack_budget(data), rows=args.per_device_eval_batch_size
        )
        batches = tuple(tuple((int(last_R[row]), int(most_R[row])) for row in some) for some in together)
        return cls(metrics=find(args.eval_metric), evaluated=evaluated, base=base, batches=batches)

    def check(self) -> None:
        """Score the rows' own answers, to find before training what would fail in the first evaluation.

        Raises:
            VlftError: a metric applies to no row, or a function of the user fails.
        """
        check_metrics(self.metrics, self.evaluated, self.base.encoder)

    def measure(self, trainer: Any) -> dict[str, float]:
        """Answer the rows and return metric -> figure, the same on every rank. Every rank must call it.

        Args:
            trainer: the `EvaluatingTrainer` of the run.

        Raises:
            VlftError: a function of the user fails; on every rank.
            EvaluationPutOff: a process received a signal to stop.
        """
        start, step = time.perf_counter(), trainer.state.global_step
        model = trainer.evaluated_model()
        top = model.get_base_model() if hasattr(model, "get_base_model") else model
        training = model.training
        sums = [np.zeros(metric.size) for metric in self.metrics]
        failed: VlftError | None = None
        bad = {place for rank in gather(trainer.undecodable()) for place in rank}
        world = trainer.args.world_size
        rounds = -(-len(self.batches) // world)
        devices = [model.device] if model.device.type == "cuda" else []
        model.eval()
        try:
            with torch.random.fork_rng(devices=devices), trainer.accelerator.autocast():
                talker = speaker(top, self.base.processor, self.base.family)
                for turn in range(rounds):
                    if trainer.is_in_train and trainer.room.ask():
                        raise EvaluationPutOff
                    trainer.guard.watchdog.at(f"answers for --eval_metric after step {step}")
                    trainer.progress.doing(f"answering rows {turn + 1:,}/{rounds:,}")
                    mine = turn * world + trainer.args.process_index
                    if failed is None and mine < len(self.batches):
                        try:
                            for case in self._answered(self.batches[mine], talker, bad):
                                _add(sums, self.metrics, case)
                        except VlftError as error:
                            failed = error  # raised below, so that no rank waits for this one
        finally:
            model.train(training)
        totals = [sum(parts) for parts in zip(*gather(sums, failed=failed), strict=True)]
        found = {one.name: float(one.value(total)) for one, total in zip(self.metrics, totals, strict=True)}
        return found | {"metric_s": time.perf_counter() - start}

    def _answered(self, batch: Sequence[tuple[int, int]], talker: object, bad: set[tuple[str, int]]) -> Iterator[Case]:
        found = [
            (row, most)
            for place, most in batch
            if (row := asked_at(self.evaluated, place, self.base.encoder)) is not None
        ]
        rows = [(row, most) for row, most in found if (row.question.file, row.question.index) not in bad]
        samplings = [Sampling(max_new_tokens=most) for _, most in rows]
        questions = [row.question for row, _ in rows]
        said = answers(questions, self.base.encoder, talker, samplings, batch=max(1, len(rows)))  # type: ignore[arg-type]
        for (row, _), answer in zip(rows, said, strict=True):
            yield row.case(answer.text)


NO_WEIGHTS = (
    "--eval_metric needs a process that has all weights to answer with, and ZeRO-3 splits them. Use --deepspeed zero2, "
    "or drop --eval_metric and measure the finished model."
)


def _together(tokens_R: np.ndarray, patches_R: np.ndarray, budget: Budget | None, *, rows: int) -> list[list[int]]:
    """Group rows that are answered together: of similar length, the longest first.

    Args:
        tokens_R: tokens of each row with the longest answer it may get.
        patches_R: of its pictures and videos.
        budget: most padded tokens, and most patches, of a batch; None: batches of `rows`.
        rows: rows of a batch without a budget.
    """
    found: list[list[int]] = []
    patches = 0
    for row in np.argsort(-tokens_R.astype(np.int64), kind="stable").tolist():
        some = found[-1] if found else []
        patches += int(patches_R[row])
        if budget is None:
            fits = len(some) < rows
        else:
            padded = int(tokens_R[some[0]]) * (len(some) + 1) if some else 0
            fits = len(some) < MOST_ROWS and padded <= budget.tokens and patches <= budget.patches
        if some and fits:
            some.append(row)
        else:
            found.append([row])
            patches = int(patches_R[row])
    return found


def _add(sums: list[np.ndarray], metrics: Sequence[Metric], case: Case) -> None:
    for total, metric in zip(sums, metrics, strict=True):
        if (numbers := metric.score(case)) is not None:
            total += np.asarray(numbers, dtype=np.float64)
