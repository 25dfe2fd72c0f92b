"""Flags of LLaMA-Factory (src/llamafactory/hparams at ff6d4d1), with the names of its YAML files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from vlft.config.kits.outcome import (
    NEW_TOKENS,
    Becomes,
    Cannot,
    Idle,
    Kit,
    Outcome,
    attention,
    by_word,
    cannot,
    data,
    filled_in,
    flag,
    held_out,
    idle,
    is_true,
    lora_target,
    off,
    on,
    patience,
    renamed,
    starting_adapter,
    switch,
)
from vlft.config.kits.preferences import Spoken
from vlft.config.kits.quantised import Quantised
from vlft.config.kits.variants import DORA, PISSA, RSLORA, last_blocks, loraplus

_FREEZE = ("freeze_trainable_layers", "freeze_trainable_modules")
_TOWERS = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")


def towers(said: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], Outcome] | None:
    """Translate `finetuning_type` and the flags that freeze towers.

    By default LLaMA-Factory freezes vision tower and projector. With LoRA the projector is always frozen.
    """
    names = tuple(name for name in ("finetuning_type", *_TOWERS, *_FREEZE) if name in said)
    if not set(names) - set(_FREEZE):
        return (names, Idle(why="it belongs to finetuning_type: freeze")) if names else None
    how = "".join(said.get("finetuning_type", ("lora",))).lower()
    if how == "freeze":
        return names, _chosen_blocks(said)
    if how not in ("lora", "full"):
        return names, Cannot(why=f"{how} is not supported. --vision, --merger and --language take full, lora or frozen")
    frozen = {name: is_true(said[name]) if name in said else name != "freeze_language_model" for name in _TOWERS}
    vision, merger, language = ("frozen" if frozen[name] else how for name in _TOWERS)
    if how == "lora":
        merger = "frozen"
    return names, Becomes(flags={"vision": (vision,), "merger": (merger,), "language": (language,)})


def _chosen_blocks(said: Mapping[str, tuple[str, ...]]) -> Outcome:
    """Translate `finetuning_type: freeze`: some blocks of the language model train in full, by default the last two."""
    modules = "".join(said.get("freeze_trainable_modules", ("all",))).lower()
    if modules != "all":
        return Cannot(why=f"freeze_trainable_modules {modules}: whole blocks train, --language_blocks last:2")
    flags = last_blocks(said.get("freeze_trainable_layers", ("2",)), "language")
    if flags is None:
        return Cannot(why="freeze_trainable_layers 0 trains no block: --language_blocks last:2")
    thawed = [name for name in _TOWERS[:2] if name in said and not is_true(said[name])]
    note = "; ".join(f"{one} false also trains parts there: add --vision or --merger full" for one in thawed)
    return Becomes(flags={"vision": ("frozen",), "merger": ("frozen",), **flags}, note=note)


def defaults(
    said: Mapping[str, tuple[str, ...]], flags: Mapping[str, tuple[str, ...]]
) -> Mapping[str, tuple[str, ...]]:
    """Return LLaMA-Factory's defaults: of TrainingArguments, of LoRA, and of its picture and video sizes."""
    found = dict(_MODES) if said.get("finetuning_type", ("lora",)) == ("lora",) else {}
    rank = flags.get("lora_rank", ("8",))
    alpha = (str(2 * int(rank[0])),) if rank[0].isdigit() else (filled_in("2 x lora_rank"),)
    lora = {"lora_rank": ("8",), "lora_alpha": alpha, "lora_dropout": ("0.0",)}
    sizes = {
        "image_max_pixels": (str(768 * 768),),
        "video_max_pixels": (str(256 * 256),),
        **({} if "nframes" in flags else {"video_max_frames": ("128",)}),
    }
    return found | {"learning_rate": ("5e-5",)} | lora | sizes


_MODES = {"vision": ("frozen",), "merger": ("frozen",), "language": ("lora",)}


def datasets(said: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], Outcome] | None:
    """Translate `dataset`, which names entries of `dataset_dir`/dataset_info.json. Reads that file if it exists."""
    names = tuple(name for name in ("dataset", "dataset_dir") if name in said)
    if "dataset" not in said:
        return (names, Idle(why="--data_path names the files themselves")) if names else None
    folder = "".join(said.get("dataset_dir", ("data",)))
    registry = _registry(folder)
    wanted = [name.strip() for word in said["dataset"] for name in word.split(",") if name.strip()]
    files = [os.path.join(folder, registry[name]) if name in registry else name for name in wanted]
    found = data(tuple(files))
    return names, found


