"""DeepSpeed's settings: a preset by name, or a user's JSON file, which must not override a flag.

Neighbours: `vlft.config.flags` passes the result to transformers, which fills in every "auto" from the flags.
"""

from __future__ import annotations

import copy
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlft.config.kinds import missing
from vlft.config.places import near_miss
from vlft.errors import ConfigError

#: Preset -> ZeRO stage, and what is offloaded to the host's memory.
PRESETS: dict[str, tuple[int, tuple[str, ...]]] = {
    "zero1": (1, ()),
    "zero2": (2, ()),
    "zero3": (3, ()),
    "zero2_offload": (2, ("optimizer",)),
    "zero3_offload": (3, ("optimizer", "param")),
}

#: Blocks that would replace flags -> what to use instead.
_BLOCKS = {
    "optimizer": "--optim, --learning_rate, --vision_lr, --merger_lr and --weight_decay",
    "scheduler": "--lr_scheduler_type and --warmup_steps",
    "amp": "--bf16",
    "torch_autocast": "--bf16",
    "elasticity": "--global_batch",
    "activation_checkpointing": "--gradient_checkpointing",
    "curriculum_learning": "the order of rows, which --seed decides",
    "data_efficiency": "the order of rows, which --seed decides",
    "progressive_layer_drop": "plain training of all layers",
    "compression_training": "plain training of the weights as they are",
    "sparse_attention": "--attn",
    "tensor_parallel": "--deepspeed zero3, which also shards the weights",
}
#: Key that holds a flag's value -> the flag.
_FLAGS = {
    "gradient_clipping": "max_grad_norm",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "bf16": "bf16",
    "fp16": "fp16",
}


