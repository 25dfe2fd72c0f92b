"""The Trainer of transformers with vlft's data order, objective, parameter groups, checkpoints and log lines.

It overrides these methods (`evaluating`, `saving` and `zero` list theirs). Each name exists in 5.17 and 5.23
(tests/test_borrowed.py):
- `get_train_dataloader`: our row order, not sharded again by accelerate (which would train row 0 twice).
- `get_batch_samples`: runs a postponed evaluation first, and times the wait for data.
- `_prepare_inputs`: copies the tensors of the loss to the device without waiting for the copies.
- `_get_num_items_in_batch`, `compute_loss`: the objective's loss is a share of the global step, on every version.
- `training_step`: reads the learning rates before the scheduler changes them, and guards the micro-batch.
- `_get_grad_norm`: the one read from the device in a step, and the last place to leave out one that is not finite.
- `create_optimizer`: one group per tower and weight decay (`get_optimizer_cls_and_kwargs` returns the class).
- `floating_point_ops`: returns 0, because the meter counts.
- `_maybe_log_save_evaluate`, `log`: our lines, from what was read already.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch.utils.data import DataLoader

from vlft.config.training import TrainFlags
from vlft.data.collate import Batch
from vlft.data.dataset import RowDataset
from vlft.data.ipc import moved
from vlft.data.order import Order, RankBatches
from vlft.data.workers import loader_options
from vlft.errors import BadRow
from vlft.model.groups import Group
from vlft.objectives import Objective
from vlft.train import optimizers
from vlft.train.answers import Answers
from vlft.train.callbacks import KeepToFlags, MakeRoom, SetEpoch, StopAtTheEnd
from vlft.train.eval_metrics import EvalMetrics
from vlft.train.evaluating import EvaluatingTrainer
from vlft.train.features import FeatureCache
from vlft.train.folder import RunFolder
from vlft.train.metrics import Meter, MetricsFile
from vlft.train.progress import Progress
from vlft.train.reference import ReferencePass
from vlft.train.signals import Notice
from vlft.train.step_guard import StepGuard
from vlft.train.stopping import EarlyStopping


class VlftTrainer(EvaluatingTrainer):
    """The trainer of a run.

    Args:
        model: ready to train.
        args: the training flags.
        groups: parameter groups of the optimizer; frozen groups are ignored.
        train_rows: the rows to train on.
        eval_rows: the rows to evaluate on, or None.
        order: of `train_rows`.
        eval_order: of `eval_rows`, or None.
        objective: what is optimised: rows -> batches -> losses.
        folder: the run folder, which saves and loads.
        guard: guards each step.
        notice: of a signal that ends the run.
        meter: counts what is trained.
        metrics: `metrics.jsonl`, or None on ranks that do not write.
        progress: shows how far the run is, and measures evaluations and checkpoints.
        on_bad_row: whether a row whose media cannot be decoded ends the run or is skipped.
        features: the cache of features of the vision tower, or None.
        reference: computes the reference of preference rows before the first step, or None.
    """

    #: Functions called with the trainer and each training micro-batch before its loss. A hook for tests, which count
    #: rows here, or make the step fail.
    before_loss: ClassVar[tuple[Callable[[VlftTrainer, Batch], object], ...]] = ()

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        args: TrainFlags,
        groups: list[Group],
        train_rows: RowDataset,
        eval_rows: RowDataset | None,
        order: Order,
        eval_order: Order | None,
        objective: Objective,
        folder: RunFolder,
        guard: StepGuard,
        notice: Notice,
        meter: Meter,
        metrics: MetricsFile | None,
        progress: Progress,
        on_bad_row: Literal["error", "skip"],
        features: FeatureCache | None = None,
        reference: ReferencePass | None = None,
    ) -> None:
        stock: Any = super().__init__  # its hints want a PreTrainedModel and a tensor-only collator
        stock(model=model, args=args, train_dataset=train_rows, eval_dataset=eval_rows, data_collator=objective.collate)
        self.objective: Objective = objective
        self.train_rows = train_rows
        self.eval_rows = eval_rows
        self.order = order
        self.eval_order = eval_order
        self.model_accepts_loss_kwargs = True  # families differ; the stock Trainer would weight their losses so
        self.groups = [group for group in groups if group.trainable]
        self.folder = folder
        self.guard = guard
        self.metrics = metrics
        self.progress = progress
        self.on_bad_row = on_bad_row
        self.features = features
        self.meter = meter
        self.skipped: dict[tuple[str, int], BadRow] = {}
        self._unevaluated: dict[tuple[str, int], BadRow] = {}
        self._last_logged = 0
        self._rates: dict[str, float] = {}
        self._norm: float | None = None
        self._started = False
        self.answers: Answers | None = None
        self.eval_metrics: EvalMetrics | None = None
        # transformers deletes in place, where a kill leaves half of a checkpoint; `RunFolder.drop_old` does not.
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        self.room = MakeRoom(notice, folder, steps=order.steps)
        more: list[Any] = [one for one in (features, reference) if one is not None]
        if reference is not None:
            reference.trainer = self
        self.stopping: EarlyStopping | None = None
        if args.early_stopping_patience is not None:
            self.stopping = EarlyStopping(args.early_stopping_patience, args.early_stopping_threshold)
            more.append(self.stopping)
        for callback in (KeepToFlags(), self.room, StopAtTheEnd(), self.progress, *more):
            self.add_callback(callback)

    # ---- data

    def _loader(self, rows: RowDataset, batches: RankBatches) -> DataLoader:
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            # Without it each pass over a loader draws from the global generator, and a resumed run makes other passes.
            generator=torch.Generator().manual_seed(self.args.seed),
            prefetch_factor=self.args.dataloader_prefetch_factor,
            **loader_options(self.args.dataloader_num_workers, pin_memory=self.args.dataloader_pin_memory),
        )

    def get_train_dataloader(self) -> DataLoader:
        batches = RankBatches(self.order, rank=self.args.process_index)
        self.add_callback(SetEpoch(batches))
        return self._loader(self.train_rows, batches)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        self.evaluate_due()
        start = time.perf_counter()
        self.guard.loading(self.state.global_step + 1)
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.meter.add_wait(time.perf_counter() - start)
        return batches, items

    def _account(self, skipped: Sequence[BadRow], *, trained: bool = True) -> BadRow | None:
        """Record refused rows and print them, or return the row that ends the run.

        Args:
            skipped: the rows.
            trained: whether they belong to the rows to train on, which `vlft.json` counts.
        """
        known = self.skipped if trained else self._unevaluated
        if skipped and self.on_bad_row == "error":
            return skipped[0]
        for row in skipped:
            if (row.file, row.index) not in known:
                known[row.file, row.index] = row
                print(f"skipped {row}", file=sys.stderr)
        return None

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """The weight of the optimizer step's loss over all ranks and micro-batches; for SFT, the trained tokens."""
        refused = self._account([row for batch in batch_samples for row in batch["skipped"]])
        mine = sum(self.objective.weight(batch) for batch in batch_samples)
        weight = self.guard.begin(batch_samples, weight=mine, refused=refused)
        return torch.full((), float(weight or 1), device=device)  # filled on the device, so nothing is copied

    # ---- loss and optimizer

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The micro-batch with the tensors of the forward on the device.

        The copies, about two, are queued. The stock method copies each tensor and waits for the device (transformers
        5.17 to 5.23).
        """
        known = {key: inputs[key] for key in self.objective.tensors if key in inputs}
        return {**inputs, **moved(known, self.args.device)}

    def compute_loss(
        self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The objective's loss of this micro-batch, as its share of the global step's mean."""
        for act in self.before_loss:
            act(self, inputs)
        loss = self.objective.loss(model, inputs)
        self.meter.add(inputs, loss)
        self.guard.add_loss(loss.sum)
        # DDP and ZeRO average gradients over ranks; the weight already covers all ranks.
        share = loss.sum * (self.args.world_size / num_items_in_batch.squeeze())
        return (share, None) if return_outputs else share

    def _recording(self, inputs: Any, step: int | None) -> contextlib.AbstractContextManager[None]:
        """A context that stores what the vision tower computes of a micro-batch after this step."""
        return contextlib.nullcontext() if self.features is None else self.features.recording(inputs, step)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            live: Any = self.model
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, live)
            optim = str(getattr(self.args.optim, "value", self.args.optim))
            self.optimizer = optimizers.build(cls, options, self.groups, live, optim=optim)
        return self.optimizer

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._started:
            self._started = True
            self._last_logged = self.state.global_step
        # Read here, because the scheduler has already changed the rates when a step is logged.
        optimizer: Any = self.optimizer
        self._rates = {g["name"]: float(g["lr"]) for g in optimizer.param_groups}
        with self.guard.micro_batch(), self._recording(inputs, self.state.global_step):
            return super().training_step(model, inputs, *args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float | None:
        self._norm = norm = self.meter.read(super()._get_grad_norm(*args, **kwargs))
        if self.guard.must_leave_out(norm):
            # An optimizer ignores parameters without a gradient: neither they nor their moments change.
            self.model_wrapped.zero_grad(set_to_none=True)
            self._norm = None
            self.meter.drop_step()
            return None
        self.meter.keep_step()
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the stock estimate visits all parameters in every micro-batch and is wrong for pictures

    # ---- log

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        # transformers would gather and read its own sum of losses, for a line that `log` replaces. That makes the host
        # wait for the optimizer.
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._globalstep_last_logged = self.state.global_step
            self.log({"loss": 0.0})
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write one object to metrics.jsonl for each logged step and each evaluation, and show it."""
        line: dict[str, Any] = {"step": self.state.global_step, "epoch": self.state.epoch}
        unlogged = self.state.global_step > self._last_logged
        if "loss" in logs or ("train_runtime" in logs and unlogged and self._started):
            line |= self.meter.line(steps=self.state.global_step - self._last_logged)
            line["max_steps"] = self.state.max_steps
            self._last_logged = self.state.global_step
            line["grad_norm"] = self._norm
            line["lr"] = self._rates
            self.progress.logged(line)
            logs = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "epoch")}
            logs |= {f"lr/{name}": rate for name, rate in self._rates.items()}
        elif "eval_loss" in logs:
            line |= logs
            self.progress.evaluated(line)
        else:
            return  # the stock summary at the end of training, with nothing left to count; `run` prints ours
        if self.metrics is not None:
            self.metrics.write(line)
        super().log(logs)
