"""Flags of ms-swift (swift/arguments at 3602360; before version 4 `tuner_type` was called `train_type`)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from vlft.config.kits.adapters import UNSUPPORTED
from vlft.config.kits.outcome import (
    Becomes,
    Cannot,
    Idle,
    Kit,
    Outcome,
    attention,
    by_word,
    cannot,
    data,
    dtype,
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
from vlft.config.kits.preferences import NO_NLL, Spoken
from vlft.config.kits.quantised import Quantised
from vlft.config.kits.variants import DORA, INITIAL, RSLORA, loraplus
from vlft.config.named_base import counted_like

_TOWERS = ("freeze_vit", "freeze_aligner", "freeze_llm")
_HOW = ("train_type", "tuner_type", "sft_type")
#: Environment variables that hold settings of the media -> our flags.
_ENVIRONMENT = {
    "MAX_PIXELS": "image_max_pixels",
    "MIN_PIXELS": "image_min_pixels",
    "VIDEO_MAX_PIXELS": "video_max_pixels",
    "VIDEO_MIN_PIXELS": "video_min_pixels",
    "FPS": "fps",
    "NFRAMES": "nframes",
    "FPS_MAX_FRAMES": "video_max_frames",
}
#: The same in tokens, each a square of `Family.factor` pixels.
_TOKENS = {
    "IMAGE_MAX_TOKEN_NUM": "image_max_pixels",
    "IMAGE_MIN_TOKEN_NUM": "image_min_pixels",
    "VIDEO_MAX_TOKEN_NUM": "video_max_pixels",
    "VIDEO_MIN_TOKEN_NUM": "video_min_pixels",
}


def from_environment(environ: Mapping[str, str], model: str) -> Iterator[tuple[str, str, Becomes]]:
    """Yield (variable, value, outcome) for each setting of the media in the environment.

    Args:
        environ: the environment.
        model: folder or hub id of the base, which decides the pixels of a token.

    Raises:
        CheckpointError: its config.json cannot be read.
    """
    side = counted_like(model).factor
    for variable, name in (_ENVIRONMENT | _TOKENS).items():
        if not (value := environ.get(variable, "")):
            continue
        word, notes = value, ["from the environment"]
        if variable in _TOKENS:
            word = str(int(value) * side * side) if value.isdigit() else filled_in(f"{value} x {side} x {side}")
            notes.append(f"x {side} x {side} pixels")
        yield variable, value, Becomes(flags={name: (word,)}, note="; ".join(notes))


def _columns(words: tuple[str, ...]) -> Outcome:
    """Translate a JSON object, name of a column -> part of a row, into `part=name`."""
    parts = {"query": "question", "response": "answer", "images": "image", "image": "image", "videos": "video"}
    try:
        content = json.loads(" ".join(words))
        named = {parts[part]: str(column) for column, part in content.items() if part in parts}
    except (ValueError, AttributeError, TypeError):
        return Cannot(why="--columns takes question=NAME,answer=NAME,image=NAME")
    if not {"question", "answer"} <= set(named):
        return Cannot(why="--columns takes question=NAME,answer=NAME,image=NAME; question and answer are both needed")
    return flag("columns", ",".join(f"{part}={column}" for part, column in named.items()))


def _model_kwargs(words: tuple[str, ...]) -> Outcome:
    """Translate a JSON object with the settings of the environment, in small letters."""
    try:
        content = json.loads(" ".join(words))
        flags = {_ENVIRONMENT[name.upper()]: (str(value),) for name, value in content.items()}
    except (ValueError, AttributeError, KeyError):
        return Cannot(why="only the sizes of pictures and videos can be set: --image_max_pixels, --fps and others")
    return Becomes(flags=flags)


def towers(said: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], Outcome] | None:
    """Translate how it trains and which towers are frozen. By default ms-swift freezes ViT and aligner."""
    names = tuple(name for name in (*_HOW, *_TOWERS) if name in said)
    if not set(names) & {*_HOW, "freeze_vit", "freeze_aligner"}:
        return None  # freeze_llm alone is a flag of 2U1
    how = "".join(next((said[name] for name in _HOW if name in said), ("lora",))).lower()
    if how == "lora_llm":  # a plugin of its examples, and megatron-swift: LoRA on the language model only
        return names, Becomes(flags={"vision": ("full",), "merger": ("full",), "language": ("lora",)})
    if how not in ("lora", "full"):
        return names, Cannot(why=f"{how} is not supported. --vision, --merger and --language take full, lora or frozen")
    frozen = {name: is_true(said[name]) if name in said else name != "freeze_llm" for name in _TOWERS}
    vision, merger, language = ("frozen" if frozen[name] else how for name in _TOWERS)
    return names, Becomes(flags={"vision": (vision,), "merger": (merger,), "language": (language,)})


def defaults(
    said: Mapping[str, tuple[str, ...]], flags: Mapping[str, tuple[str, ...]]
) -> Mapping[str, tuple[str, ...]]:
    """Return ms-swift's defaults. Its learning rate depends on the tuner."""
    how = "".join(next((said[name] for name in _HOW if name in said), ("lora",))).lower()
    found = {"vision": ("frozen",), "merger": ("frozen",), "language": ("lora",)} if how == "lora" else {}
    rate = {"learning_rate": ("1e-5" if how == "full" else "1e-4",)}
    lora = {"lora_rank": ("8",), "lora_alpha": ("32",)}
    return found | rate | lora | {"lr_scheduler_type": ("cosine",), "weight_decay": ("0.1",), "adam_beta2": ("0.95",)}


