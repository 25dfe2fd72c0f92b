"""The Trainer of transformers with vlft's data order, loss, parameter groups, checkpoints and log lines.

Only documented methods and a few hooks that 5.17 and 5.23 share are overridden:
- `get_train_dataloader`: our row order, not sharded again by accelerate (which would train row 0 twice).
- `_prepare_inputs`: what the forward takes goes to the device without waiting for it.
- `compute_loss`, `_get_num_items_in_batch`: the loss is weighted by token over the global step, on every version.
- `create_optimizer`: one group per tower and weight decay.
- `evaluate`: a token-weighted loss, equal at any batch size and number of processes.
- `_save_checkpoint`, `_save`: a checkpoint appears whole or not at all.
- `_load_from_checkpoint`, `_load_optimizer_and_scheduler`, `_load_best_model`: strict; the stock ones load nothing
  into a full Qwen2-VL and only warn, and pass over state files that are missing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from vlft.config.flags import TrainFlags
from vlft.data.collate import Batch, Collator
from vlft.data.dataset import RowDataset
from vlft.data.order import Order, RankBatches
from vlft.data.workers import loader_options
from vlft.errors import BadRow, ConfigError, DataError
from vlft.model.forward import FORWARD_KEYS
from vlft.model.groups import Group
from vlft.train.answers import Answers
from vlft.train.callbacks import EvaluationPutOff, KeepToFlags, MakeRoom, SetEpoch, StopAtTheEnd
from vlft.train.folder import RunFolder
from vlft.train.metrics import Meter, MetricsFile, progress
from vlft.train.ranks import barrier, gather
from vlft.train.signals import Notice
from vlft.train.step_guard import StepGuard
from vlft.train.zero import ZeroTrainer


class VlftTrainer(ZeroTrainer):
    """See the module.

    Args:
        model, args: as the stock Trainer takes them. groups: of the optimizer (frozen ones are ignored).
        train_rows, eval_rows: datasets; `eval_rows` may be None.
        order, eval_order: of them. collator: rows -> Batch.
        folder: where and how things are saved.
        guard: watches over each step. notice: of a signal that ends the run.
        meter: counts what is trained.
        metrics: `metrics.jsonl`, or None on ranks that do not write.
        say: prints a line for the user (rank 0 only).
        on_bad_row: what to do with a row whose media cannot be decoded after all.
    """

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
        collator: Collator,
        folder: RunFolder,
        guard: StepGuard,
        notice: Notice,
        meter: Meter,
        metrics: MetricsFile | None,
        say: Callable[[str], None],
        on_bad_row: Literal["error", "skip"],
    ) -> None:
        stock: Any = super().__init__  # its hints want a PreTrainedModel and a tensor-only collator
        stock(model=model, args=args, train_dataset=train_rows, eval_dataset=eval_rows, data_collator=collator)
        self.train_rows = train_rows
        self.eval_rows = eval_rows
        self.order = order
        self.eval_order = eval_order
        # Qwen2-VL leaves this unset and Qwen2.5-VL says False; HF would weight their losses in different ways.
        self.model_accepts_loss_kwargs = True
        self.groups = [group for group in groups if group.trainable]
        self.folder = folder
        self.guard = guard
        self.metrics = metrics
        self.say = say
        self.on_bad_row = on_bad_row
        self.meter = meter
        self.skipped: dict[tuple[str, int], BadRow] = {}
        self._last_logged = 0
        self._rates: dict[str, float] = {}
        self._norm: Any = None
        self._started: tuple[float, int] | None = None
        self.answers: Answers | None = None
        # transformers would delete in place, where a kill leaves half of a checkpoint; `RunFolder.drop_old` does not.
        self.save_total_limit, args.save_total_limit = args.save_total_limit, None
        self.room = MakeRoom(notice, folder, steps=order.steps)
        for callback in (KeepToFlags(), self.room, StopAtTheEnd()):
            self.add_callback(callback)

    # ---- data

    def _loader(self, rows: RowDataset, batches: RankBatches) -> DataLoader:
        return DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            # Else each pass over a loader draws from the global generator, and a resumed run makes other passes.
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

    def _account(self, skipped: Sequence[BadRow]) -> BadRow | None:
        """Enter rows that turned out bad into the accounts, or give back the one that ends the run."""
        if skipped and self.on_bad_row == "error":
            return skipped[0]
        for row in skipped:
            if (row.file, row.index) not in self.skipped:
                self.skipped[row.file, row.index] = row
                print(f"skipped {row}", file=sys.stderr)
        return None

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        """Supervised tokens of the whole optimizer step, over all ranks and micro-batches."""
        refused = self._account([row for batch in batch_samples for row in batch["skipped"]])
        tokens = self.guard.begin(batch_samples, refused=refused)
        return torch.tensor(float(max(1, tokens))).to(device, non_blocking=True)

    # ---- loss and optimizer

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The micro-batch, with what the forward takes on the device.

        The copies are queued, while the stock ones would each wait for the device to catch up (transformers 5.17 to
        5.23).
        """
        taken = {key: value for key, value in inputs.items() if key in FORWARD_KEYS and isinstance(value, torch.Tensor)}
        return {**inputs, **{key: value.to(self.args.device, non_blocking=True) for key, value in taken.items()}}

    def compute_loss(
        self, model: torch.nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross-entropy of this micro-batch as its share of the global step's token mean."""
        outputs = model(**{key: inputs[key] for key in FORWARD_KEYS})
        self.meter.add(inputs, outputs.loss)
        self.guard.add_loss(outputs.loss)
        # DDP and ZeRO average gradients over ranks; the token count already spans them.
        loss = outputs.loss * (self.args.world_size / num_items_in_batch.squeeze())
        return (loss, outputs) if return_outputs else loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            live: Any = self.model
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, live)
            if {"params", "model", "optimizer_dict"} & set(options) or not isinstance(cls, type):
                raise ConfigError(
                    f"--optim {self.args.optim}: brings its own parameter groups, which would drop --vision_lr, "
                    "--merger_lr and --weight_decay. Use an AdamW variant, Adafactor or SGD."
                )
            self.optimizer = cls(
                [
                    {"params": list(g.tensors), "lr": g.lr, "weight_decay": g.weight_decay, "name": g.name}
                    for g in self.groups
                ],
                **options,
            )
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._started is None:
            self._started = time.perf_counter(), self.state.global_step
            self._last_logged = self.state.global_step
        # Read here: when a step is logged, the scheduler has already moved on.
        optimizer: Any = self.optimizer
        self._rates = {g["name"]: float(g["lr"]) for g in optimizer.param_groups}
        with self.guard.micro_batch():
            return super().training_step(*args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        self._norm = norm = super()._get_grad_norm(*args, **kwargs)
        if self.guard.must_leave_out(norm):
            # An optimizer passes over parameters without a gradient: neither they nor their moments change.
            self.model_wrapped.zero_grad(set_to_none=True)
            self._norm = None
            self.meter.drop_step()
            return None
        self.meter.keep_step()
        return norm

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # the stock estimate walks all parameters every micro-batch and is wrong for pictures

    # ---- evaluation

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> dict[str, float]:
        """Mean cross-entropy of the supervised tokens of the evaluation rows."""
        if self.eval_rows is None or self.eval_order is None:
            raise ConfigError("evaluation was asked for without --eval_path")
        model: Any = self.accelerator.unwrap_model(self.model_wrapped) if self.is_in_train else self.model
        loader = self._loader(self.eval_rows, RankBatches(self.eval_order, rank=self.args.process_index))
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        start = time.perf_counter()
        model.eval()
        later = self.room.notice.planning("leaving this evaluation for later, then saving")
        with torch.no_grad(), self.accelerator.autocast(), later:
            for place, batch_on_cpu in enumerate(loader, 1):
                if self.is_in_train and self.room.ask():
                    raise EvaluationPutOff
                if (row := self._account(batch_on_cpu["skipped"])) is not None:
                    raise DataError(row)
                with self.guard.evaluation(batch_on_cpu, place=place, of=len(loader), step=self.state.global_step):
                    inputs: Any = self._prepare_inputs(batch_on_cpu)
                    outputs = model(**{key: inputs[key] for key in FORWARD_KEYS})
                total[0] += outputs.loss.double()
                total[1] += inputs["counts"]["supervised_tokens"]
        loss_sum, tokens = self.accelerator.reduce(total, reduction="sum").tolist()
        metrics = {
            f"{metric_key_prefix}_loss": loss_sum / max(1.0, tokens),
            f"{metric_key_prefix}_tokens": int(tokens),
            f"{metric_key_prefix}_runtime": time.perf_counter() - start,
        }
        if self.answers is not None:
            seconds = self.answers.ask(model, self.state.global_step, self.guard.watchdog, self.accelerator.autocast)
            metrics[f"{metric_key_prefix}_answers_s"] = seconds
        self.meter.exclude(time.perf_counter() - start)  # callbacks of what follows count their own time
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super()._evaluate(*args, **kwargs)
        except EvaluationPutOff:
            if self._started is None:  # no step since the checkpoint, which says what is due
                self.room.end(self.args, self.state)
            self.folder.evaluation_due = True
            self.args.save_only_model = False
            self._save_checkpoint(self.model_wrapped)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)
            raise  # not reached: `MakeRoom` has ended the run

    def evaluate_due(self) -> None:
        """Evaluate what a run that was told to go had no time for, if there is something."""
        if self.folder.evaluation_due:
            self.folder.evaluation_due = False
            self._determine_best_metric(metrics=self._evaluate(None, None), trial=None)
            self._name_best()

    # ---- log

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """One line for the user and one object in metrics.jsonl for each logged step and each evaluation."""
        line: dict[str, Any] = {"step": self.state.global_step, "epoch": self.state.epoch}
        unlogged = self.state.global_step > self._last_logged
        if "loss" in logs or ("train_runtime" in logs and unlogged and self._started):
            line |= self.meter.line(self.accelerator, steps=self.state.global_step - self._last_logged)
            line["max_steps"] = self.state.max_steps
            self._last_logged = self.state.global_step
            line["grad_norm"] = None if self._norm is None else float(self._norm)
            line["lr"] = self._rates
            began, first = self._started or (time.perf_counter(), self.state.global_step)
            rate = (time.perf_counter() - began) / max(1, self.state.global_step - first)
            self.say(progress(line, seconds_a_step=rate))
            logs = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "epoch")}
            logs |= {f"lr/{name}": rate for name, rate in self._rates.items()}
        elif "eval_loss" in logs:
            line |= logs
            self.say(f"  evaluation after step {line['step']:,}: loss {logs['eval_loss']:.4f}")
        else:
            return  # the stock summary at the end of training, with nothing left to count; ours is printed by the run
        if self.metrics is not None:
            self.metrics.write(line)
        super().log(logs)

    # ---- save and load

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.folder.staging if self.folder.saving else self.folder.path)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any = None) -> None:
        """The stock checkpoint, written aside and renamed into place when every rank is done."""
        if self.state.global_step > self._last_logged:
            self.log({"loss": 0.0})  # counts up to a checkpoint are on disk with it, or a resumed run would miss them
        start = time.perf_counter()
        self.guard.watchdog.at(f"saving checkpoint-{self.state.global_step}", patience=self.guard.args.saving_patience)
        self.folder.begin_checkpoint(writer=self.args.should_save)
        try:
            with self.room.notice.planning("stopping once this checkpoint is saved"):
                super()._save_checkpoint(model, trial)
        finally:
            self.folder.saving = False
        self._name_best()
        name = f"checkpoint-{self.state.global_step}"
        barrier()
        if self.args.local_process_index == 0 and self.args.process_index != 0:
            self.folder.sync(name)  # what the processes of a node wrote is in that node's memory
        skipped = self.all_skipped()
        if self.args.should_save:
            self.state.save_to_json(str(self.folder.staging / name / "trainer_state.json"))
            self.folder.commit_checkpoint(name, skipped)
            self.folder.drop_old(self.save_total_limit, self.state.best_model_checkpoint)
        barrier()
        self.meter.exclude(time.perf_counter() - start, "saving")

    def _name_best(self) -> None:
        best = self.state.best_global_step
        if best and (best == self.state.global_step or (self.folder.path / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(self.folder.path / f"checkpoint-{best}")

    def all_skipped(self) -> list[BadRow]:
        """Rows that turned out bad while training, of every rank; every rank must call it."""
        return [row for rank in gather(self.skipped) for row in rank.values()]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if self.args.should_save:
            self.folder.write_weights(Path(output_dir or self.folder.path), self.model, state_dict=state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.folder.read_weights(Path(resume_from_checkpoint), self.model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self.is_deepspeed_enabled:
            return super()._load_optimizer_and_scheduler(checkpoint)
        # transformers 5.17 cannot read them in a group of CPU processes ("cpu:0"); later ones can.
        parts: tuple[tuple[str, Any], ...] = (("optimizer.pt", self.optimizer), ("scheduler.pt", self.lr_scheduler))
        for name, part in parts:
            part.load_state_dict(torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True))

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled:
            return super()._load_best_model()
        self.folder.read_weights(Path(str(self.state.best_model_checkpoint)), self.model)
