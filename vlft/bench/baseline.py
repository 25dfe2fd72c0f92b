"""One measured run of stock transformers in its own process: `python -m vlft.bench.baseline SPEC.json`.

Base, rows, towers, precision, optimizer, learning rates and rows per optimizer step are those of vlft's run. Everything
else follows transformers, peft and their documentation: the stock forward and Trainer, right padding, and the processor
in the loader's workers. A run with kernels adds what can be added to that from outside (`vlft.bench.stock_kernels`).
The batch size and gradient checkpointing are the fastest settings that fit in memory (`vlft.bench.tune`).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler

from vlft.bench import stock_kernels
from vlft.bench.figures import Step
from vlft.bench.stock import COUNTS, StockRows, stock_collator
from vlft.bench.tune import ON_CPU, ModelTrial, Settings, fastest
from vlft.config.parse import FlagParser
from vlft.config.training import TrainFlags
from vlft.model import adapt
from vlft.model.apply import apply_towers
from vlft.setup import Base, open_base, trainable_rows
from vlft.setup.weights import load_for_training
from vlft.train.metrics import peak_gb


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Specification of a run.

    Attributes:
        flags: YAML file with the flags of vlft's run.
        side: `stock`, or `kernels` for stock transformers with fused kernels.
        order: `random`, or `grouped` for batches of rows of similar length.
        rows_per_step: rows of an optimizer step in vlft's run, on average.
        max_steps: maximum number of steps; -1 for one pass over the rows.
        batch: rows of a micro-batch; None for the fastest that fits.
        checkpointing: gradient checkpointing; None for the fastest that fits.
        cudnn: whether torch's sdpa may use cuDNN; None for the faster.
        out: file for the results.
    """

    flags: str
    side: str
    order: str
    rows_per_step: float
    max_steps: int
    batch: int | None
    checkpointing: bool | None
    out: str
    cudnn: bool | None = None


