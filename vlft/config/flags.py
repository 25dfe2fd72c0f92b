"""Every flag of vlft, as dataclasses. `vlft.config.parse` turns argv and YAML into them.

Names are those of 2U1/Qwen2-VL-Finetune where it has one, and TrainingArguments' own for everything it covers.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any, Literal

from transformers import TrainingArguments

from vlft.config.columns import read_columns
from vlft.config.deepspeed import be_a_world_of_one, deepspeed_settings, zero_word

Mode = Literal["full", "lora", "frozen"]


def _flag(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class DataFlags:
    """What is read and how it becomes tokens and pixels; shared by train, check-data, preview and plan."""

    _argument_group_name = "data"

    data_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "training data: one or more .json, .jsonl, .csv, .parquet or .tar files, or data set folders"
        },
    )
    columns: str | None = _flag(
        None,
        "which columns or keys hold the parts of a row: question=q,answer=a,image=picture; a text instead of a column: "
        "'answer=caption,question:=What is it?'",
    )
    data_mix: str | None = _flag(
        None, "YAML that lists data sets with image_folder, columns, weight, repeat or cap each, instead of --data_path"
    )
    eval_path: list[str] = field(
        default_factory=list, metadata={"help": "evaluation data, same form (with --eval_strategy steps or epoch)"}
    )
    image_folder: str | None = _flag(
        None, "folder that relative picture and video paths start from (default: each data file's own folder)"
    )
    allow_outside_folder: bool = _flag(
        False, "take relative paths that leave --image_folder by '..' or by a link; for data files you trust"
    )
    allow_remote_media: bool = _flag(
        False, "fetch pictures and videos that rows name by http(s), before the run, into VLFT_MEDIA_CACHE"
    )
    image_min_pixels: int | None = _flag(None, "smallest picture, in pixels (default: the base processor's)")
    image_max_pixels: int | None = _flag(None, "largest picture, in pixels (default: the base processor's)")
    video_min_pixels: int | None = _flag(None, "smallest video frame, in pixels (default: the base processor's)")
    video_max_pixels: int | None = _flag(None, "largest video frame, in pixels (default: the base processor's)")
    fps: float | None = _flag(None, "video frames per second (default: the base processor's, else 2)")
    nframes: int | None = _flag(None, "frames of every video, instead of --fps; even")
    video_max_frames: int | None = _flag(None, "most frames taken of a video under --fps (default: 768)")
    max_length: int | None = _flag(
        None, "tokens a row may have; longer ones: --over_length (default: the model's max_position_embeddings)"
    )
    over_length: Literal["error", "skip", "shrink", "drop_media"] = _flag(
        "error",
        "a row over --max_length or too large for a pack: refuse it, skip it, lower its pixels until it fits, or drop "
        "its last pictures and videos",
    )
    box_format: Literal["as_is", "pixels", "0-1000", "0-1"] = _flag(
        "as_is",
        "what the numbers of boxes in the text are: pixels of the original picture or shares of it, brought to what "
        "the model family expects; as_is leaves them",
    )
    missing_tags: Literal["error", "first"] = _flag(
        "error",
        "a row whose pictures or videos have no tag in its text: refuse it, or show all of them at the beginning of "
        "its first human turn",
    )
    on_bad_row: Literal["error", "skip"] = _flag(
        "error", "a row that cannot be trained stops the run, or is skipped, counted and listed in vlft.json"
    )
    packing: bool = _flag(True, "fill micro-batches with rows up to a token budget")
    pack_tokens: int | None = _flag(
        None, "tokens of a micro-batch under --packing (default: 16384, or --max_length where it is more)"
    )
    pack_patches: int | None = _flag(
        None, "patches of pictures and videos in a micro-batch under --packing (default: 4 x --pack_tokens)"
    )

    def __post_init__(self) -> None:
        if self.columns is not None:
            read_columns(self.columns)  # refused before anything is opened


@dataclass
class ModelFlags:
    """Which base, and which parts of it train; shared by train, check-data, preview and plan."""

    _argument_group_name = "model"

    model_id: str | None = _flag(None, "base model: a local folder or a Hugging Face id (Qwen/Qwen2-VL-2B-Instruct)")
    model_revision: str | None = _flag(None, "branch, tag or commit of a Hugging Face id")
    vision: Mode = _flag("frozen", "how the vision tower (patch embedding and blocks) trains")
    merger: Mode = _flag("frozen", "how the merger between vision tower and language model trains")
    language: Mode = _flag("lora", "how the language model trains")
    lora_rank: int = _flag(32, "rank of every LoRA matrix")
    lora_alpha: float = _flag(64, "LoRA updates are scaled by alpha / rank")
    lora_dropout: float = _flag(0.05, "dropout before each LoRA matrix")
    lora_target: Literal["all", "attention"] = _flag("all", "which linears of a LoRA tower are adapted")
    attn: Literal["auto", "fa4", "flash_attn", "varlen", "sdpa"] = _flag("auto", "attention kernel over flat rows")


@dataclass
class TrainFlags(TrainingArguments):
    """How it trains: TrainingArguments, with the defaults and additions of vlft."""

    _argument_group_name = "training (TrainingArguments of transformers, and vlft's learning rates per tower)"

    learning_rate: float = _flag(1e-4, "peak learning rate of the language model, and of the others unless given")
    vision_lr: float | None = _flag(None, "peak learning rate of the vision tower (default: --learning_rate)")
    merger_lr: float | None = _flag(None, "peak learning rate of the merger (default: --learning_rate)")
    per_device_train_batch_size: int = _flag(1, "rows of a micro-batch on one device, with --packing false")
    per_device_eval_batch_size: int = _flag(1, "rows of an evaluation micro-batch on one device, with --packing false")
    global_batch: int | None = _flag(
        None,
        "rows of an optimizer step over all devices, under --packing as a mean; instead of "
        "--gradient_accumulation_steps",
    )
    bf16: bool | None = _flag(None, "bf16 autocast over float32 masters (default: on where the GPU has it)")  # type: ignore[assignment]
    gradient_checkpointing: Literal["auto", "true", "false"] = _flag(  # type: ignore[assignment]
        "auto", "recompute activations in the backward pass: less memory, slower. auto: of the towers that need it"
    )
    use_liger_kernel: Literal["auto", "true", "false"] = _flag(  # type: ignore[assignment]
        "auto",
        "Liger's fused RMSNorm and SwiGLU: auto takes them on a GPU where they prove equal to torch, true insists",
    )
    resume_from_checkpoint: str | None = _flag(
        "auto", "auto continues from the newest complete checkpoint in --output_dir, none never does, or a path"
    )
    max_nonfinite_steps: int = _flag(
        0,
        "steps with a NaN or infinite loss or gradient that are left out, moving no weight; one more stops the run",
    )
    stall_timeout: float = _flag(
        1800, "seconds without progress after which the run is ended, and says which process stopped where; 0: never"
    )
    deepspeed: str | None = _flag(  # type: ignore[assignment]
        None, "zero1, zero2, zero3, zero2_offload, zero3_offload, or a path to a DeepSpeed JSON"
    )
    logging_steps: float = _flag(1, "optimizer steps between logged lines")
    report_rows: int = _flag(
        4, "evaluation rows whose answers are kept at each evaluation, for OUT/report.html; 0: none"
    )
    report_tokens: int = _flag(256, "most tokens of such an answer; never much more than the row's own has")
    logging_nan_inf_filter: bool = _flag(False, "not used: see --max_nonfinite_steps")
    dataloader_num_workers: int = _flag(
        None, "loader processes per device; 0 decodes in the training process (default: 4, or the cores there are)"
    )
    remove_unused_columns: bool = _flag(False, "not used: rows have no columns")
    seed: int = _flag(42, "of weights, dropout and the order of rows")

    def __post_init__(self) -> None:
        import torch

        if not torch.accelerator.is_available():
            self.use_cpu = True  # accelerate joins CPU processes into a group only when told so
        if self.bf16 is None:
            gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = bool(gpu and torch.cuda.is_bf16_supported() and not self.fp16)
        if self.dataloader_num_workers is None:
            here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            self.dataloader_num_workers = min(4, max(1, (os.cpu_count() or 1) // here))
        if self.eval_steps is None:
            self.eval_steps = self.save_steps  # transformers takes logging_steps, which is 1 here
        # Both of these would make the Trainer act on the model in ways that vlft does itself (vlft.model).
        self.checkpointing = self.gradient_checkpointing
        self.gradient_checkpointing = None  # type: ignore[assignment]
        self.liger = self.use_liger_kernel
        self.use_liger_kernel = False  # type: ignore[assignment]
        if self.deepspeed is not None:
            self.deepspeed = deepspeed_settings(self.deepspeed, vars(self))  # type: ignore[assignment]
            be_a_world_of_one()
        if self.ddp_broadcast_buffers is None:
            self.ddp_broadcast_buffers = False  # all of them are constants, and it would be a broadcast a micro-batch
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained module runs in every micro-batch
        super().__post_init__()

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warm-up; a share (`--warmup_steps` below 1) never takes the last one.

        transformers rounds a share up, so that 3% of a run of one step is that step, trained at learning rate 0.
        """
        steps = super().get_warmup_steps(num_training_steps)
        return min(steps, max(0, num_training_steps - 1)) if self.warmup_steps < 1 else steps

    def total_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps of the whole run."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)

    def accumulate(self, micro_batches: int) -> None:
        """Take so many micro-batches a step; DeepSpeed's settings have been filled in by now, and are told too."""
        self.gradient_accumulation_steps = micro_batches
        if self.deepspeed:
            settings = self.hf_deepspeed_config.config
            settings["gradient_accumulation_steps"] = micro_batches
            settings["train_batch_size"] = self.per_device_train_batch_size * micro_batches * self.world_size

    @property
    def zero(self) -> str | None:
        """`zero1` .. `zero3`, with `_offload`, also where a JSON says it; None without DeepSpeed."""
        settings: Any = self.deepspeed
        return zero_word(settings)

    @property
    def learning_rates(self) -> dict[str, float]:
        """Tower -> peak learning rate."""
        return {
            "language": self.learning_rate,
            "vision": self.learning_rate if self.vision_lr is None else self.vision_lr,
            "merger": self.learning_rate if self.merger_lr is None else self.merger_lr,
        }
