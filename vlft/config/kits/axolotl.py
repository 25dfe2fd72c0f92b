"""Flags of axolotl (src/axolotl/utils/schemas at 067b021), with the names of its YAML files."""

from __future__ import annotations

import json
from collections.abc import Mapping

from vlft.config.kits.outcome import (
    Becomes,
    Cannot,
    Idle,
    Kit,
    Outcome,
    by_word,
    cannot,
    data,
    flag,
    held_out,
    idle,
    is_true,
    lora_target,
    off,
    renamed,
    starting_adapter,
    switch,
)
from vlft.config.kits.preferences import NO_NLL, OTHERS, Spoken
from vlft.config.kits.quantised import KEPT, Quantised
from vlft.config.kits.variants import DORA, INITIAL, RSLORA, loraplus


def towers(said: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], Outcome] | None:
    """Translate `adapter` and its targets. Without an adapter, everything trains except `freeze_mm_modules`."""
    names = tuple(
        name for name in ("adapter", "lora_target_linear", "lora_target_modules", "freeze_mm_modules") if name in said
    )
    if "base_model" not in said and not names:
        return None
    how = "".join(said.get("adapter", ("full",))).lower()
    bits: dict[str, tuple[str, ...]] = {"bits": ("4",)} if how == "qlora" else {}
    how = "lora" if how == "qlora" else how
    if how not in ("lora", "full", ""):
        return names, Cannot(why=f"{how} is not supported. --vision, --merger and --language take full, lora or frozen")
    mode = "lora" if how == "lora" else "full"
    frozen = is_true(said["freeze_mm_modules"]) if "freeze_mm_modules" in said else False
    modules = said.get("lora_target_modules", ())
    # Linear layers of Qwen-VL's vision towers have other names, so a list such as q_proj does not match them.
    if mode == "lora" and modules and not any("visual" in word for word in modules):
        frozen = True
    rest = "frozen" if frozen else mode
    flags: dict[str, tuple[str, ...]] = {"vision": (rest,), "merger": (rest,), "language": (mode,)} | bits
    target = lora_target(modules) if modules and not any("." in word for word in modules) else None
    note = target.note if isinstance(target, Becomes) else ""
    note = "; ".join(filter(None, (note, KEPT if bits else "")))
    if not names:  # without an adapter the base alone decides
        flags = {"model_id": said["base_model"]} | flags
    return names or ("base_model",), Becomes(
        flags=flags | (dict(target.flags) if isinstance(target, Becomes) else {}), note=note
    )


def defaults(
    said: Mapping[str, tuple[str, ...]], flags: Mapping[str, tuple[str, ...]]
) -> Mapping[str, tuple[str, ...]]:
    """Return axolotl's defaults. A qLoRA becomes a LoRA on the base in its own dtype."""
    found: dict[str, tuple[str, ...]] = {}
    if "".join(said.get("adapter", ())).lower() == "qlora":
        names = {name: words for name, words in said.items() if name in ("lora_target_modules", "freeze_mm_modules")}
        lora = towers(names | {"adapter": ("lora",)})
        found |= dict(lora[1].flags) if lora and isinstance(lora[1], Becomes) else {}
    steps = {} if "warmup_steps" in flags else {"warmup_steps": ("0.03",)}
    epochs = {} if "max_steps" in flags else {"num_train_epochs": ("1",)}
    return found | steps | epochs | {"lr_scheduler_type": ("cosine",), "lora_dropout": ("0.0",)}


def datasets(words: tuple[str, ...], *, to: str = "data_path") -> Outcome:
    """Translate a list of mappings, each with a `path`."""
    paths: list[str] = []
    lost: dict[str, None] = {}
    for word in words:
        try:
            entry = json.loads(word)
        except ValueError:
            entry = {"path": word}
        if not isinstance(entry, dict):
            continue
        found = entry.get("data_files") or entry.get("path")
        paths += [str(path) for path in (found if isinstance(found, list) else [found]) if path]
        split = str(entry.get("split", "train"))
        lost |= {f"split {split} takes a part of the rows: use --data_mix with cap": None} if "[" in split else {}
        if {"field_messages", "message_property_mappings", "field_instruction", "field"} & set(entry):
            lost["names of columns are set with --columns, where data/README.md does not list them"] = None
        if "roles_to_train" in entry and entry["roles_to_train"] not in (["assistant"], ["gpt"]):
            lost["the trained tokens are the assistant turns"] = None
    if not paths:
        return Cannot(why="no entry has a path or data_files")
    outcome = data(tuple(paths), to=to)
    return Becomes(flags=outcome.flags, note="; ".join(filter(None, (outcome.note, *lost))))


