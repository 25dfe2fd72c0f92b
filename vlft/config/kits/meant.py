"""Names that people try, by what they mean: short forms and other words for flags of ours."""

from __future__ import annotations

from vlft.config.kits.outcome import Kit, cannot, data, renamed

_GPUS = cannot("the launcher says how many GPUs there are: torchrun --nproc_per_node N -m vlft train, or GPUS=N for the "
               "scripts")  # fmt: skip

KIT = Kit(
    name="",
    rules={
        **dict.fromkeys(("lr", "learningrate", "peak_lr"), renamed("learning_rate")),
        **dict.fromkeys(("vit_learning_rate", "lr_vision", "visual_lr"), renamed("vision_lr")),
        **dict.fromkeys(("mm_projector_lr", "lr_merger", "connector_lr"), renamed("merger_lr")),
        **dict.fromkeys(("epochs", "epoch", "num_epoch", "train_epochs"), renamed("num_train_epochs")),
        **dict.fromkeys(("steps", "num_steps", "max_train_steps"), renamed("max_steps")),
        **dict.fromkeys(("batch_size", "bs", "train_batch_size", "global_batch_size"), renamed("global_batch")),
        **dict.fromkeys(("grad_accum", "gradient_accumulation", "accumulation_steps"),
                        renamed("gradient_accumulation_steps")),
        **dict.fromkeys(("warmup", "num_warmup_steps"), renamed("warmup_steps")),
        **dict.fromkeys(("scheduler", "lr_schedule"), renamed("lr_scheduler_type")),
        **dict.fromkeys(("wd",), renamed("weight_decay")),
        **dict.fromkeys(("grad_clip", "gradient_clipping", "clip_grad_norm", "max_gradient_norm"), renamed("max_grad_norm")),
        **dict.fromkeys(("rank", "r", "lora_dim"), renamed("lora_rank")),
        **dict.fromkeys(("alpha",), renamed("lora_alpha")),
        **dict.fromkeys(("dropout",), renamed("lora_dropout")),
        **dict.fromkeys(("model_path", "model_dir", "base", "pretrained", "pretrained_model_name_or_path", "model_name"),
                        renamed("model_id")),
        **dict.fromkeys(("data", "train_data", "train_file", "data_file", "data_files", "train_path", "json"), data),
        **dict.fromkeys(("eval_data", "val_data", "val_path", "validation_file", "eval_file", "test_data"),
                        lambda words: data(words, to="eval_path")),
        **dict.fromkeys(("image_dir", "images", "image_root", "image_path", "media_folder", "media_root", "data_root",
                         "video_folder"), renamed("image_folder")),
        **dict.fromkeys(("output", "out", "out_dir", "save_dir", "output_path"), renamed("output_dir")),
        **dict.fromkeys(("workers", "num_workers", "num_proc"), renamed("dataloader_num_workers")),
        **dict.fromkeys(("max_len", "context_length", "max_tokens", "max_seq_len", "seq_length", "seq_len",
                         "sequence_length"), renamed("max_length")),
        **dict.fromkeys(("resume", "resume_from", "load_checkpoint"), renamed("resume_from_checkpoint")),
        **dict.fromkeys(("save_every", "save_freq", "save_interval", "checkpoint_every"), renamed("save_steps")),
        **dict.fromkeys(("eval_every", "eval_freq", "eval_interval"), renamed("eval_steps")),
        **dict.fromkeys(("log_every", "log_freq", "log_interval"), renamed("logging_steps")),
        **dict.fromkeys(("logger", "log_to"), renamed("report_to")),
        **dict.fromkeys(("frame_rate", "video_frame_rate"), renamed("fps")),
        **dict.fromkeys(("num_frames", "n_frames", "frames"), renamed("nframes")),
        **dict.fromkeys(("max_frames", "fps_max_frames"), renamed("video_max_frames")),
        **dict.fromkeys(("zero", "zero_stage", "ds_config", "deepspeed_config"), renamed("deepspeed")),
        **dict.fromkeys(("attention", "attn_type", "attn_backend"), renamed("attn")),
        **dict.fromkeys(("compile",), cannot("torch.compile is not supported yet")),
        **dict.fromkeys(("num_gpus", "n_gpu", "nproc_per_node", "devices"), _GPUS),
    },
)  # fmt: skip