class StockTrainer(Trainer):
    """transformers' Trainer with a clock, and with given lengths of rows for the grouped order."""

    def __init__(self, *, lengths: list[int] | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.lengths = lengths
        self.steps: list[Step] = []
        self.counts: list[dict[str, int]] = []
        self.wait = 0.0
        self.since = time.perf_counter()
        self.add_callback(_Clock(self))
        self.printed = time.perf_counter()

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self.lengths is None:
            return super()._get_train_sampler(*args, **kwargs)
        # train_sampling_strategy="group_by_length" builds the same, but decodes all pictures to get the lengths.
        size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(size, lengths=self.lengths)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        batches, items = super().get_batch_samples(*args, **kwargs)
        self.wait += time.perf_counter() - start
        self.counts += [batch.pop(COUNTS) for batch in batches]
        return batches, items

    def end_step(self) -> None:
        """Record the figures of an optimizer step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()

        def total(name: str) -> int:
            return sum(counts[name] for counts in self.counts)

        self.steps.append(
            Step(
                seconds=now - self.since,
                wait=self.wait,
                tokens=total("tokens"),
                places=total("places"),
                supervised=total("supervised_tokens"),
                images=total("images"),
                samples=total("samples"),
            )
        )
        self.since, self.wait, self.counts = now, 0.0, []
        last = self.steps[-1]
        print(f"step {len(self.steps)}/{self.state.max_steps}  {last.tokens / last.seconds:,.0f} tok/s")


class _Clock(TrainerCallback):
    def __init__(self, trainer: StockTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.since = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.end_step()


def main(spec: Spec) -> None:
    """Run the specification, and write its steps, settings and peak memory."""
    parsed = FlagParser("train").parse(["--config", spec.flags])
    data, model_flags, args = parsed.flags
    set_seed(args.seed)
    base = open_base(data, model_flags, given=parsed.given)
    measured = trainable_rows(data.data_path, data, base, workers=args.dataloader_num_workers)
    lengths = [cost.tokens for cost in measured.costs]
    rows = StockRows(samples=measured.rows.samples, processor=base.processor, recipe=base.recipe, family=base.family)
    collator = stock_collator(base.processor, trained_only=spec.side == "kernels")
    model, recompute, runs = prepared(base, args, side=spec.side)
    settings, tried = _settings(spec, model, rows, collator, lengths, args, recompute, attention=runs["attention"])
    settings.apply()
    recompute(settings.checkpointing)
    accumulation = max(1, round(spec.rows_per_step / settings.batch))
    print(f"{spec.side}, {spec.order}: {settings}, accumulation {accumulation}, {runs}")
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer = StockTrainer(
        model=model,
        args=_arguments(args, spec, settings.batch, accumulation),
        train_dataset=rows,
        data_collator=collator,
        lengths=lengths if spec.order == "grouped" else None,
    )
    trainer.train()
    found = {
        "steps": [asdict(step) for step in trainer.steps],
        "peak_gb": peak_gb(),
        "settings": {
            **{"side": spec.side, "order": spec.order, "accumulation": accumulation, "tried": tried},
            **settings.as_json(),
            **runs,
        },
    }
    Path(spec.out).write_text(json.dumps(found), encoding="utf-8")


def _dtype(args: TrainFlags) -> torch.dtype:
    return args.half or torch.float32


def _settings(
    spec: Spec,
    model: torch.nn.Module,
    rows: StockRows,
    collator: Callable[[Any], dict[str, Any]],
    lengths: list[int],
    args: TrainFlags,
    recompute: Callable[[bool], None],
    *,
    attention: str,
) -> tuple[Settings, list[dict[str, Any]]]:
    """The settings of the run, and those that were timed to find them. On a CPU nothing is timed."""
    if spec.cudnn is not None and spec.batch is not None and spec.checkpointing is not None:
        return Settings(batch=spec.batch, checkpointing=spec.checkpointing, cudnn=spec.cudnn), []
    if args.device.type != "cuda":
        return Settings(batch=spec.batch or ON_CPU, checkpointing=bool(spec.checkpointing)), []
    trial = ModelTrial(model, rows, collator, dtype=_dtype(args), recompute=recompute)
    return fastest(
        trial,
        lengths,
        order=spec.order,
        batch=spec.batch,
        checkpointing=spec.checkpointing,
        without_cudnn="sdpa" in attention,
    )


def prepared(
    base: Base, args: TrainFlags, *, side: str
) -> tuple[torch.nn.Module, Callable[[bool], None], dict[str, str]]:
    """Load the base with the towers that vlft trains: plain peft for LoRA, and float32 masters of trained weights.

    Args:
        base: the opened base.
        args: flags of vlft's run.
        side: `stock` or `kernels`.

    Returns:
        the model; a function that switches gradient checkpointing; "attention" and "kernels", as text.
    """
    half = args.half
    model: Any = load_for_training(base, half=half, device=args.device)
    model.config.use_cache = False
    model.to(args.device)
    if side == "kernels":
        runs = stock_kernels.install(model, dtype=_dtype(args))
    else:
        runs = {"attention": _own_attention(model, half), "kernels": "off"}
    model = apply_towers(model, base.family, base.towers, masters=True, adapters="peft")

    def recompute(on: bool) -> None:
        live = adapt.bare(model)
        if side == "kernels":
            stock_kernels.recompute(live, base.towers, on=on)
            return
        live.gradient_checkpointing_disable()
        live.disable_input_require_grads()  # transformers leaves its hooks, which make a frozen ViT run backward
        if on:
            live.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    return model, recompute, runs


def _own_attention(model: Any, half: torch.dtype | None) -> str:
    """Use FlashAttention 2 if transformers can, else sdpa. Returns its name."""
    if half and importlib.util.find_spec("flash_attn") is not None:
        try:
            model.set_attn_implementation("flash_attention_2")
            return "flash_attention_2"
        except (ImportError, ValueError) as error:
            print(f"flash_attention_2 is not used: {error}")
    return "sdpa"


def _arguments(args: TrainFlags, spec: Spec, batch: int, accumulation: int) -> TrainingArguments:
    same = (
        "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim",
        "lr_scheduler_type", "warmup_steps", "bf16", "fp16", "seed", "use_cpu", "dataloader_num_workers",
        "dataloader_prefetch_factor", "dataloader_pin_memory",
    )  # fmt: skip
    return TrainingArguments(
        output_dir=str(Path(spec.out).parent / "unused"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        dataloader_persistent_workers=args.dataloader_num_workers > 0,
        max_steps=spec.max_steps,
        num_train_epochs=1,
        logging_steps=1,
        logging_nan_inf_filter=False,  # the default waits for the device in every micro-batch
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        **{name: getattr(args, name) for name in same},
    )


if __name__ == "__main__":
    main(Spec(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
