"""The kind of each flag, one line each. A new flag needs a line here; a test fails without it.

Bounds exclude values that make no sense. They do not exclude values that are merely unwise. Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlft.config.kinds import Bool, Kind, Named, Number, Place, Shares, Word

BILLION = 10**9
BLOCKS = Named(example="'0-3,28'")
TEXT, NAMED, SWITCH = Kind(), Named(), Kind(many="none")
FLAG, YES_NO = Bool(many="maybe"), Bool()
RATE = Number(low=0, high=1000)
COUNT = Number(whole=True, low=0, high=BILLION)
FROM_ONE = Number(whole=True, low=1, high=BILLION)
PIXELS = Number(whole=True, low=1, high=BILLION)
FRAMES = Number(whole=True, low=2, high=1_000_000, even=True)
EVERY = Number(low=0, open_low=True, high=BILLION, share=True)
BETA = Number(low=0, high=1, open_high=True)
SEED = Number(whole=True, low=0, high=2**32 - 1)  # numpy's generators accept no larger seed
TOWER = Word(words=("full", "lora", "frozen"))
AUTO = Word(words=("auto", "true", "false"), bools=True, many="maybe")
WHEN = Word(words=("no", "steps", "epoch"))
LEVEL = Word(words=("detail", "debug", "info", "warning", "error", "critical", "passive"))

_OWN_GROUPS = (
    "builds its own parameter groups, which would drop --vision_lr, --merger_lr and --weight_decay. Use an AdamW "
    "variant, Adafactor or SGD"
)
_OTHER_DEVICE = "is for {}, and vlft trains on CUDA devices and CPUs. Use adamw_torch_fused"
_BITS = ("bitsandbytes",)
#: The values of `--optim`, with the packages they need (transformers' trainer_optimizer.py), or why they are refused.
OPTIM = Word(
    words=(
        *("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adafactor"),
        *("adamw_anyprecision", "adamw_torch_4bit", "adamw_torch_8bit", "ademamix", "sgd", "adagrad", "adamw_bnb_8bit"),
        *("adamw_8bit", "ademamix_8bit", "lion_8bit", "lion_32bit", "paged_adamw_32bit", "paged_adamw_8bit"),
        *("paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit", "rmsprop"),
        *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit"),
        *("galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
        *("lomo", "adalomo", "grokadamw", "schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
        *("apollo_adamw", "apollo_adamw_layerwise", "stable_adamw"),
    ),
    needs={
        **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit"), _BITS),
        **dict.fromkeys(("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"), _BITS),
        **dict.fromkeys(("lion_8bit", "lion_32bit", "paged_lion_32bit", "paged_lion_8bit"), _BITS),
        **dict.fromkeys(("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"), _BITS),
        **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), ("torchao",)),
        "stable_adamw": ("optimi (torch-optimi)",),
    },
    refused={
        **dict.fromkeys(
            ("galore_adamw", "galore_adamw_8bit", "galore_adafactor", "galore_adamw_layerwise"), _OWN_GROUPS
        ),
        **dict.fromkeys(("galore_adamw_8bit_layerwise", "galore_adafactor_layerwise", "lomo", "adalomo"), _OWN_GROUPS),
        **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), _OWN_GROUPS),
        **dict.fromkeys(
            ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"),
            "must switch its weights for every evaluation and checkpoint, which vlft does not do. Use adamw_torch",
        ),
        "adamw_torch_xla": _OTHER_DEVICE.format("TPUs"),
        "adamw_torch_npu_fused": _OTHER_DEVICE.format("NPUs"),
        "adamw_anyprecision": (
            "comes from torchdistx, which is archived and has no release for torch 2. Use adamw_torch_fused"
        ),
        "grokadamw": "keeps its moments where a resumed run does not find them (grokadamw 0.1.2). Use adamw_torch",
        "muon": (
            "updates matrices only, so it needs a second optimizer and a learning rate of its own for everything else. "
            "Use adamw_torch_fused"
        ),
    },
)
#: The values of `--report_to`, with the packages they need (transformers' integration_utils.py).
REPORT_TO = Word(
    words=(
        *("none", "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte", "kubeflow"),
        *("mlflow", "neptune", "swanlab", "tensorboard", "trackio", "wandb"),
    ),
    needs={
        **{name: (name,) for name in ("clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "kubeflow", "mlflow")},
        **{name: (name,) for name in ("neptune", "swanlab", "trackio", "wandb")},
        "azure_ml": ("azureml (azureml-mlflow)",),
        "flyte": ("flytekit",),
        "tensorboard": ("tensorboard", "tensorboardX"),
    },
)

DATA_FILE = Place(many="some", rows=True)
DATA: dict[str, Kind] = {
    "method": Word(words=("sft", "dpo", "orpo", "simpo", "grpo")),
    "data_path": DATA_FILE,
    "columns": NAMED,
    "data_mix": Place(of="file"),
    "eval_path": DATA_FILE,
    "eval_split": Number(low=0, open_low=True, high=BILLION, share=True, unit="rows"),
    "missing_tags": Word(words=("error", "first")),
    "image_folder": Place(of="folder"),
    "allow_outside_folder": FLAG,
    "allow_remote_media": FLAG,
    "image_min_pixels": PIXELS,
    "image_max_pixels": PIXELS,
    "video_min_pixels": PIXELS,
    "video_max_pixels": PIXELS,
    "fps": Number(low=0, open_low=True, high=1000),
    "nframes": FRAMES,
    "video_max_frames": FRAMES,
    "frames_fps": Number(low=0, open_low=True, high=1000),
    "max_length": FROM_ONE,
    "over_length": Word(words=("error", "skip", "shrink", "drop_media")),
    "box_format": Word(words=("as_is", "pixels", "0-1000", "0-1")),
    "thinking": Word(words=("auto", "on", "off")),
    "turns": Word(words=("auto", "split", "last")),
    "on_bad_row": Word(words=("error", "skip")),
    "packing": FLAG,
    "pack_tokens": FROM_ONE,
    "pack_patches": FROM_ONE,
}
MODEL: dict[str, Kind] = {
    "model_id": NAMED,
    "model_revision": NAMED,
    "adapter": Place(of="folder", later=True),
    "vision": TOWER,
    "merger": TOWER,
    "language": TOWER,
    "lora_rank": Number(whole=True, low=1, high=65_536),
    "lora_alpha": Number(low=0, open_low=True, high=10**6),
    "lora_dropout": BETA,
    "lora_target": Word(words=("all", "attention")),
    "use_dora": FLAG,
    "use_rslora": FLAG,
    "bits": Word(words=("16", "8", "4"), needs=dict.fromkeys(("8", "4"), ("bitsandbytes ('bitsandbytes>=0.48')",))),
    "quant_type": Word(words=("nf4", "fp4")),
    "double_quant": FLAG,
    "language_blocks": BLOCKS,
    "vision_blocks": BLOCKS,
    "train_tokens": Named(angled=True, example="'<x>,<y>'"),
    "attn": Word(
        words=("auto", "fa4", "fa3", "flash_attn", "varlen", "sdpa"),
        needs={
            "fa4": ("flash_attn.cute (flash-attn-4)",),
            "fa3": ("flash_attn_interface (git+https://github.com/Dao-AILab/flash-attention#subdirectory=hopper)",),
            "flash_attn": ("flash_attn (flash-attn)",),
        },
        on_gpu=("fa4", "fa3", "flash_attn"),
    ),
    "linear_attn": Word(words=("auto", "fla", "torch"), needs={"fla": ("fla ('fla-core>=0.6')",)}, on_gpu=("fla",)),
}
TRAIN: dict[str, Kind] = {
    "output_dir": Place(of="out"),
    "dpo_loss": Word(words=("sigmoid", "ipo", "hinge")),
    "beta": Number(low=0, high=1000),
    "rpo_alpha": Number(low=0, high=1000),
    "label_smoothing": Number(low=0, high=0.5, open_high=True),
    "simpo_gamma": Number(low=0, high=1000),
    "orpo_lambda": Number(low=0, high=1000),
    "reference": Word(words=("cached", "live", "none")),
    "reward": Named(many="some", angled=True),
    "num_generations": Number(whole=True, low=2, high=10_000),
    "max_completion_length": Number(whole=True, low=1, high=10**6),
    "temperature": Number(low=0, open_low=True, high=1000),
    "top_p": Number(low=0, open_low=True, high=1),
    "rollout": Word(words=("hf", "vllm")),
    "reward_timeout": Number(low=0, open_low=True, high=BILLION),
    "equal_rewards_steps": FROM_ONE,
    "log_completions": AUTO,
    "num_completions_to_print": FROM_ONE,
    "per_device_train_batch_size": FROM_ONE,
    "per_device_eval_batch_size": FROM_ONE,
    "gradient_accumulation_steps": FROM_ONE,
    "global_batch": FROM_ONE,
    "num_train_epochs": Number(low=0, open_low=True, high=10**6),
    "max_steps": Number(whole=True, low=1, high=BILLION, also=(-1,)),
    "learning_rate": RATE,
    "vision_lr": RATE,
    "merger_lr": RATE,
    "loraplus_ratio": Number(low=0, open_low=True, high=10_000),
    "lr_scheduler_type": Word(
        words=(
            *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
            *("inverse_sqrt", "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr"),
            *("warmup_stable_decay", "greedy"),
        )
    ),
    "lr_scheduler_kwargs": TEXT,
    "warmup_steps": Number(low=0, high=BILLION, share=True),
    "optim": OPTIM,
    "optim_args": TEXT,
    "weight_decay": RATE,
    "adam_beta1": BETA,
    "adam_beta2": BETA,
    "adam_epsilon": Number(low=0, open_low=True, high=1),
    "max_grad_norm": Number(low=0, high=BILLION),
    "bf16": YES_NO,
    "fp16": FLAG,
    "tf32": YES_NO,
    "gradient_checkpointing": AUTO,
    "use_liger_kernel": Word(
        words=AUTO.words,
        bools=True,
        many="maybe",
        needs={"true": ("liger_kernel ('liger-kernel>=0.8.5')",)},
        on_gpu=("true",),
    ),
    "cache_vision_features": FLAG,
    "vision_cache": Place(of="out"),
    "vision_cache_gb": Number(low=0, open_low=True, high=10**6),
    "torch_empty_cache_steps": FROM_ONE,
    "logging_strategy": WHEN,
    "logging_steps": EVERY,
    "logging_first_step": FLAG,
    "log_on_each_node": FLAG,
    "logging_nan_inf_filter": FLAG,
    "log_level": LEVEL,
    "log_level_replica": LEVEL,
    "disable_tqdm": YES_NO,
    "report_to": REPORT_TO,
    "run_name": TEXT,
    "project": TEXT,
    "trackio_space_id": TEXT,
    "trackio_bucket_id": TEXT,
    "trackio_static_space_id": TEXT,
    "eval_strategy": WHEN,
    "eval_steps": EVERY,
    "eval_delay": Number(low=0, high=BILLION),
    "eval_on_start": FLAG,
    "save_only_model": FLAG,
    "save_strategy": Word(words=("no", "steps", "epoch", "best")),
    "save_steps": EVERY,
    "save_total_limit": FROM_ONE,
    "load_best_model_at_end": FLAG,
    "metric_for_best_model": NAMED,
    "greater_is_better": YES_NO,
    "eval_metric": Named(many="some"),
    "early_stopping_patience": FROM_ONE,
    "early_stopping_threshold": Number(low=0, high=BILLION),
    "full_determinism": FLAG,
    "seed": SEED,
    "use_cpu": FLAG,
    "dataloader_num_workers": Number(whole=True, low=0, high=1024),
    "dataloader_pin_memory": FLAG,
    "dataloader_prefetch_factor": Number(whole=True, low=1, high=10_000),
    "dataloader_multiprocessing_context": Word(words=("fork", "spawn", "forkserver")),
    "dataloader_in_order": FLAG,
    "ddp_bucket_cap_mb": Number(whole=True, low=1, high=10**6),
    "ddp_broadcast_buffers": YES_NO,
    "ddp_static_graph": YES_NO,
    "ddp_backend": Word(words=("nccl", "gloo", "mpi", "xccl", "hccl", "cncl", "mccl")),
    "ddp_timeout": FROM_ONE,
    "deepspeed": Named(),
    "debug": Word(words=("underflow_overflow", "tpu_metrics_debug"), many="some"),
    "skip_memory_metrics": FLAG,
    "resume_from_checkpoint": Place(words=("auto", "none"), holds=("trainer_state.json", "checkpoint")),
    "max_nonfinite_steps": COUNT,
    "stall_timeout": Number(low=0, high=BILLION),
    "report_rows": Number(whole=True, low=0, high=10**6),
    "report_tokens": Number(whole=True, low=1, high=10**6),
}
OF_TRAIN = DATA | MODEL | TRAIN
COMMON: dict[str, Kind] = {"config": NAMED, "help": SWITCH}


def _number(**bounds: Any) -> Number:
    return Number(usage=True, **bounds)


#: Verb -> its own flags. All verbs here except chat also take the flags of train.
_OWN: Mapping[str, dict[str, Kind]] = {
    "train": {},
    "plan": {
        "gpus": _number(whole=True, low=1, high=1_000_000),
        "gpu": NAMED,
        "tokens_per_s": _number(low=0, open_low=True),
        "measure": SWITCH,
        "translate": NAMED,
        "out": NAMED,
        "json": SWITCH,
    },
    "check-data": {
        "headers_only": SWITCH,
        "workers": _number(whole=True, low=0, high=1024),
        "fix": NAMED,
        "dedup": SWITCH,
        "split": Shares(usage=True),
        "report": NAMED,
        "json": SWITCH,
    },
    "export": {
        "pictures": Word(words=("original", "resized"), usage=True),
        "rows": _number(whole=True, low=1, high=BILLION),
        "json": SWITCH,
    },
    "preview": {"index": TEXT, "html": NAMED, "json": SWITCH},
    "bench": {
        **dict.fromkeys(("baseline", "json"), SWITCH),
        **dict.fromkeys(("out", "work"), NAMED),
        **dict.fromkeys(("rounds", "rows", "steps", "baseline_batch"), _number(whole=True, low=1, high=BILLION)),
        **dict.fromkeys(("skip_steps", "mix_seed"), _number(whole=True, low=0, high=2**32 - 1)),
        "workers": _number(whole=True, low=0, high=1024),
        "timeout": _number(low=0, open_low=True, high=BILLION),
        "fake": TEXT,
        "mix": TEXT,
        "shape": TEXT,
        "preset": TEXT,
        **dict.fromkeys(("baseline_side", "baseline_order"), TEXT),
        "baseline_checkpointing": TEXT,
    },
    "chat": {
        "image": Kind(many="some"),
        "video": Kind(many="some"),
        "system": TEXT,
        "max_new_tokens": _number(whole=True, low=1, high=10**6),
        "temperature": _number(low=0, high=1000),
        "top_p": _number(low=0, open_low=True, high=1),
        "seed": Number(whole=True, low=0, high=2**32 - 1, usage=True),
        "base_model": NAMED,
        "thinking": Word(words=("auto", "on", "off"), usage=True),
        "boxes": SWITCH,
        "json": SWITCH,
    },
}
VERBS = tuple(_OWN)
#: Verbs that take words without a flag, such as data files or a model.
WITH_WORDS = ("check-data", "preview", "export", "bench", "chat")


def kinds(verb: str) -> dict[str, Kind]:
    """Return flag -> kind, for one of `VERBS`."""
    return COMMON | _OWN[verb] | ({} if verb == "chat" else OF_TRAIN)