def _fold(words: tuple[str, ...]) -> Outcome:
    word = "".join(words).lower()
    if word in ("raise", ""):
        return flag("over_length", "error")
    if word == "delete":
        return flag("over_length", "skip")
    return Cannot(why=f"no row is cut ({word}): --over_length takes error, skip, shrink or drop_media")


_PREFERENCES = Spoken(
    methods=("rlhf_type",),
    plain=(),
    loss=("loss_type",),
    meanings={
        "beta": "beta",
        "rpo_alpha": "sft",
        "label_smoothing": "smoothing",
        "simpo_gamma": "gamma",
        "cpo_alpha": "nll",
    },
    notes={"simpo": NO_NLL},
)
_QUANTISED = Quantised(
    bits="quant_bits",
    method="quant_method",
    kind="bnb_4bit_quant_type",
    double="bnb_4bit_use_double_quant",
    others=("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
)
_PARTS = off(
    "--vision, --merger and --language set what trains. Whole blocks are chosen with --language full "
    "--language_blocks last:8"
)
_TEMPLATE = idle("the base's own chat template is used")
_OTHER = off("not supported")

KIT = Kit(
    name="ms-swift",
    together=(towers, _QUANTISED.together, _PREFERENCES.together),
    defaults=defaults,
    batch=(1, None),
    synonyms={
        "freeze_vision_tower": "freeze_vit",
        "freeze_multi_modal_projector": "freeze_aligner",
        "freeze_merger": "freeze_aligner",
        "freeze_language_model": "freeze_llm",
        "finetuning_type": "tuner_type",
    },
    marks=frozenset((*_HOW, *_TOWERS)) | _PREFERENCES.names | _QUANTISED.names,
    rules={
        "model": renamed("model_id"),
        "model_type": idle("the base's config.json sets it"),
        "template": _TEMPLATE,
        "template_type": _TEMPLATE,
        "dataset": data,
        "val_dataset": lambda words: data(words, to="eval_path"),
        "split_dataset_ratio": held_out,
        "columns": _columns,
        "model_kwargs": _model_kwargs,
        "cached_val_dataset": cannot("rows are prepared while training. Set their files with --eval_path"),
        "val_dataset_sample": cannot("use --eval_split with a number of rows, or --eval_path FILE"),
        "custom_register_path": cannot("rows are read in the forms of data/README.md, or by --columns"),
        "external_plugins": cannot("plugins are not supported"),
        "callbacks": cannot("plugins are not supported"),
        "optimizer": by_word(
            {"lorap": Idle(why="lorap_lr_ratio sets it"), "default": Idle(why="always so")},
            cannot("plugins are not supported. --optim sets the optimizer"),
        ),
        "agent_template": _TEMPLATE,
        "template_backend": _TEMPLATE,
        "use_chat_template": on("the base's own chat template is used"),
        "response_prefix": cannot("write it into the rows"),
        "padding_side": idle("there is no padding"),
        "use_logits_to_keep": idle("logits are computed for the trained tokens only"),
        "load_args": off("a run repeats with vlft train --config RUN/config.yaml"),
        "use_flash_ckpt": off("not supported"),
        "zero_hpz_partition_size": cannot("write it into a DeepSpeed JSON: --deepspeed FILE"),
        "target_parameters": cannot("LoRA is set for each tower: --vision, --merger and --language"),
        "freeze_parameters_regex": cannot("--vision, --merger and --language set what trains"),
        "trainable_parameters_regex": cannot("--vision, --merger and --language set what trains"),
        "cached_dataset": cannot("rows are prepared while training. Set their files with --data_path"),
        "torch_dtype": dtype,
        "target_modules": lora_target,
        "target_regex": cannot("LoRA is set for each tower: --vision, --merger and --language"),
        "modules_to_save": off("no modules are saved besides LoRA. --merger full trains the merger in full"),
        "lora_dtype": idle("LoRA matrices are float32"),
        "lora_bias": UNSUPPORTED["lora_bias"],
        "use_dora": DORA,
        "use_rslora": RSLORA,
        "lorap_lr_ratio": loraplus,
        "lorap_emb_lr": idle("LoRA is never applied to the embedding"),
        "init_weights": INITIAL,
        "freeze_parameters": _PARTS,
        "freeze_parameters_ratio": off(
            "it counts weights, and vlft counts blocks: --language full --language_blocks last:8"
        ),
        "trainable_parameters": _PARTS,
        "vit_lr": renamed("vision_lr"),
        "aligner_lr": renamed("merger_lr"),
        "max_pixels": renamed("image_max_pixels"),
        "attn_impl": attention,
        "padding_free": idle("there is no padding"),
        "packing": switch(true=flag("packing", "true"), false=Idle(why="a pack trains as its rows would alone")),
        "packing_length": renamed("pack_tokens"),
        "packing_num_proc": idle("planning packs takes a moment only"),
        "loss_scale": by_word(
            {"default": Idle(why="always so"), "": Idle(why="always so")},
            cannot("every assistant turn is trained with the same weight. Drop it"),
        ),
        "system": cannot("write the system turn into the rows"),
        "model_author": cannot("write it into the rows; it is for data sets about the model itself"),
        "model_name": cannot("write it into the rows; it is for data sets about the model itself"),
        "vit_gradient_checkpointing": idle("--gradient_checkpointing auto decides for each tower"),
        "truncation_strategy": _fold,
        "max_model_len": renamed("max_length"),
        "load_from_cache_file": idle("changed files are measured again automatically"),
        "dataset_num_proc": idle("rows are prepared in the workers: --dataloader_num_workers"),
        "dataset_shuffle": on("rows are always shuffled, by --seed"),
        "train_dataloader_shuffle": on("rows are always shuffled, by --seed"),
        "val_dataset_shuffle": idle("the order of evaluation rows changes nothing"),
        "lazy_tokenize": idle("rows are prepared in the workers"),
        "streaming": off("rows are read one by one, and their number is known before the first step"),
        "strict": switch(true=flag("on_bad_row", "error"), false=flag("on_bad_row", "skip")),
        "custom_dataset_info": cannot("set the files with --data_path or --data_mix"),
        "use_hf": idle("models come from the Hugging Face hub"),
        "tuner_backend": by_word({"peft": Idle(why="always so")}, cannot("only adapters of peft are supported")),
        "adapters": starting_adapter,
        "resume_only_model": off("a resumed run always restores its optimizer"),
        "acc_strategy": by_word({"token": Idle(why="always so")}, cannot("the loss is averaged over tokens")),
        "max_epochs": renamed("num_train_epochs"),
        "enable_thinking": switch(true=flag("thinking", "auto"), false=flag("thinking", "off")),
        "enable_channel_loss": _OTHER,
        "enable_dft_loss": _OTHER,
        "sequence_parallel_size": by_word({"1": Idle(why="always so")}, cannot("not supported")),
        "add_version": idle("--output_dir is used unchanged"),
        "create_checkpoint_symlink": off("not supported"),
        "check_model": idle("the base's files are always checked"),
        "task_type": by_word({"causal_lm": Idle(why="always so")}, cannot("only generation is trained")),
        "early_stop_interval": patience,
        "device_map": idle("a model is on one device, or is sharded by --deepspeed zero3"),
        "max_new_tokens": idle("--report_tokens limits the answers of evaluation rows"),
        "temperature": idle("answers are decoded greedily"),
        "norm_bbox": by_word(
            {"none": flag("box_format", "as_is"), "norm1000": flag("box_format", "pixels")},
            cannot("--box_format sets the unit of boxes"),
        ),
    },
)