def per_epoch(said: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], Outcome] | None:
    """Translate `saves_per_epoch` and `evals_per_epoch`. A number below 1 in vlft is a share of all steps."""
    names = tuple(name for name in ("saves_per_epoch", "evals_per_epoch") if name in said)
    if not names:
        return None
    flags: dict[str, tuple[str, ...]] = {}
    evaluates = "test_datasets" in said or "".join(said.get("val_set_size", ("0",))).strip("0.") != ""
    for name, kind in (("saves_per_epoch", "save"), ("evals_per_epoch", "eval")):
        if name not in said or (kind == "eval" and not evaluates):
            continue
        times = "".join(said[name])
        try:
            share = 1 / (float(times) * float("".join(said.get("num_epochs", ("1",)))))
        except (ValueError, ZeroDivisionError):
            return names, Cannot(why="use --save_steps and --eval_steps")
        if times == "1":
            flags[f"{kind}_strategy"] = ("epoch",)
        else:
            flags |= {f"{kind}_strategy": ("steps",), f"{kind}_steps": (f"{share:.6g}",)}
    if not flags:
        return names, Idle(
            why="no evaluation rows are set: --eval_path FILE or --eval_split 0.05, with --eval_strategy epoch"
        )
    return names, Becomes(flags=flags)


def _auto(name: str) -> dict[str, Outcome]:
    return {"auto": Idle(why=f"--{name} follows the GPU"), "": Idle(why="off")}


def _packing(words: tuple[str, ...]) -> Outcome:
    return flag("packing", "true") if is_true(words) else Idle(why="a pack trains as its rows would alone")


_PREFERENCES = Spoken(
    methods=("rl",),
    words={"ipo": "dpo"},
    plain=(),
    loss=("dpo_loss_type",),
    weights="dpo_loss_weights",
    meanings={
        "rl_beta": "beta",
        "rpo_alpha": "sft",
        "dpo_label_smoothing": "smoothing",
        "orpo_alpha": "orpo",
        "simpo_gamma": "gamma",
        "cpo_alpha": "nll",
    },
    defaults={"simpo": {"beta": "0.1", "simpo_gamma": "0.5"}},
    notes={"simpo": NO_NLL},
)
_QUANTISED = Quantised(
    four="load_in_4bit",
    eight="load_in_8bit",
    kind="bnb_4bit_quant_type",
    double="bnb_4bit_use_double_quant",
    settings="bnb_config_kwargs",
)
_KERNELS = idle("--use_liger_kernel auto uses the kernels that it tests as equal")
_WANDB = idle("--report_to wandb reads WANDB_* from the environment")
_OTHER = off("not supported")
_PREPARED = idle("rows are prepared in the workers")