def deepspeed_settings(name: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSpeed's settings for a preset or a JSON file.

    Args:
        name: the value of `--deepspeed`: a preset or a path.
        flags: the values of the flags in `_FLAGS`, and `global_batch`.

    Returns:
        The settings, with "auto" for each value that a flag sets.

    Raises:
        ConfigError: the name is unknown, the file cannot be read, a value is of the wrong kind, or a value would
            override a flag.
    """
    settings = check_name(name)
    if settings is None:
        return _preset(*PRESETS[name])
    _check(settings, flags, where=f"--deepspeed {name}")
    return _filled(settings)


def check_name(name: str) -> dict[str, Any] | None:
    """Return the content of the JSON file of that name, or None for a preset. Imports nothing heavy.

    Raises:
        ConfigError: the name is neither a preset nor a JSON file with an object, or DeepSpeed is not installed.
    """
    if lacking := missing(("deepspeed",)):
        raise ConfigError(f"--deepspeed {name}: {lacking}")
    if name in PRESETS:
        return None
    if Path(name).suffix != ".json":
        raise ConfigError(f"--deepspeed {name}: neither a preset ({', '.join(PRESETS)}) nor a .json file.")
    try:
        settings = json.loads(Path(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--deepspeed {name}: cannot be read as JSON ({error}){near_miss(name)}") from error
    if not isinstance(settings, dict):
        raise ConfigError(f"--deepspeed {name}: holds a {type(settings).__name__}, expected a JSON object")
    return settings


def _preset(stage: int, offloaded: tuple[str, ...]) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": False,  # True has led to NaN losses under ZeRO-2 (2U1/Qwen2-VL-Finetune #10)
        "contiguous_gradients": True,
    }
    for what in offloaded:
        zero[f"offload_{what}"] = {"device": "cpu", "pin_memory": True}
    return _filled({"zero_optimization": zero})


def _filled(settings: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of the settings with "auto" for each value that a flag sets."""
    settings = copy.deepcopy(settings)
    # Without the key, DeepSpeed 0.19.8 clips at 1.0 and ignores --max_grad_norm (older versions did not clip at all).
    for key in ("gradient_clipping", "gradient_accumulation_steps", "train_micro_batch_size_per_gpu"):
        settings[key] = "auto"
    settings["train_batch_size"] = "auto"
    for key in ("bf16", "fp16"):
        settings[key] = {**settings.get(key, {}), "enabled": "auto"}
    # Gradients of micro-batches are summed in float32: in bf16 the last of many would be lost to rounding.
    settings.setdefault("data_types", {"grad_accum_dtype": "fp32"})
    # The optimizer is torch's, built by vlft with a group for each tower. When offloaded, it runs torch's fused AdamW
    # on the host: one pass over memory, as DeepSpeed's own CPU Adam, but without its cache blocking, and it needs no
    # compiler. Without these two keys DeepSpeed insists on its own optimizer.
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    return settings


def _check(settings: Mapping[str, Any], flags: Mapping[str, Any], *, where: str) -> None:
    for block, instead in _BLOCKS.items():
        if block in settings:
            raise ConfigError(
                f'{where}: its "{block}" block would act in place of {instead}. Remove the block, so that the flags '
                "take effect."
            )
    for key, flag in _FLAGS.items():
        value = settings.get(key, "auto")
        if key in ("bf16", "fp16"):
            value = _object(settings, key, where).get("enabled", "auto")
            kinds: tuple[type, ...] = (bool,)
        else:
            kinds = (int, float) if key == "gradient_clipping" else (int,)
        label = f"{key}.enabled" if key in ("bf16", "fp16") else key
        if value == "auto":
            continue
        if type(value) not in kinds:
            wanted = "true, false" if kinds == (bool,) else "a number"
            raise ConfigError(f'{where}: {label} is {json.dumps(value)}, expected {wanted} or "auto"')
        if flag == "gradient_accumulation_steps" and flags["global_batch"] is not None:
            flag = "global_batch"
        if flag == "global_batch" or value != flags[flag]:
            said = json.dumps(flags[flag])
            raise ConfigError(
                f'{where}: its {label} {json.dumps(value)} would override --{flag} {said}. Set it to "auto" in the '
                "file (or remove it), and use the flag."
            )
    whole = settings.get("train_batch_size", "auto")
    if whole != "auto":
        said = " ".join(
            f"--{flag} {flags[flag]}" for flag in ("global_batch", "gradient_accumulation_steps") if flags[flag]
        )
        raise ConfigError(
            f'{where}: its train_batch_size {json.dumps(whole)} would override {said}. Set it to "auto" in the file '
            "(or remove it), and use --global_batch."
        )
    _check_zero(_object(settings, "zero_optimization", where), where)


def _check_zero(zero: dict[str, Any], where: str) -> None:
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ConfigError(
            f"{where}: zero_optimization.stage is {json.dumps(stage)}, expected 1, 2 or 3. To train without sharding, "
            "drop --deepspeed."
        )
    for block in ("offload_optimizer", "offload_param"):
        _object(zero, block, f"{where}: zero_optimization")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError

    try:
        DeepSpeedZeroConfig(**zero)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(["zero_optimization", *map(str, first["loc"])])
        raise ConfigError(
            f"{where}: {name} is {first['input']!r}: {first['msg']}. See DeepSpeed's page on config-json."
        ) from error


def _object(settings: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{where}: {key} holds a {type(value).__name__}, expected a JSON object")
    return value or {}


def zero_word(settings: Mapping[str, Any] | None) -> str | None:
    """Return how a run's state is sharded: `zero1` to `zero3`, or with `_offload`; None without DeepSpeed."""
    if settings is None:
        return None
    zero = settings["zero_optimization"]
    offloaded = any(
        (zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param")
    )
    return f"zero{zero['stage']}" + ("_offload" if offloaded else "")


def names_zero3(name: str | None) -> bool:
    """Whether `--deepspeed` names ZeRO-3, by preset or JSON file. A file that cannot be read is refused elsewhere."""
    if name is None or name in PRESETS:
        return name is not None and PRESETS[name][0] == 3
    try:
        found = json.loads(Path(name).read_text(encoding="utf-8"))
        return found["zero_optimization"]["stage"] == 3
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        return False


def be_a_world_of_one() -> None:
    """Set what torchrun would set, if no launcher started this process. Without it DeepSpeed asks for MPI."""
    if "WORLD_SIZE" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        here = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update(here, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
