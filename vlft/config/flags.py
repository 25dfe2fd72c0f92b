"""The flags of vlft, as dataclasses. `vlft.config.parse` turns argv and YAML into them. Imports nothing heavy.

A flag has the name it has in 2U1/Qwen2-VL-Finetune or in TrainingArguments, if it exists there. Flags that decide what
a row becomes are in `vlft.config.recipe`. `vlft.config.training` adds TrainingArguments.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from vlft.config.columns import read_columns
from vlft.config.grpo import COMPLETION, GrpoFlags
from vlft.config.mix import MixedSet, read_mix
from vlft.config.preference import METHODS, PreferenceFlags
from vlft.config.row_flags import RowFlags, flag
from vlft.errors import ConfigError

Mode = Literal["full", "lora", "frozen"]
Method = Literal["sft", "dpo", "orpo", "simpo", "grpo"]


@dataclass(frozen=True, kw_only=True)
class SourceFlags:
    """Where rows come from."""

    data_path: list[str] = field(
        default_factory=list,
        metadata={
            "help": "training data: one or more .json, .jsonl, .csv, .parquet or .tar files, or data set folders"
        },
    )
    columns: str | None = flag(
        None,
        "which columns or keys hold the parts of a row: question=q,answer=a,image=picture; with := a text for every "
        "row: 'answer=caption,question:=What is it?'",
    )
    data_mix: str | None = flag(
        None,
        "YAML list of data sets, each with image_folder, columns, weight, repeat or cap; instead of --data_path",
    )
    eval_path: list[str] = field(
        default_factory=list,
        metadata={"help": "evaluation data, in the same forms (with --eval_strategy steps or epoch)"},
    )
    eval_split: float | None = flag(
        None,
        "hold rows out of the training data to evaluate on: a share below 1, or a number of rows. --seed chooses them; "
        "rows that share a picture or video stay together",
    )
    image_folder: str | None = flag(
        None, "folder that relative picture and video paths start from (default: each data file's own folder)"
    )
    allow_outside_folder: bool = flag(
        False, "allow relative paths that leave --image_folder by '..' or by a link; for data files you trust"
    )
    allow_remote_media: bool = flag(
        False, "before the run, download pictures and videos with http(s) addresses into VLFT_MEDIA_CACHE"
    )

    def __post_init__(self) -> None:
        if self.columns is not None:
            read_columns(self.columns)  # raises before any file is opened

    @cached_property
    def training_sets(self) -> tuple[MixedSet, ...]:
        """The data sets to train on, each with its folder and its columns. `--data_mix` is read once.

        Raises:
            ConfigError: the file of `--data_mix` cannot be read, has an invalid entry, or `--data_path` is also given.
        """
        if self.data_mix is None:
            return tuple(self._completed(MixedSet(path=path)) for path in self.data_path)
        if self.data_path:
            raise ConfigError(
                f"--data_path {self.data_path[0]} and --data_mix {self.data_mix}: both name the training data. Write "
                "the file into the mix, or drop one of the two."
            )
        return tuple(self._completed(one) for one in read_mix(self.data_mix))

    @property
    def training_files(self) -> list[str]:
        """The data files to train on. Raises the errors of `training_sets`."""
        return [one.path for one in self.training_sets]

    def set_of(self, path: str) -> MixedSet:
        """Return a data file with its folder and columns, from its entry in the mix or else from the flags.

        Raises:
            ConfigError: the errors of `training_sets`.
        """
        own = (one for one in self.training_sets if one.path == path)
        return next(own, None) or self._completed(MixedSet(path=path))

    def _completed(self, one: MixedSet) -> MixedSet:
        every = None if self.columns is None else read_columns(self.columns)
        return replace(one, image_folder=one.image_folder or self.image_folder, columns=one.columns or every)


@dataclass(frozen=True, kw_only=True)
class DataFlags(RowFlags, SourceFlags):
    """Which data are read and how they become tokens and pixels. Shared by train, check-data, preview and plan."""

    _argument_group_name = "data"

    method: Method = flag(
        "sft",
        "what the answers of a row teach. sft: the model learns them; dpo, orpo, simpo: rows are preference rows, and "
        "the model learns to prefer the chosen answer to the rejected one; grpo: the model learns from rewards of its "
        "own completions (--reward), with TRL (vlft[grpo])",
    )
    pairs: bool = field(init=False, default=False)
    #: A flag of training that also decides which rows are refused.
    max_completion_length: int = flag(COMPLETION, "most tokens of a completion, with --method grpo")
    on_bad_row: Literal["error", "skip"] = flag(
        "error",
        "a row that cannot be trained. error: it stops the run; skip: it is skipped, counted and listed in vlft.json",
    )
    packing: bool = flag(True, "fill micro-batches with rows up to a token budget")
    pack_tokens: int | None = flag(
        None, "most tokens of a micro-batch with --packing (default: 16384, or --max_length if that is larger)"
    )
    pack_patches: int | None = flag(
        None, "most patches of pictures and videos in a micro-batch with --packing (default: 4 x --pack_tokens)"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "pairs", self.method in METHODS)  # follows from the method: not a flag of its own


@dataclass
class ModelFlags:
    """Which base is trained, and which parts of it. Shared by train, check-data, preview and plan."""

    _argument_group_name = "model"

    model_id: str | None = flag(None, "base model: a local folder or a Hugging Face id (Qwen/Qwen2-VL-2B-Instruct)")
    model_revision: str | None = flag(None, "branch, tag or commit of a Hugging Face id")
    adapter: str | None = flag(
        None,
        "adapter to start from: a run folder, a checkpoint-N or a folder of plain peft. What it trains, and its rank "
        "and alpha, apply to this run (default: new adapters)",
    )
    vision: Mode = flag("frozen", "how the vision tower (patch embedding and blocks) trains")
    merger: Mode = flag("frozen", "how the merger between vision tower and language model trains")
    language: Mode = flag("lora", "how the language model trains")
    lora_rank: int = flag(32, "rank of every LoRA matrix")
    lora_alpha: float = flag(64, "LoRA updates are scaled by alpha / rank")
    lora_dropout: float = flag(0.05, "dropout before each LoRA matrix; 0 with DoRA and for preference rows")
    lora_target: Literal["all", "attention"] = flag("all", "which linear layers of a LoRA tower are adapted")
    use_dora: bool = flag(False, "DoRA: also train the length of each row of a weight with LoRA")
    use_rslora: bool = flag(False, "scale LoRA updates by alpha / sqrt(rank) instead of alpha / rank")
    bits: Literal["16", "8", "4"] = flag(
        "16", "bits of the language model's frozen linear layers; 4 and 8 need bitsandbytes and --language lora"
    )
    quant_type: Literal["nf4", "fp4"] = flag("nf4", "number format of --bits 4")
    double_quant: bool = flag(True, "with --bits 4, also quantise the scales: 0.37 bits less per weight")
    language_blocks: str | None = flag(
        None, "train only these blocks of the language model, from 0: last:8 or 0-3,28 (default: all)"
    )
    vision_blocks: str | None = flag(None, "train only these blocks of the vision tower (default: all)")
    train_tokens: str | None = flag(
        None, "also train the embeddings of these tokens, which the tokenizer must have: '<a>,<b>'"
    )
    attn: Literal["auto", "fa4", "fa3", "flash_attn", "varlen", "sdpa"] = flag(
        "auto", "attention kernel; auto: the fastest that works"
    )
    linear_attn: Literal["auto", "fla", "torch"] = flag(
        "auto",
        "gated delta nets of Qwen3.5: flash-linear-attention, or plain torch; auto: fla on a GPU, if a test shows that "
        "it equals torch",
    )


@dataclass
class RunFlags(GrpoFlags, PreferenceFlags):
    """The training flags that vlft adds to TrainingArguments, or whose default it changes."""

    _argument_group_name = "training (TrainingArguments of transformers, and vlft's learning rates per tower)"

    learning_rate: float = flag(
        1e-4,
        "peak learning rate of the language model, and default for other towers; preference rows 5e-6 (full 5e-7), "
        "grpo 1e-5 (full 1e-6)",
    )
    vision_lr: float | None = flag(None, "peak learning rate of the vision tower (default: --learning_rate)")
    merger_lr: float | None = flag(None, "peak learning rate of the merger (default: --learning_rate)")
    loraplus_ratio: float | None = flag(
        None, "LoRA+: learning rate of LoRA's B matrices as a multiple of that of its A matrices, e.g. 16"
    )
    per_device_train_batch_size: int = flag(1, "rows of a micro-batch on one device, with --packing false")
    per_device_eval_batch_size: int = flag(1, "rows of an evaluation micro-batch on one device, with --packing false")
    global_batch: int | None = flag(
        None,
        "rows of an optimizer step over all devices, with --packing on average; instead of "
        "--gradient_accumulation_steps",
    )
    bf16: bool | None = flag(None, "bf16 autocast over float32 weights (default: on if the GPU has bf16)")
    fp16: bool = flag(False, "not supported: Qwen-VL's activations overflow float16")
    gradient_checkpointing: Literal["auto", "true", "false"] = flag(
        "auto", "recompute activations in the backward pass: less memory, slower. auto: only in towers that need it"
    )
    use_liger_kernel: Literal["auto", "true", "false"] = flag(
        "auto",
        "fused kernels, Liger's and ours, for norms, rotary embedding and activations. auto: on a GPU, each one that a "
        "test finds equal to torch; true: refuse to run without them",
    )
    cache_vision_features: bool = flag(
        False,
        "store what a frozen vision tower and merger compute of each picture and video, and use it from the second "
        "epoch on, and in later runs",
    )
    vision_cache: str | None = flag(
        None,
        "folder for --cache_vision_features; runs may share it (default: VLFT_VISION_CACHE, or ~/.cache/vlft/vision)",
    )
    vision_cache_gb: float = flag(50, "most GB (10^9 bytes) of that folder")
    resume_from_checkpoint: str | None = flag(
        "auto", "auto: resume from the newest complete checkpoint in --output_dir; none: never resume; or a path"
    )
    max_nonfinite_steps: int = flag(
        0,
        "most steps with a NaN or infinite loss or gradient that are skipped without an update; one more stops the run",
    )
    stall_timeout: float = flag(
        1800,
        "seconds without progress after which the run ends and reports which process stopped, and where; 0: never",
    )
    ddp_timeout: int = flag(
        None,
        "seconds that processes wait for each other before torch ends them without a report "
        "(default: longer than --stall_timeout)",
    )
    deepspeed: str | None = flag(
        None, "zero1, zero2, zero3, zero2_offload, zero3_offload, or a path to a DeepSpeed JSON"
    )
    logging_steps: float = flag(
        1, "optimizer steps between lines of metrics.jsonl; a log shows at most one of them a minute"
    )
    report_rows: int = flag(
        4, "evaluation rows that the model answers at each evaluation, for OUT/report.html; 0: none"
    )
    report_tokens: int = flag(256, "most tokens of such an answer; answers much longer than the row's own are cut")
    eval_metric: list[str] = field(
        default_factory=list,
        metadata={
            "help": "metrics of the model's answers to all evaluation rows, at each evaluation: exact_match, rouge_l, "
            "anls and others, or FILE.py:FUNCTION. An answer has at most twice the tokens of the row's own, plus 16"
        },
    )
    early_stopping_patience: int | None = flag(
        None, "stop after this many evaluations in a row without a better --metric_for_best_model (default: never)"
    )
    early_stopping_threshold: float = flag(0.0, "least difference that counts as better for --early_stopping_patience")
    logging_nan_inf_filter: bool = flag(False, "not used: see --max_nonfinite_steps")
    dataloader_num_workers: int = flag(
        None, "loader processes per device; 0 decodes in the training process (default: 4, or fewer on few cores)"
    )
    remove_unused_columns: bool = flag(False, "not used: rows have no columns")
    seed: int = flag(42, "random seed of new weights, dropout and the order of rows")

    @property
    def learning_rates(self) -> dict[str, float]:
        """Tower -> peak learning rate."""
        return {
            "language": self.learning_rate,
            "vision": self.learning_rate if self.vision_lr is None else self.vision_lr,
            "merger": self.learning_rate if self.merger_lr is None else self.merger_lr,
        }


class Steps:
    """Numbers of steps. `PlanFlags` and `vlft.config.training.TrainFlags` inherit it."""

    num_train_epochs: float
    max_steps: int
    warmup_steps: float

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the number of optimizer steps of the whole run."""
        return self.max_steps if self.max_steps > 0 else math.ceil(self.num_train_epochs * steps_per_epoch)

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Return the number of warm-up steps. A share (`--warmup_steps` below 1) never includes the last step.

        transformers rounds a share up: with 3% warm-up a run of one step would train that step at learning rate 0.
        """
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return min(math.ceil(num_training_steps * self.warmup_steps), max(0, num_training_steps - 1))


@dataclass
class PlanFlags(Steps, RunFlags):
    """The training flags that decide the steps of a run. Their defaults are those of TrainingArguments."""

    num_train_epochs: float = 3.0
    max_steps: int = -1
    warmup_steps: float = 0
    weight_decay: float = 0.0
    gradient_accumulation_steps: int = 1

    def __post_init__(self) -> None:
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_workers()

    @property
    def world_size(self) -> int:
        """Number of processes that were started together."""
        return int(os.environ.get("WORLD_SIZE", "1"))

    @property
    def process_index(self) -> int:
        """Number of this process, from 0."""
        return int(os.environ.get("RANK", "0"))


def default_workers() -> int:
    """Return the default of `--dataloader_num_workers`."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return min(4, max(1, (os.cpu_count() or 1) // here))