KIT = Kit(
    name="axolotl",
    together=(towers, per_epoch, _QUANTISED.together, _PREFERENCES.together),
    defaults=defaults,
    marks=frozenset(
        (
            *_PREFERENCES.names - {"rl"},
            *("load_in_4bit", "load_in_8bit", "bnb_config_kwargs"),
            "saves_per_epoch",
            "evals_per_epoch",
            "adapter",
            "lora_target_linear",
            "lora_target_modules",
            "freeze_mm_modules",
        )
    ),
    rules={
        **_PREFERENCES.rules,
        "base_model": renamed("model_id"),
        "base_model_config": idle("the base's config.json is used"),
        "model_type": idle("the base's config.json sets it"),
        "tokenizer_type": idle("the base's own is used"),
        "processor_type": idle("the base's own is used"),
        "tokenizer_config": idle("the base's own is used"),
        "type_of_model": idle("the base's config.json sets it"),
        "is_qwen_derived_model": idle("the base's config.json sets it"),
        "overrides_of_model_config": cannot("the base's config.json is used"),
        "processor_kwargs": cannot("--image_max_pixels, --video_max_pixels and --fps set the sizes"),
        "image_size": cannot("a picture keeps its aspect ratio. Set its size with --image_max_pixels"),
        "image_resize_algorithm": idle("the base's own processor resizes pictures"),
        "chat_template_jinja": off("the base's own chat template is used"),
        "chat_template_kwargs": cannot("the base's own chat template is used"),
        "default_system_message": cannot("write the system turn into the rows"),
        "roles_to_train": by_word({"assistant": Idle(why="always so")}, cannot("the assistant turns are trained")),
        "train_on_eos": by_word({"turn": Idle(why="always so")}, cannot("the end of every assistant turn is trained")),
        "lora_on_cpu": idle("weights are read tensor by tensor"),
        "gc_steps": idle("not needed"),
        "trainer_cls": off("plugins are not supported"),
        "device": idle("the launcher sets it"),
        "ddp": idle("the launcher sets it"),
        "world_size": idle("the launcher sets it"),
        "lr_groups": cannot("--vision_lr and --merger_lr set the rates of towers"),
        "embedding_lr": cannot("--learning_rate applies to the whole language model"),
        "float16": renamed("fp16"),
        "min_sample_len": cannot("short rows are also trained"),
        "pretraining_dataset": cannot("only conversations are trained. Set their files with --data_path"),
        "batch_flattening": idle("there is no padding"),
        "flex_attention": switch(true=flag("attn", "sdpa"), false=Idle(why="off")),
        "chat_template": idle("the base's own chat template is used"),
        "revision_of_model": renamed("model_revision"),
        "lora_model_dir": starting_adapter,
        "lora_r": renamed("lora_rank"),
        "lora_fan_in_fan_out": off("not supported"),
        "lora_modules_to_save": off("no modules are saved besides LoRA. --merger full trains the merger in full"),
        "lora_mlp_kernel": _KERNELS,
        "lora_qkv_kernel": _KERNELS,
        "lora_o_kernel": _KERNELS,
        "peft_use_dora": DORA,
        "peft_use_rslora": RSLORA,
        "peft_init_lora_weights": INITIAL,
        "loraplus_lr_ratio": loraplus,
        "loraplus_lr_embedding": idle("LoRA is never applied to the embedding"),
        "peft_layers_to_transform": cannot("single blocks are chosen with --language_blocks, such as 20-27"),
        "unfrozen_parameters": cannot(
            "--vision, --merger and --language set what trains. Whole blocks are chosen with --language full "
            "--language_blocks last:8"
        ),
        "datasets": datasets,
        "test_datasets": lambda words: datasets(words, to="eval_path"),
        "dataset_prepared_path": _PREPARED,
        "skip_prepare_dataset": _PREPARED,
        "dataset_processes": _PREPARED,
        "dataset_num_proc": _PREPARED,
        "shuffle_merged_datasets": switch(true=Idle(why="always so"), false=Cannot(why="rows are always shuffled")),
        "val_set_size": held_out,
        "sequence_len": renamed("max_length", "longer rows are refused, not cut: --over_length"),
        "excess_length_strategy": by_word(
            {"drop": flag("over_length", "skip"), "raise": flag("over_length", "error")},
            cannot("no row is cut: --over_length takes error, skip, shrink or drop_media"),
        ),
        "sample_packing": _packing,
        "eval_sample_packing": idle("evaluation is packed as training is"),
        "pad_to_sequence_len": idle("there is no padding"),
        "train_on_inputs": off("the trained tokens are the assistant turns"),
        "micro_batch_size": renamed("per_device_train_batch_size"),
        "eval_batch_size": idle("evaluation is packed as training is"),
        "num_epochs": renamed("num_train_epochs"),
        "optimizer": renamed("optim"),
        "lr_scheduler": renamed("lr_scheduler_type"),
        "cosine_min_lr_ratio": _OTHER,
        "bf16": by_word(_auto("bf16"), renamed("bf16")),
        "fp16": by_word(_auto("bf16"), renamed("fp16")),
        "tf32": by_word(_auto("tf32"), renamed("tf32")),
        "bfloat16": renamed("bf16"),
        "gradient_checkpointing": by_word(
            {"offload": flag("gradient_checkpointing", "true"), "unsloth": flag("gradient_checkpointing", "true")},
            renamed("gradient_checkpointing"),
        ),
        "flash_attention": switch(true=Idle(why="--attn auto picks the fastest"), false=Idle(why="--attn auto")),
        "sdp_attention": switch(true=flag("attn", "sdpa"), false=Idle(why="off")),
        "xformers_attention": switch(true=flag("attn", "sdpa"), false=Idle(why="off")),
        "eager_attention": switch(true=flag("attn", "sdpa"), false=Idle(why="off")),
        "save_first_step": off("not supported"),
        "use_tensorboard": switch(true=flag("report_to", "tensorboard"), false=Idle(why="off")),
        "use_wandb": switch(true=flag("report_to", "wandb"), false=Idle(why="off")),
        "wandb_project": _WANDB,
        "wandb_entity": _WANDB,
        "wandb_name": _WANDB,
        "wandb_watch": _WANDB,
        "wandb_log_model": _WANDB,
        "wandb_run_id": _WANDB,
        "special_tokens": cannot("the base's own tokens are used. Drop it"),
        "plugins": cannot("not supported. Drop it"),
        "rl": off(OTHERS),
        "strict": idle("unknown flags are always refused"),
        "auto_resume_from_checkpoints": switch(
            true=flag("resume_from_checkpoint", "auto"), false=flag("resume_from_checkpoint", "none")
        ),
        "resize_token_embeddings_to_32x": _OTHER,
        "liger_rope": _KERNELS,
        "liger_rms_norm": _KERNELS,
        "liger_glu_activation": _KERNELS,
        "liger_fused_linear_cross_entropy": _KERNELS,
        "debug": off("not supported"),
    },
)
