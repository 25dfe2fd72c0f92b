"""What TRL's trainer is given in place of its own: settings, the order of prompts, and a stand-in for the processor."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from trl import GRPOConfig

from vlft.config.training import TrainFlags
from vlft.data.order import RowOrder
from vlft.train.folder import RunFolder
from vlft.train.grpo.prompts import Encoded


class PromptSampler(torch.utils.data.Sampler):
    """The rows of an epoch for TRL's loader: each prompt as often as it has completions, steps one after the other.

    TRL's own sampler leaves out the rows that do not fill a step. Here the last step is filled with the first rows of
    the epoch. The order is that of every run of vlft, so a resumed run continues it.

    Args:
        order: of the rows, with the completions of a prompt.
    """

    def __init__(self, order: RowOrder) -> None:
        self.order = order
        self.group = order.group or 1
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose rows come next, from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.order.steps * self.order.accumulation * self.order.rows_per_step * self.group

    def __iter__(self) -> Iterator[int]:
        rows, size = self.order.epoch(self.epoch), self.order.rows_per_step
        for step in range(self.order.steps):
            some = [rows[place % len(rows)] for place in range(step * size, (step + 1) * size)]
            for _ in range(self.order.accumulation):  # TRL reads a step's prompts again for each micro-batch
                for row in some:
                    yield from [row] * self.group


class Replies:
    """Stands for the processor where TRL uses it after its constructor: it has the batch's tokens and pixels already.

    Args:
        encoded: the batch that TRL works on.
        text: the ids of a completion -> its text, as `vlft chat` shows it.
    """

    def __init__(self, encoded: Callable[[], Encoded], text: Callable[[Sequence[int]], str]) -> None:
        self._encoded = encoded
        self._text = text

    def __call__(self, **_: Any) -> dict[str, torch.Tensor]:
        return self._encoded().padded

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        return ""  # TRL gives it back to `__call__`, which needs no text

    def batch_decode(self, ids: Sequence[Sequence[int]], **_: Any) -> list[str]:
        return [self._text(one) for one in ids]


def arguments(args: TrainFlags, folder: RunFolder, *, completion: int) -> Any:
    """The training flags with the settings that TRL reads. Those without a flag have TRL's defaults.

    Args:
        args: the training flags.
        folder: the run folder.
        completion: most tokens of a completion.
    """
    made: Any = copy.copy(args)
    made.max_completion_length = completion
    for one in dataclasses.fields(GRPOConfig):
        if not hasattr(made, one.name):
            value = one.default if one.default_factory is dataclasses.MISSING else one.default_factory()
            setattr(made, one.name, value)
    made.beta = 0.0  # set after the constructor, which would copy the adapter or load the base again
    made.scale_rewards = "group"  # as the config's own check writes True
    made.pad_to_multiple_of = None
    made.log_multimodal = False  # TRL gathers pictures from processes that have some, and waits for the others forever
    made.steps_per_generation = made.gradient_accumulation_steps
    made.generation_batch_size = made.per_device_train_batch_size * made.world_size * made.steps_per_generation
    made.dataloader_num_workers = 0  # pictures are decoded when a step begins; the loader only names rows
    made.dataloader_prefetch_factor = None
    made.ddp_find_unused_parameters = made.world_size > 1  # a micro-batch of text alone does not use the vision tower
    made.log_completions, made.num_completions_to_print = False, None  # `vlft.train.grpo.completions` does it
    made.output_dir = str(folder.path)
    return made


@contextlib.contextmanager
def without_checkpointing(model: Any) -> Iterator[None]:
    """Switch off the recomputation of activations, with which `generate` would not keep its cache.

    TRL does it too, and afterwards switches it on in every tower, also in those where this run has it off.
    """
    modules = [one for one in model.modules() if getattr(one, "gradient_checkpointing", False)]
    for one in modules:
        one.gradient_checkpointing = False
    try:
        yield
    finally:
        for one in modules:
            one.gradient_checkpointing = True
