"""Flags of TRL's scripts (ModelConfig, ScriptArguments, SFTConfig and DPOConfig; GRPOConfig: `grpo`)."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from vlft.config.kits.outcome import (
    Becomes,
    Idle,
    Kit,
    Outcome,
    cannot,
    data,
    dtype,
    flag,
    idle,
    is_true,
    lora_target,
    off,
    on,
    renamed,
    switch,
)
from vlft.config.kits.preferences import Spoken
from vlft.config.kits.quantised import Quantised
from vlft.config.kits.variants import DORA, RSLORA


def towers(said: Mapping[str, tuple[str, ...]]) -> tuple[tuple[str, ...], Outcome] | None:
    """Translate `use_peft`: LoRA or full."""
    if "use_peft" not in said:
        return None
    full = Becomes(flags=dict.fromkeys(("vision", "merger", "language"), ("full",)))
    return ("use_peft",), flag("language", "lora") if is_true(said["use_peft"]) else full


def defaults(
    said: Mapping[str, tuple[str, ...]], flags: Mapping[str, tuple[str, ...]]
) -> Mapping[str, tuple[str, ...]]:
    """Return the defaults of the method's config, and of ModelConfig. Without `use_peft` the whole model trains."""
    full = {} if "use_peft" in said else dict.fromkeys(("vision", "merger", "language"), ("full",))
    rate = "1e-6" if "method" in flags else "2e-5"
    completions = {"max_completion_length": ("512",)} if flags.get("method") == ("grpo",) else {}
    return full | completions | {"learning_rate": (rate,), "lora_rank": ("16",), "lora_alpha": ("32",)}


def wrote(said: Collection[str], kit: str) -> bool:
    """Whether the flags of a script are TRL's, whatever kit's script has that name.

    Args:
        said: the flags.
        kit: the kit that has a script of that name; "" if none has.
    """
    theirs = [name for name in _SCRIPT if name in said]
    others = {"model_id", "data_path", "dataset", "model"} & set(said)
    needed = {"Qwen2-VL-Finetune": 1, "": 3}.get(kit, 2)  # LLaMA-Factory has --model_name_or_path, too
    return len(theirs) >= needed and not others


#: Flags of TRL's GRPO script by which a script of one's own is read as TRL's.
_SCRIPT = ("model_name_or_path", "dataset_name", "reward_funcs")
_PREFERENCES = Spoken(
    loss=("loss_type",), meanings={"beta": "beta", "rpo_alpha": "sft", "label_smoothing": "smoothing"}
)
_QUANTISED = Quantised(
    four="load_in_4bit",
    eight="load_in_8bit",
    kind="bnb_4bit_quant_type",
    double="use_bnb_nested_quant",
    doubled=False,
    others=("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
)

KIT = Kit(
    name="TRL",
    together=(towers, _QUANTISED.together, _PREFERENCES.together),
    defaults=defaults,
    batch=(8, 1),
    remark="without assistant_only_loss TRL trains every token of a conversation; vlft trains the assistant turns",
    marks=frozenset(("use_peft",)) | _PREFERENCES.names | _QUANTISED.names,
    rules={
        "dataset_name": data,
        "dataset_config": cannot("set the files with --data_path"),
        "dataset_train_split": idle("--data_path sets the training rows"),
        "dataset_test_split": cannot("set the evaluation rows with --eval_path or --eval_split"),
        "dataset_text_field": idle("rows are read in the forms of data/README.md"),
        "dataset_num_proc": idle("rows are prepared in the workers: --dataloader_num_workers"),
        "dtype": dtype,
        "lora_target_modules": lora_target,
        "lora_modules_to_save": off("no modules are saved besides LoRA. --merger full trains the merger in full"),
        "lora_task_type": idle("it is always causal language modelling"),
        "use_rslora": RSLORA,
        "use_dora": DORA,
        "completion_only_loss": on("the trained tokens are the assistant turns"),
        "assistant_only_loss": on("the trained tokens are the assistant turns"),
        "packing_strategy": idle("packs are always filled as far as possible"),
        "padding_free": idle("there is no padding"),
        "eval_packing": idle("evaluation is packed as training is"),
        "pad_to_multiple_of": idle("there is no padding"),
        "eos_token": idle("the base's own is used"),
        "chat_template_path": off("the base's own chat template is used"),
        "activation_offloading": off("not supported. Use --gradient_checkpointing true"),
        "num_processes": idle("the launcher sets it"),
        "accelerate_config": idle("torchrun starts several processes"),
        "dataset_kwargs": idle("rows are prepared in the workers"),
        "shuffle_dataset": idle("rows are always shuffled, by --seed"),
        "truncation_mode": cannot("no row is cut: --over_length takes error, skip, shrink or drop_media"),
        "model_init_kwargs": cannot("the base's config.json is used"),
        "gradient_checkpointing_use_reentrant": idle("checkpointing is always non-reentrant"),
        "use_flash_attention_2": idle("--attn auto picks the fastest kernel that is installed"),
        "base_model_revision": renamed("model_revision"),
        "model_code_revision": idle("code of a base is never run"),
        "dataset_batch_size": idle("rows are prepared in the workers"),
        "num_of_sequences": idle("packs are always filled as far as possible"),
        "streaming": switch(true=Idle(why="rows are read one by one"), false=Idle(why="off")),
    },
)