def _registry(folder: str) -> dict[str, str]:
    """Return name -> file of a dataset_info.json; empty if it cannot be read."""
    try:
        content = json.loads(Path(folder, "dataset_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    entries = content.items() if isinstance(content, dict) else ()
    return {
        name: entry["file_name"]
        for name, entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)
    }


def _peft(words: tuple[str, ...]) -> Outcome:
    """Translate the nested settings of an adapter in a YAML of LLaMA-Factory's version 1."""
    try:
        content = json.loads(" ".join(words))
        names = {"r": "lora_rank", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
        flags = {names[name]: (str(value),) for name, value in content.items() if name in names}
    except (ValueError, AttributeError):
        return Cannot(why="no settings of a LoRA")
    if content.get("name", "lora") != "lora":
        return Cannot(why=f"{content['name']} is not supported. --vision, --merger and --language take full or lora")
    return Becomes(flags=_MODES | flags)


_PREFERENCES = Spoken(
    methods=("stage",),
    plain=("sft", "pt"),
    loss=("pref_loss",),
    meanings={"pref_beta": "beta", "pref_ftx": "sft", "dpo_label_smoothing": "smoothing", "simpo_gamma": "gamma"},
    defaults={"simpo": {"beta": "0.1", "simpo_gamma": "0.5"}},
)
_STAGES = cannot("only conversations are trained: stage sft or dpo")
_OTHER = off("not supported")
_QUANTISED = Quantised(
    bits="quantization_bit",
    method="quantization_method",
    kind="quantization_type",
    double="double_quantization",
    others=("quantization_device_map",),
)

KIT = Kit(
    name="LLaMA-Factory",
    together=(towers, datasets, _QUANTISED.together, _PREFERENCES.together),
    defaults=defaults,
    batch=(8, 1),
    synonyms={
        "freeze_vit": "freeze_vision_tower",
        "freeze_aligner": "freeze_multi_modal_projector",
        "freeze_merger": "freeze_multi_modal_projector",
        "freeze_llm": "freeze_language_model",
        "tuner_type": "finetuning_type",
        "train_type": "finetuning_type",
    },
    marks=frozenset(
        (
            *_PREFERENCES.names - {"stage"},
            *_QUANTISED.names,
            *_FREEZE,
            "finetuning_type",
            "freeze_vision_tower",
            "freeze_multi_modal_projector",
            "freeze_language_model",
            "dataset",
            "dataset_dir",
        )
    ),
    rules={
        **_PREFERENCES.rules,
        "model_name_or_path": renamed("model_id"),
        "adapter_name_or_path": starting_adapter,
        "model": renamed("model_id"),
        "model_class": idle("the base's config.json sets it"),
        "peft_config": _peft,
        "kernel_config": idle("--use_liger_kernel auto uses the kernels that it tests as equal"),
        "dist_config": cannot("use torchrun, and --deepspeed zero2 or zero3"),
        "quant_config": off("--bits 4 quantises the linear layers of the language model"),
        "train_dataset": data,
        "sample_backend": idle("it belongs to answering"),
        "init_config": idle("weights are read tensor by tensor"),
        "enable_activation_checkpointing": renamed("gradient_checkpointing"),
        "buffer_size": idle("it belongs to streaming"),
        "use_v1_kernels": idle("--use_liger_kernel auto uses the kernels that it tests as equal"),
        "split_special_tokens": off("the base's own tokenizer is used"),
        "use_kv_cache": idle("training keeps no cache"),
        "freeze_extra_modules": cannot("--vision, --merger and --language set what trains"),
        "lr_scheduler_config": cannot("--lr_scheduler_type and --lr_scheduler_kwargs set the schedule"),
        "optim_config": cannot("--optim and --optim_args set the optimizer"),
        "master_addr": idle("the launcher sets it"),
        "master_port": idle("the launcher sets it"),
        "stage": by_word({"sft": Idle(why="always so")}, _STAGES),
        "lora_target": lora_target,
        "additional_target": off("no modules are saved besides LoRA. --merger full trains the merger in full"),
        "loraplus_lr_ratio": loraplus,
        "loraplus_lr_embedding": idle("LoRA is never applied to the embedding"),
        "use_rslora": RSLORA,
        "use_dora": DORA,
        "pissa_init": switch(true=PISSA, false=Idle(why="off")),
        "create_new_adapter": _OTHER,
        "eval_dataset": lambda words: data(words, to="eval_path"),
        "media_dir": renamed("image_folder"),
        "template": idle("the base's own chat template is used"),
        "cutoff_len": renamed("max_length", "longer rows are refused, not cut: --over_length"),
        "train_on_prompt": off("the trained tokens are the assistant turns"),
        "mask_history": off("all assistant turns of a row are trained"),
        "streaming": off("rows are read one by one, and their number is known before the first step"),
        "mix_strategy": by_word({"concat": Idle(why="always so")}, cannot("use --data_mix with weight or repeat")),
        "interleave_probs": cannot("use --data_mix with a weight for each data set"),
        "overwrite_cache": idle("changed files are measured again automatically"),
        "preprocessing_batch_size": idle("rows are prepared in the workers"),
        "preprocessing_num_workers": idle("rows are prepared in the workers: --dataloader_num_workers"),
        "max_samples": lambda words: Cannot(why="use --data_mix with cap: " + "".join(words)),
        "ignore_pad_token_for_loss": on("there is no padding"),
        "val_size": held_out,
        "eval_on_each_dataset": off("all rows of --eval_path are evaluated together"),
        "neat_packing": switch(true=flag("packing", "true"), false=Idle(why="packs never mix rows")),
        "packing": switch(true=flag("packing", "true"), false=Idle(why="a pack trains as its rows would alone")),
        "tool_format": cannot("the base's own chat template is used. Drop it"),
        "default_system": cannot("write the system turn into the rows"),
        "enable_thinking": switch(true=flag("thinking", "auto"), false=flag("thinking", "off")),
        "tokenized_path": cannot("rows are prepared while training. Drop it, and set the files with --data_path"),
        "plot_loss": idle("report.html in the run folder has the curves"),
        "compute_accuracy": off("evaluation computes the loss only"),
        "disable_shuffling": off("rows are always shuffled, by --seed"),
        "early_stopping_steps": patience,
        "include_effective_tokens_per_second": idle("metrics.jsonl has them"),
        "pure_bf16": off("trained weights are float32 under bf16 autocast"),
        "flash_attn": attention,
        "use_unsloth": _OTHER,
        "use_unsloth_gc": _OTHER,
        "enable_liger_kernel": switch(true=flag("use_liger_kernel", "true"), false=Idle(why="--use_liger_kernel auto")),
        "disable_gradient_checkpointing": switch(
            true=flag("gradient_checkpointing", "false"), false=Idle(why="--gradient_checkpointing auto")
        ),
        "use_reentrant_gc": idle("checkpointing is always non-reentrant"),
        "upcast_layernorm": idle("norms are computed in float32"),
        "upcast_lmhead_output": idle("the loss is computed in float32"),
        "rope_scaling": _OTHER,
        "shift_attn": _OTHER,
        "resize_vocab": _OTHER,
        "add_tokens": cannot(NEW_TOKENS),
        "add_special_tokens": cannot(NEW_TOKENS),
        "use_fast_tokenizer": idle("the base's own tokenizer is used"),
        "low_cpu_mem_usage": idle("weights are read tensor by tensor"),
        "image_do_pan_and_scan": off("not supported by Qwen-VL"),
        "crop_to_patches": off("not supported by Qwen-VL"),
        "image_resolution": renamed("image_max_pixels"),
        "video_resolution": renamed("video_max_pixels"),
        "video_fps": renamed("fps"),
        "video_maxlen": renamed("video_max_frames"),
        "print_param_status": idle("the table at the start lists what trains"),
        "use_galore": off("not supported. Use an AdamW variant, Adafactor or SGD"),
        "use_apollo": off("not supported. Use an AdamW variant, Adafactor or SGD"),
        "use_badam": off("not supported. Use an AdamW variant, Adafactor or SGD"),
        "use_muon": off("not supported. Use an AdamW variant, Adafactor or SGD"),
        "use_adam_mini": off("not supported. Use an AdamW variant, Adafactor or SGD"),
        "use_llama_pro": _OTHER,
        "use_dft_loss": _OTHER,
        "use_swanlab": switch(true=flag("report_to", "swanlab"), false=Idle(why="off")),
        "dataset_shards": _OTHER,
        "predict_with_generate": off("evaluation computes the loss. Use --report_rows for answers"),
        "ray_run_name": off("use torchrun"),
    },
)
