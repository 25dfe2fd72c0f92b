"""The flags of a first run, which `vlft VERB --help` lists; `--help all` lists every flag.

Also help texts in plain words for flags of TrainingArguments, whose own texts are written for programmers.
`vlft.config.parse` reads both.
"""

from __future__ import annotations

_DATA = ("data_path", "image_folder")
_ROWS = ("image_max_pixels", "max_length", "on_bad_row")
_TOWERS = ("vision", "merger", "language", "lora_rank")
_STEPS = ("num_train_epochs", "learning_rate", "global_batch", "warmup_steps", "gradient_checkpointing", "deepspeed")

#: Verb -> flags of train in its short help. The verb's own flags are always listed.
COMMON: dict[str, tuple[str, ...]] = {
    "train": (
        *("method", *_DATA, "eval_path", *_ROWS, "pack_tokens", "model_id", *_TOWERS, *_STEPS),
        *("output_dir", "eval_strategy", "save_steps", "report_to", "resume_from_checkpoint"),
    ),
    "check-data": ("method", "image_folder", "columns", *_ROWS, "over_length", "model_id"),
    "export": ("method", "image_folder", "columns", *_ROWS, "model_id"),
    "preview": ("method", "image_folder", "columns", "image_max_pixels", "max_length", "model_id"),
    "plan": ("method", *_DATA, *_ROWS, "pack_tokens", "model_id", *_TOWERS, *_STEPS),
    "bench": (),
}

#: Flag of TrainingArguments -> its help text, with its default.
TEXTS = {
    "output_dir": "run folder: checkpoints, metrics, the report and the final weights",
    "num_train_epochs": "passes over the training data (default: 3), for preference rows and grpo 1",
    "warmup_steps": "steps in which the learning rate rises from 0; below 1: a share of all steps (default: 0)",
    "eval_strategy": "when to evaluate on --eval_path or --eval_split (default: no)",
    "logging_steps": "optimizer steps between lines of metrics.jsonl; a log shows at most one of them a minute",
    "disable_tqdm": "print lines on a terminal too, and draw no bar",
    "save_steps": "steps between checkpoints; below 1: a share of all steps (default: 500)",
    "report_to": "where metrics go besides metrics.jsonl: tensorboard, wandb and others (default: none)",
}
