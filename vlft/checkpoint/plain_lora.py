"""Whether an adapter is plain LoRA, W + scale * B @ A, or DoRA, and which towers it trained.

`vlft.merge` asks before it merges, `vlft.checkpoint.start` before a run starts from an adapter.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vlft.checkpoint.adapter import Adapter
from vlft.checkpoint.files import module_name
from vlft.checkpoint.token_rows import PREFIX, ROWS
from vlft.errors import CheckpointError
from vlft.families import TOWERS, Family

# Settings of adapter_config.json that a merge applies, or that do not change W + scale * B @ A.
_UNDERSTOOD = {
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "alpha_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "ensure_weight_tying",
    "trainable_token_indices",
    "use_rslora",
}
# Others (pissa, olora, corda, loftq, ...) change the base's weights when the adapter is attached (peft 0.21).
_PLAIN_INITS = (True, False, "gaussian", "eva")


def towers_of_adapter(keys: Iterable[str], family: Family) -> dict[str, str]:
    """The towers that an adapter trained, from its tensor names.

    Args:
        keys: names in adapter_model.safetensors (`base_model.model.` first), with module or published names.
        family: of the base.

    Returns:
        Tower -> `lora` (at least one LoRA pair), `full` (only copies of whole modules, at least one), or `frozen`.

    Raises:
        CheckpointError: a key belongs to no tower.
    """
    towers = dict.fromkeys(TOWERS, "frozen")
    for key in keys:
        name = module_name(family, key.removeprefix(PREFIX))
        try:
            tower = family.tower_of(name)
        except KeyError:
            raise CheckpointError(f"adapter tensor {key}: no part of {family.label}. Is it for another base?") from None
        if ROWS in name:
            continue  # rows of the embedding train beside a tower of any mode
        if ".lora_" in name:
            towers[tower] = "lora"
        elif towers[tower] == "frozen":
            towers[tower] = "full"
    return towers


def check_plain(settings: dict[str, Any], where: Path, *, refusal: str) -> None:
    """Refuse every setting under which the adapted weight is not W + scale * B @ A; the message names the setting.

    Args:
        settings: the content of adapter_config.json.
        where: its path.
        refusal: what is not done with such an adapter, and what to do instead, as the end of a sentence.

    Raises:
        CheckpointError: names the settings.
    """
    from peft import LoraConfig

    if settings.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type is {settings.get('peft_type')!r}, not 'LORA'. It {refusal}.")
    defaults = LoraConfig().to_dict()
    odd = {
        name: value
        for name, value in settings.items()
        if name not in _UNDERSTOOD and value and value != defaults.get(name)
    }
    if settings.get("init_lora_weights", True) not in _PLAIN_INITS:
        odd["init_lora_weights"] = settings["init_lora_weights"]
    if odd:
        shown = ", ".join(f"{name}={value!r}" for name, value in sorted(odd.items()))
        changed = ""
        if "init_lora_weights" in odd:
            changed = (
                " It was trained on changed weights of the base. If its initial adapter was saved, peft turns it into "
                "plain LoRA: save_pretrained(NEW, path_initial_model_for_weight_conversion=INITIAL)."
            )
        raise CheckpointError(
            f"{where}: {shown}: such an adapter is more than W + scale * B @ A and {refusal}.{changed}"
        )


def check_magnitude(adapter: Adapter, module: str, name: str | None, *, rows: int) -> None:
    """Check DoRA's vector of a module.

    Args:
        adapter: the adapter.
        module: as named today.
        name: of the vector in the adapter's file; None if it has none.
        rows: of the module's weight.

    Raises:
        CheckpointError: it is missing, or has another length.
    """
    found = None if name is None else adapter.shapes[name]
    if found != (rows,):
        raise CheckpointError(
            f"{adapter.file}: use_dora is true (adapter_config.json), so {module} needs a lora_magnitude_vector "
            f"[{rows}], one number for each row of its weight; found {'none' if found is None else list(found)}. Was "
            "the adapter saved completely, and is this the base it was trained on?"
        )
