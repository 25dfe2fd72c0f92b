"""Short forms and synonyms of vlft's flags that users may type."""

from __future__ import annotations

from vlft.config.kits.outcome import (
    Becomes,
    Idle,
    Kit,
    Rule,
    attention,
    by_word,
    cannot,
    data,
    dtype,
    flag,
    held_out,
    on,
    patience,
    renamed,
    switch,
)
from vlft.config.kits.quantised import KEPT

#: Flag of vlft -> its synonyms.
_WORDS = {
    "learning_rate": "lr learningrate peak_lr",
    "vision_lr": "vit_learning_rate lr_vision visual_lr",
    "merger_lr": "mm_projector_lr lr_merger connector_lr",
    "num_train_epochs": "epochs epoch num_epoch train_epochs",
    "max_steps": "steps num_steps max_train_steps",
    "global_batch": "batch_size bs train_batch_size global_batch_size per_device_batch_size batch",
    "gradient_accumulation_steps": "grad_accum gradient_accumulation accumulation_steps",
    "warmup_steps": "warmup num_warmup_steps",
    "lr_scheduler_type": "scheduler lr_schedule",
    "weight_decay": "wd",
    "max_grad_norm": "grad_clip gradient_clipping clip_grad_norm max_gradient_norm",
    "lora_rank": "rank r lora_dim",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "model_revision": "revision branch",
    "model_id": "model_path model_dir base pretrained pretrained_model_name_or_path model_name",
    "image_folder": "image_dir images image_root image_path media_folder media_root data_root video_folder",
    "output_dir": "output out out_dir save_dir output_path",
    "dataloader_num_workers": "workers num_workers num_proc",
    "max_length": "max_len context_length max_tokens max_seq_len seq_length seq_len sequence_length",
    "resume_from_checkpoint": "resume_from load_checkpoint",
    "save_steps": "save_every save_freq save_interval checkpoint_every",
    "eval_steps": "eval_every eval_freq eval_interval",
    "logging_steps": "log_every log_freq log_interval",
    "report_to": "logger log_to",
    "fps": "frame_rate video_frame_rate",
    "nframes": "num_frames n_frames frames",
    "video_max_frames": "max_frames fps_max_frames",
    "deepspeed": "zero zero_stage ds_config deepspeed_config",
    "attn": "attention attn_type attn_backend",
}
_GPUS = "the launcher sets the number of GPUs: torchrun --nproc_per_node N -m vlft train, or GPUS=N for the scripts"
_ONE_GPU = "CUDA_VISIBLE_DEVICES in the environment picks a GPU: CUDA_VISIBLE_DEVICES=0 vlft train"
_RESUMES = dict.fromkeys(["", "true"], Idle(why="the same command resumes the run in its --output_dir"))
_RULES: dict[str, Rule] = {word: renamed(flag) for flag, words in _WORDS.items() for word in words.split()}
_RULES |= dict.fromkeys(
    [
        "train_dataset",
        "training_data",
        "data",
        "train_data",
        "train_file",
        "data_file",
        "data_files",
        "train_path",
        "json",
    ],
    data,
)
_RULES |= dict.fromkeys(
    [
        "val_dataset",
        "validation_data",
        "test_dataset",
        "eval_data",
        "val_data",
        "val_path",
        "validation_file",
        "eval_file",
        "test_data",
    ],
    lambda words: data(words, to="eval_path"),
)
_RULES |= dict.fromkeys(["num_gpus", "n_gpu", "nproc_per_node", "devices", "num_devices"], cannot(_GPUS))
_RULES |= dict.fromkeys(["gpu", "gpu_id", "gpu_ids", "cuda", "cuda_visible_devices"], cannot(_ONE_GPU))
_RULES |= dict.fromkeys(["resume", "resume_training"], by_word(_RESUMES, renamed("resume_from_checkpoint")))
_RULES["fp32"] = switch(true=flag("bf16", "false"), false=Idle())
_RULES["qlora"] = switch(true=Becomes(flags={"bits": ("4",), "language": ("lora",)}, note=KEPT), false=Idle())
_RULES["use_qlora"] = _RULES["qlora"]
_RULES["use_lora_plus"] = cannot("LoRA+ is --loraplus_ratio 16")
#: unsloth's words for what trains.
_RULES |= {
    f"finetune_{tower}_layers": switch(true=flag(tower, "lora"), false=flag(tower, "frozen"))
    for tower in ("vision", "language")
}
_RULES["finetune_attention_modules"] = on("attention is adapted with every --lora_target")
_RULES["finetune_mlp_modules"] = switch(true=flag("lora_target", "all"), false=flag("lora_target", "attention"))
_RULES["use_gradient_checkpointing"] = by_word(
    {"unsloth": flag("gradient_checkpointing", "true")}, renamed("gradient_checkpointing")
)
_RULES |= dict.fromkeys(["mixed_precision", "precision", "torch_dtype", "dtype"], dtype)
_RULES |= dict.fromkeys(["attn_implementation", "attn_impl", "attention_implementation"], attention)
_RULES |= dict.fromkeys(["val_split", "validation_split", "test_split_size"], held_out)
_RULES |= dict.fromkeys(["early_stop_patience", "early_stopping_rounds", "patience"], patience)
_RULES["translate"] = cannot("vlft plan --translate OLD does that")
_RULES["compile"] = cannot("torch.compile is not supported yet")

KIT = Kit(name="", rules=_RULES)
