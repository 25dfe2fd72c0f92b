"""Flags that all kits share: TrainingArguments that transformers 5 has removed, or that vlft replaces."""

from __future__ import annotations

from vlft.config.kits.outcome import Cannot, Idle, Kit, Outcome, Rule, cannot, flag, idle, off, on, renamed, switch

_ORDER = "the order of rows depends on --seed, the epoch and the global batch"
_PACKED = idle("rows are packed and never padded")
_EVALUATION = off("evaluation computes the loss only")
_COMPILE = off("torch.compile is not supported yet")
_HUB = off("nothing is uploaded during a run. Use the `hf upload` command on the finished folder")
_FSDP = off("use --deepspeed zero2 or zero3")


def warmup(words: tuple[str, ...]) -> Outcome:
    """Translate a share of all steps, which in transformers 5 is a `--warmup_steps` below 1."""
    return flag("warmup_steps", *(words or ("0.03",)), note="a value below 1 is a share of all steps" if words else "")


def seed(words: tuple[str, ...]) -> Outcome:
    return Idle(why="--seed also sets the order of rows")


def sampling(words: tuple[str, ...]) -> Outcome:
    return Idle(why=_ORDER) if words[:1] in (("random",), ("group_by_length",)) else Cannot(why=_ORDER)


def checkpointing(words: tuple[str, ...]) -> Outcome:
    return Idle(why="--gradient_checkpointing decides; it is always non-reentrant")


#: TrainingArguments that vlft replaces or does not support.
REPLACED: dict[str, Rule] = {
    "train_sampling_strategy": sampling,
    "length_column_name": idle("rows have no columns"),
    "dataloader_drop_last": off("every row is trained exactly once an epoch"),
    "dataloader_persistent_workers": idle("workers are always persistent"),
    "remove_unused_columns": idle("rows have no columns"),
    "label_names": cannot("labels are the assistant turns. Drop it"),
    "label_smoothing_factor": off("the loss is the plain cross-entropy of the trained tokens"),
    "average_tokens_across_devices": on("the loss is always averaged over all tokens of the global step"),
    "auto_find_batch_size": off("set the size of a micro-batch with --pack_tokens; vlft plan estimates memory"),
    "ignore_data_skip": off("a resumed run always starts at its step"),
    "data_seed": seed,
    "accelerator_config": cannot("vlft has its own loader. Drop it"),
    "parallelism_config": cannot("use --deepspeed"),
    "fsdp": _FSDP,
    "fsdp_config": _FSDP,
    "ddp_find_unused_parameters": idle("every trained module runs in every micro-batch"),
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "activation_checkpointing": switch(
        true=flag("gradient_checkpointing", "true"), false=flag("gradient_checkpointing", "false")
    ),
    "activation_checkpointing_kwargs": checkpointing,
    "gradient_checkpointing_kwargs": checkpointing,
    "liger_kernel_config": cannot("--use_liger_kernel decides which kernels are fused"),
    "use_cache": off("training keeps no cache"),
    "prediction_loss_only": idle("evaluation computes the loss only"),
    "include_for_metrics": _EVALUATION,
    "batch_eval_metrics": _EVALUATION,
    "eval_do_concat_batches": idle("evaluation keeps no outputs"),
    "eval_use_gather_object": idle("evaluation keeps no outputs"),
    "eval_accumulation_steps": idle("evaluation keeps no outputs"),
    "bf16_full_eval": off("evaluation computes as training does: --bf16"),
    "fp16_full_eval": off("evaluation computes as training does: --bf16"),
    "do_train": on("vlft train always trains"),
    "do_eval": off("set the rows with --eval_path or --eval_split, and when to evaluate with --eval_strategy epoch"),
    "do_predict": off("use vlft chat on the finished run"),
    "include_num_input_tokens_seen": idle("metrics.jsonl counts tokens"),
    "save_on_each_node": off("only one node writes"),
    "enable_jit_checkpoint": off("a run saves a checkpoint when a signal stops it; otherwise --save_steps decides"),
    "restore_callback_states_from_checkpoint": idle("a resumed run restores them"),
    "local_rank": idle("the launcher sets it"),
    "optim_target_modules": off("--vision, --merger and --language set what trains"),
    "push_to_hub": _HUB,
    "hub_token": _HUB,
    "hub_private_repo": _HUB,
    "hub_model_id": _HUB,
    "hub_strategy": idle("nothing is uploaded during a run"),
    "hub_always_push": _HUB,
    "hub_revision": _HUB,
    "neftune_noise_alpha": off("noise on embeddings is not supported: its size would depend on the pack of a row"),
}

#: Names of earlier versions of transformers, and of several kits.
FORMER: dict[str, Rule] = {
    "warmup_ratio": warmup,
    "overwrite_output_dir": off(
        "an existing run is never overwritten. Set a new --output_dir, or resume the existing run with "
        "--resume_from_checkpoint auto"
    ),
    "group_by_length": _PACKED,
    "evaluation_strategy": renamed("eval_strategy"),
    "per_gpu_train_batch_size": renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": renamed("per_device_eval_batch_size"),
    "no_cuda": renamed("use_cpu"),
    "logging_dir": idle("metrics.jsonl and event files are in --output_dir"),
    "save_safetensors": on("weights are written as safetensors only"),
    "trust_remote_code": idle("code of a base is never run, and Qwen-VL needs none"),
    "cache_dir": cannot("set HF_HOME in the environment"),
    "jit_mode_eval": off("not supported"),
    "use_ipex": off("not supported"),
    "dispatch_batches": off("vlft has its own loader"),
    "split_batches": off("vlft has its own loader"),
    "torchdynamo": _COMPILE,
    "fp16_backend": idle("torch's autocast is used"),
    "half_precision_backend": idle("torch's autocast is used"),
    "include_tokens_per_second": idle("metrics.jsonl has them"),
}
KIT = Kit(name="transformers", rules=REPLACED | FORMER)
