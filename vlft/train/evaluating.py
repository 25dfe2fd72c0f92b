"""The part of the trainer that evaluates: losses over the evaluation rows, and answers to them.

It overrides these methods of transformers' Trainer. Each name exists in 5.17 and 5.23 (tests/test_borrowed.py):
- `evaluate`: the objective's mean, equal at any batch size and number of processes.
- `_evaluate`: a signal postpones an evaluation; the resumed run evaluates and calls `_determine_best_metric`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from vlft.data.dataset import RowDataset
from vlft.data.order import Order, RankBatches
from vlft.errors import BadRow, ConfigError, DataError
from vlft.objectives import Objective, Sums
from vlft.train.answers import Answers
from vlft.train.callbacks import AtTheEnd, EvaluationPutOff
from vlft.train.eval_metrics import EvalMetrics
from vlft.train.features import FeatureCache
from vlft.train.saving import SavingTrainer
from vlft.train.stopping import EarlyStopping


class EvaluatingTrainer(SavingTrainer):
    """The Trainer with our evaluation. `VlftTrainer` sets the attributes, and has the methods without a body."""

    objective: Objective
    eval_rows: RowDataset | None
    eval_order: Order | None
    features: FeatureCache | None
    answers: Answers | None
    eval_metrics: EvalMetrics | None
    _unevaluated: dict[tuple[str, int], BadRow]
    stopping: EarlyStopping | None
    _started: bool

    # `VlftTrainer` implements these three.

    def _loader(self, rows: RowDataset, batches: RankBatches) -> DataLoader:
        raise NotImplementedError

    def _account(self, skipped: Sequence[BadRow], *, trained: bool = True) -> BadRow | None:
        raise NotImplementedError

    def _recording(self, inputs: Any, step: int | None) -> contextlib.AbstractContextManager[None]:
        raise NotImplementedError

    def evaluated_model(self) -> Any:
        """The model without the wrappers that only training needs."""
        return self.accelerator.unwrap_model(self.model_wrapped) if self.is_in_train else self.model

    def undecodable(self) -> set[tuple[str, int]]:
        """File and index of the rows that this process could not decode so far."""
        return {*self.skipped, *self._unevaluated}

    def without_gradients(self, rows: RowDataset, order: Order, *, doing: str, step: int | None) -> Iterator[Any]:
        """Yield this process's micro-batches of an order, on the device. The caller computes without gradients.

        Args:
            rows: the rows.
            order: of the rows.
            doing: what the progress shows.
            step: optimizer steps that are complete; None: the reference of the run is computed.

        Raises:
            DataError: a row cannot be decoded, and --on_bad_row is error.
            EvaluationPutOff: a process received a signal to stop.
        """
        loader = self._loader(rows, RankBatches(order, rank=self.args.process_index))
        self.evaluated_model().eval()
        with torch.no_grad(), self.accelerator.autocast():
            for place, batch_on_cpu in enumerate(loader, 1):
                if self.is_in_train and self.room.ask():
                    raise EvaluationPutOff
                if (row := self._account(batch_on_cpu["skipped"], trained=rows is not self.eval_rows)) is not None:
                    raise DataError(row)
                self.progress.doing(f"{doing} {place:,}/{len(loader):,}")
                guarded = self.guard.evaluation(batch_on_cpu, place=place, of=len(loader), step=step)
                with guarded, self._recording(batch_on_cpu, step):
                    yield self._prepare_inputs(batch_on_cpu)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """The objective's mean loss and statistics over the evaluation rows."""
        if self.eval_rows is None or self.eval_order is None:
            raise ConfigError("evaluation needs --eval_path or --eval_split, and neither is set")
        if self.features is not None:
            self.features.before_evaluation(self.state.global_step)
        sums, step = Sums(names=self.objective.statistics), self.state.global_step
        start = time.perf_counter()
        model = self.evaluated_model()
        with self.room.notice.planning("postponing this evaluation, then saving"):
            for batch in self.without_gradients(self.eval_rows, self.eval_order, doing="evaluating", step=step):
                sums = sums.plus(self.objective.evaluate(model, batch))
        totals = self.accelerator.reduce(sums.as_vector(self.args.device), reduction="sum").tolist()
        means, weight = sums.means(totals)
        metrics = {f"{metric_key_prefix}_{name}": mean or 0.0 for name, mean in means.items()}
        metrics[f"{metric_key_prefix}_{self.objective.unit}"] = int(weight) if weight.is_integer() else weight
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - start
        if self.eval_metrics is not None:
            found = self.eval_metrics.measure(self)
            metrics |= {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        if self.answers is not None:
            self.progress.doing("answering rows for the report")
            seconds = self.answers.ask(model, step, self.guard.watchdog, self.accelerator.autocast)
            metrics[f"{metric_key_prefix}_answers_s"] = seconds
        self.meter.exclude(time.perf_counter() - start)  # the callbacks below measure their own time
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            with self.progress.aside("evaluation", self.state.global_step, doing="evaluating"):
                return super()._evaluate(*args, **kwargs)
        except EvaluationPutOff:
            if not self._started:  # no step since the checkpoint, which already records the evaluation as due
                self.room.end(self.args, self.state)
            self.folder.evaluation_due = True
            self.args.save_only_model = False
            self._save_checkpoint(self.model_wrapped)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            raise  # not reached: `MakeRoom` has ended the run

    def evaluate_due(self) -> None:
        """Run the evaluation that a signal postponed, if there is one.

        Raises:
            AtTheEnd: it stops the run, as it would have without the signal.
        """
        if self.folder.evaluation_due:
            self.folder.evaluation_due = False
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            self._name_best()
            if self.stopping is not None and self.stopping.stopped:
                raise AtTheEnd
