"""TRL's GRPOTrainer with vlft's prompts, rewards, parameter groups, order of rows, checkpoints and log lines.

Written against TRL 1.16. It overrides these methods of `trl.GRPOTrainer` and of transformers' Trainer (`saving` and
`zero` list theirs):
- `_get_train_sampler`: our order, so that no row is left out and a resumed run continues it.
- `_generate_and_score_completions`, `_tokenize_prompts`: the tokens and pixels of `vlft.train.grpo.prompts`.
- `_get_per_token_logps_and_entropies`: completions of text alone have no pixels, also as a part of a batch.
- `_get_num_items_in_batch`, `training_step`, `compute_loss`, `_get_grad_norm`: the guard and the meter of a step.
- `create_optimizer`, `floating_point_ops`, `get_batch_samples`, `_maybe_log_save_evaluate`, `log`: as in
  `vlft.train.trainer`.
- `create_model_card`, `_send_telemetry`: nothing is written beside our files, and nothing is sent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Trainer
from trl import GRPOTrainer

from vlft.answering import speaker
from vlft.config.preference import beta_of
from vlft.config.rewards import COLUMNS
from vlft.config.training import TrainFlags
from vlft.data.order import RowOrder
from vlft.errors import VlftError
from vlft.model.groups import Group
from vlft.objectives import Loss
from vlft.objectives.base import Mean
from vlft.train import optimizers
from vlft.train.callbacks import KeepToFlags, MakeRoom, SetEpoch, StopAtTheEnd
from vlft.train.folder import RunFolder
from vlft.train.grpo.completions import Completions, column_of
from vlft.train.grpo.prompts import Encoded, Prompts, begun, part_of
from vlft.train.grpo.rewards import Rewards
from vlft.train.grpo.stock import PromptSampler, Replies, arguments, without_checkpointing
from vlft.train.metrics import Meter, MetricsFile
from vlft.train.progress import Progress
from vlft.train.ranks import gather
from vlft.train.saving import SavingTrainer
from vlft.train.signals import Notice
from vlft.train.step_guard import StepGuard

#: TRL's metrics of a batch of completions that become entries of metrics.jsonl, by TRL's names.
OF_COMPLETIONS = (
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "completions/mean_length",
    "completions/clipped_ratio",
)
#: Before the name of a metric that a reward logs with `log_metric`, in metrics.jsonl.
OF_USER = "reward/"
#: TRL's metrics of a micro-batch.
OF_LOSS = ("entropy", "kl")


def statistics_of(rewards: Sequence[str]) -> tuple[str, ...]:
    """The entries of metrics.jsonl that GRPO adds."""
    return (*OF_COMPLETIONS, *OF_LOSS, *(f"rewards/{name}/mean" for name in rewards))


class GrpoTrainer(SavingTrainer, GRPOTrainer):
    """The trainer of a GRPO run. The arguments are those of `VlftTrainer`, where they are the same.

    Args:
        model: ready to train.
        args: the training flags.
        groups: parameter groups of the optimizer.
        prompts: the rows.
        rewards: score completions.
        completions: keeps them; None: they are not kept.
        order: of the rows.
        folder: the run folder.
        guard: guards each step.
        notice: of a signal that ends the run.
        meter: counts; its statistics are `statistics_of`.
        metrics: metrics.jsonl, or None on ranks that do not write.
        progress: shows how far the run is.
        say: prints a line for the user.
    """

    def __init__(
        self,
        *,
        model: torch.nn.Module,
        args: TrainFlags,
        groups: list[Group],
        prompts: Prompts,
        rewards: Rewards,
        completions: Completions | None,
        order: RowOrder,
        folder: RunFolder,
        guard: StepGuard,
        notice: Notice,
        meter: Meter,
        metrics: MetricsFile | None,
        progress: Progress,
        say: Callable[[str], None],
    ) -> None:
        self.order = order
        self.prompts = prompts
        self.rewards = rewards
        self.completions = completions
        stock: Any = super().__init__
        stock(
            model=model,
            reward_funcs=[self._reward(place, name) for place, name in enumerate(rewards.names)],
            args=arguments(args, folder, completion=prompts.base.completion),
            train_dataset=prompts.dataset(),
            processing_class=prompts.base.processor,
        )
        self.beta = beta_of("grpo", args)
        self.groups = [group for group in groups if group.trainable]
        self.folder = folder
        self.guard = guard
        self.meter = meter
        self.metrics = metrics
        self.progress = progress
        self.say = say
        self.skipped = {}
        self.stopping = None  # there are no evaluations to stop by
        self.encoded: Encoded = Encoded(ids=[], kinds=[], pictures=[], pixels_PX=None, grids_M3=None)
        self._last_logged = 0
        self._rates: dict[str, float] = {}
        self._norm: float | None = None
        self._started = False
        self._fresh: dict[str, float] = {}  # TRL's metrics of completions that no micro-batch has counted yet
        self._logged: dict[str, list[float]] = {}  # what rewards logged since the last line
        self._extra: dict[str, list[str]] = {}  # what rewards logged of the completions of this step
        self._equal = 0  # steps in a row whose groups all have equal rewards
        live: Any = model
        top = live.get_base_model() if hasattr(live, "get_base_model") else live
        said = speaker(top, prompts.base.processor, prompts.base.family)
        self.eos_token_ids = said.ends
        self.generation_kwargs["eos_token_id"] = self.generation_config.eos_token_id = said.ends
        self.processing_class: Any = Replies(lambda: self.encoded, said.text)
        # As in `VlftTrainer`.
        self.save_total_limit, self.args.save_total_limit = args.save_total_limit, None
        self.room = MakeRoom(notice, folder, steps=order.steps)
        for callback in (KeepToFlags(), self.room, StopAtTheEnd(), progress):
            self.add_callback(callback)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card."""

    def _send_telemetry(self) -> None:
        """Send nothing."""

    def evaluate_due(self) -> None:
        """There are no evaluations."""

    # ---- prompts and completions

    def _get_train_sampler(self, dataset: Any = None) -> PromptSampler:
        sampler = PromptSampler(self.order)
        self.add_callback(SetEpoch(sampler))  # type: ignore[arg-type]
        return sampler

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        places = [one["row"] for one in inputs]
        self.guard.watchdog.at(f"step {self.guard.step}, completions", self._rows_of(inputs))
        self.encoded = self.prompts.encode(places)
        self._extra = {}
        with without_checkpointing(self.model):
            output = super()._generate_and_score_completions([dict(self.prompts.columns(place)) for place in places])
        found = self._metrics["train"]
        self._fresh = {name: found[name][-1] for name in self.meter.statistics if found.get(name)}
        for name in [name for name in found if name.startswith(OF_USER)]:
            self._logged.setdefault(name, []).append(found.pop(name)[-1])
        self._watch_rewards(self._fresh["frac_reward_zero_std"])
        if self.completions is not None:
            self.completions.sampled(places, output, self.eos_token_ids, logs=self._logs, extra=self._extra)
        return output

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], Any, dict[str, Any]]:
        pictures = None
        if self.encoded.pixels_PX is not None:
            pictures = [[None] * count for count in self.encoded.pictures]  # TRL only counts them
        return self.encoded.ids, pictures, self.encoded.fields

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        num_images: list[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        stock = super()._get_per_token_logps_and_entropies
        if num_images is None:
            return stock(model, input_ids, attention_mask, logits_to_keep, batch_size=batch_size, **kwargs)
        size, found = batch_size or len(input_ids), []
        for start in range(0, len(input_ids), size):
            some = slice(start, start + size)
            fields = kwargs | part_of(kwargs, num_images, start, start + size)
            found.append(stock(model, input_ids[some], attention_mask[some], logits_to_keep, **fields))
        logps, entropies, losses = zip(*found, strict=True)
        return (
            torch.cat(logps),
            None if entropies[0] is None else torch.cat(entropies),
            None if losses[0] is None else torch.stack(losses).mean(),
        )

    def _reward(self, place: int, name: str) -> Callable[..., list[float]]:
        def reward(
            *, prompts: Any, completions: Any, completion_ids: Any, log_extra: Any, log_metric: Any, **columns: Any
        ) -> list[float]:
            whole = [begun(one, opening) for one, opening in zip(completions, columns["opening"], strict=True)]
            asked = {"prompts": prompts, "completions": whole, "completion_ids": completion_ids}
            asked |= {one: columns[one] for one in COLUMNS}
            rows = [f"{file}[{index}]" for file, index in zip(columns["file"], columns["index"], strict=True)]
            state = {one: getattr(self.state, one) for one in ("global_step", "max_steps", "epoch")}
            said: dict[str, Any] = {}
            failed = None
            try:
                said = self.rewards.score(place, asked, rows=rows, state=state)
                for column, values in said["extra"]:
                    self._extra |= column_of(name, column, values, want=len(rows), there=self._extra)
            except VlftError as error:
                failed = error
            gather(None, failed=failed)
            for metric, value in said["metrics"]:
                log_metric(OF_USER + metric, value)
            return said["scores"]

        reward.__name__ = name
        return reward

    def _watch_rewards(self, equal: float) -> None:
        """Say it if the rewards of each group are equal for many steps: then nothing is learned."""
        self._equal = self._equal + 1 if equal == 1 else 0
        most = self.args.equal_rewards_steps
        if self._equal and self._equal % most == 0:
            self.say(
                f"warning: in the last {self._equal:,} steps all {self.num_generations} completions of a prompt had "
                f"the same reward (mean {self._fresh['reward']:.3g}), so nothing was learned. Raise --temperature or "
                "--num_generations, use a reward with more values between 0 and 1 (edit_ratio), or train the wording "
                "first with --method sft."
            )

    # ---- the step

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        self.guard.loading(self.state.global_step + 1)
        found = super().get_batch_samples(*args, **kwargs)
        self.meter.add_wait(time.perf_counter() - start)
        return found

    def _rows_of(self, inputs: Sequence[dict[str, Any]]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.prompts.name_of(one["row"]) for one in inputs))

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        self.guard.begin_rows([self._rows_of(batch) for batch in batch_samples])

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        if not self._started:
            self._started = True
            self._last_logged = self.state.global_step
        optimizer: Any = self.optimizer
        self._rates = {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
        with self.guard.micro_batch():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        computed: Any = super().compute_loss(model, inputs, *args, **kwargs)
        loss: torch.Tensor = computed
        found = self._metrics["train"]
        means = {name: Mean(torch.tensor(value), 1.0) for name, value in self._fresh.items()}
        asked, said = (int(inputs[name].sum()) for name in ("prompt_mask", "completion_mask"))
        places = inputs["prompt_mask"].numel() + inputs["completion_mask"].numel()
        # These are means over tokens, so a micro-batch counts by its tokens.
        means |= {name: Mean(torch.tensor(found[name][-1] * said), said) for name in OF_LOSS if found.get(name)}
        self._fresh = {}
        counts = {
            "tokens": asked + said,
            "supervised_tokens": said,
            "images": sum(inputs.get("num_images") or []),
            "videos": 0,
            "samples": len(inputs["completion_ids"]),
        }
        share = 1 / self.current_gradient_accumulation_steps
        batch: Any = {"counts": counts}
        self.meter.add(batch, Loss(loss.detach(), share, means), padding=places - asked - said)
        self.guard.add_loss(loss)
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> float | None:
        self._norm = norm = self.meter.read(super()._get_grad_norm(*args, **kwargs))
        if self.guard.must_leave_out(norm):
            self.model_wrapped.zero_grad(set_to_none=True)
            self._norm = None
            self.meter.drop_step()
            return None
        self.meter.keep_step()
        return norm

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            live: Any = self.model
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, live)
            optim = str(getattr(self.args.optim, "value", self.args.optim))
            self.optimizer = optimizers.build(cls, options, self.groups, live, optim=optim)
        return self.optimizer

    def floating_point_ops(self, inputs: Any) -> int:
        return 0

    # ---- log

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            self._globalstep_last_logged = self.state.global_step
            self.log({"loss": 0.0})
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write one object to metrics.jsonl for each logged step, and show it."""
        self._metrics["train"].clear()
        unlogged = self.state.global_step > self._last_logged
        if "loss" not in logs and not ("train_runtime" in logs and unlogged and self._started):
            return
        line: dict[str, Any] = {"step": self.state.global_step, "epoch": self.state.epoch}
        line |= self.meter.line(steps=self.state.global_step - self._last_logged)
        line |= {"max_steps": self.state.max_steps, "grad_norm": self._norm, "lr": self._rates}
        line |= {name: sum(values) / len(values) for name, values in self._logged.items()}
        self._logged.clear()
        self._last_logged = self.state.global_step
        self.progress.logged(line)
        if self.metrics is not None:
            self.metrics.write(line)
        if self.completions is not None:
            self.completions.logged(self.state.global_step, self.state.max_steps)
        logs = {k: v for k, v in line.items() if isinstance(v, int | float) and k not in ("step", "epoch")}
        Trainer.log(self, logs | {f"lr/{name}": rate for name, rate in self._rates.items()})
