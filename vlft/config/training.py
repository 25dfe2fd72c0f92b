"""The flags of training: TrainingArguments of transformers, with vlft's own. Imports transformers and torch.

Neighbours: `vlft.config.flags` declares vlft's own flags.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainingArguments

from vlft.config.checks import REPORTING, SAVING
from vlft.config.deepspeed import be_a_world_of_one, deepspeed_settings, zero_word
from vlft.config.device import has_bf16
from vlft.config.flags import RunFlags, Steps, default_workers

if TYPE_CHECKING:
    import torch


@dataclass
class TrainFlags(Steps, RunFlags, TrainingArguments):  # type: ignore[misc]
    """How the model trains: TrainingArguments, with vlft's defaults and additional flags."""

    def __post_init__(self) -> None:
        import torch

        if not torch.accelerator.is_available():
            self.use_cpu = True  # accelerate joins CPU processes into a group only with this flag
        self.tf32_of_no_use = bool(self.tf32 and self.use_cpu)
        if self.tf32_of_no_use:
            self.tf32 = None  # transformers would refuse it, and a YAML for a GPU is also planned and tried without one
        if self.bf16 is None:
            gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = bool(gpu and has_bf16())
        if self.ddp_timeout is None:
            # 1800 is the default of transformers.
            self.ddp_timeout = max(1800, math.ceil(SAVING * self.stall_timeout) + REPORTING)
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_workers()
        if self.eval_steps is None:
            self.eval_steps = self.save_steps  # transformers uses logging_steps, whose default is 1 here
        # With these two flags the Trainer would change the model. `vlft.model` does it instead.
        self.checkpointing = self.gradient_checkpointing
        self.gradient_checkpointing = None  # type: ignore[assignment]
        self.liger = self.use_liger_kernel
        self.use_liger_kernel = False  # type: ignore[assignment]
        if self.deepspeed is not None:
            self.deepspeed = deepspeed_settings(self.deepspeed, vars(self))  # type: ignore[assignment]
            be_a_world_of_one()
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # all buffers are constants; True costs a broadcast per micro-batch
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained module runs in every micro-batch
        if self.eval_metric and self.metric_for_best_model and self.greater_is_better is None:
            from vlft.metrics import find

            chosen = self.metric_for_best_model.removeprefix("eval_")
            self.greater_is_better = {one.name: one.higher for one in find(self.eval_metric)}.get(chosen)
        super().__post_init__()

    def with_accumulation(self, micro_batches: int) -> TrainFlags:
        """Return a copy of these flags with `micro_batches` gradient accumulation steps.

        Also updates DeepSpeed's settings: the whole process shares one object (transformers'
        `set_hf_deepspeed_config`), and its "auto" values are already filled in.
        """
        made = copy.copy(self)  # `replace` would initialise the process group again
        made.gradient_accumulation_steps = micro_batches
        if self.deepspeed:
            settings = self.hf_deepspeed_config.config
            settings["gradient_accumulation_steps"] = micro_batches
            settings["train_batch_size"] = self.per_device_train_batch_size * micro_batches * self.world_size
        return made

    @property
    def half(self) -> torch.dtype | None:
        """The 16-bit dtype of matrix products under autocast; None if everything is float32."""
        import torch

        return torch.bfloat16 if self.bf16 else None

    @property
    def saving_patience(self) -> float:
        """How long saving may take while other processes wait, as a multiple of `--stall_timeout`."""
        if not self.stall_timeout:
            return SAVING
        return min(SAVING, (self.ddp_timeout - REPORTING) / self.stall_timeout)

    @property
    def zero(self) -> str | None:
        """`zero1` to `zero3`, or with `_offload`, from the preset or the JSON file; None without DeepSpeed."""
        settings: Any = self.deepspeed
        return zero_word(settings)
