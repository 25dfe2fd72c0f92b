"""Refuse a base that cannot be used, from its small files alone and before rows are read.

`check_base` checks the model, `check_processor` checks the files that make tokens and patches. `vlft.model.load` proves
that the tokenizer, the chat template and the weights work.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlft.errors import CheckpointError
from vlft.families import FAMILIES, Family
from vlft.model.quantised_files import QuantisedFiles
from vlft.model_files import absent, read_json, tensor_index

#: Settings of picture and video processor. The first with a setting has precedence.
MEDIA_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
#: Endings of the names under which quantised copies of a model are published.
_QUANTISED_NAME = re.compile(r"-(unsloth-)?(bnb-)?(awq|gptq|fp8|nf4|4bit|8bit|int[48]|w[48]a\d+)\b.*$", re.IGNORECASE)


def check_base(folder: Path) -> Family:
    """Check a model folder's config.json, generation_config.json and the headers of its weights.

    Returns:
        The family of the model.

    Raises:
        CheckpointError: a file is not JSON, the model type is not supported, or the weights are quantised or
            incomplete.
    """
    config = read_json(folder / "config.json")
    family = Family.of(config.get("model_type"), where=str(folder))
    _refuse_quantised(folder, config, family)
    _refuse_blind(folder, config, family)
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")  # it is copied into trained and merged folders
    tensor_index(folder)
    check_media(folder, {name: folder / name for name in MEDIA_FILES if (folder / name).is_file()}, config, family)
    return family


def _refuse_blind(folder: Path, config: dict[str, Any], family: Family) -> None:
    """Refuse a text-only copy of a model, for which transformers would build a vision tower of its default size."""
    if family.plain_patches(config) is not None:
        return
    raise CheckpointError(
        f"{folder}: config.json has the model_type {family.model_type!r} and no vision_config: it is the language "
        f"model of a {family.label} alone, and vlft trains models with a vision tower. Use the {family.label} that it "
        "was taken from."
    )


def _refuse_quantised(folder: Path, config: dict[str, Any], family: Family) -> None:
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    found = next((part["quantization_config"] for part in parts if part.get("quantization_config")), None)
    if found is None:
        return
    words = found if isinstance(found, dict) else {}
    bits = next((f"{n} bits" for n in (4, 8) if words.get(f"load_in_{n}bit")), None)
    if words.get("load_in_4bit") and any(".quant_state.bitsandbytes__" in name for name in tensor_index(folder)):
        QuantisedFiles.of(folder, family)
        return
    method = words.get("quant_method") or ("bitsandbytes" if bits else "an unnamed method")
    method = f"{method}, {bits}" if bits else method
    unquantised = unquantised_name(str(config.get("_name_or_path") or folder.name))
    raise CheckpointError(
        f"{folder}: its weights are quantised: config.json has a quantization_config ({method}). Weights are "
        "read in float32, bfloat16 and float16, and as bitsandbytes stores 4 bits. Use the unquantised model"
        + (f", probably {unquantised}." if unquantised else f", a {family.label} without FP8, AWQ or GPTQ in its name.")
    )


def unquantised_name(name: str) -> str | None:
    """The name of the model from which a quantised copy was made; None if its name does not tell."""
    unquantised, cut = _QUANTISED_NAME.subn("", name)
    return unquantised if cut else None


def check_processor(folder: Path, files: Sequence[Path], *, base: Path, read: Collection[str] = ()) -> None:
    """Refuse a tokenizer or picture processor with files that are missing, broken or of another model.

    Args:
        folder: for messages.
        files: of tokenizer, picture processor and chat template, from any folders.
        base: folder of the model.
        read: names of files that were already read.

    Raises:
        CheckpointError: names what is missing, the file that is not JSON, or the two values that differ.
    """
    names = {file.name for file in files}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        missing = [name for name in ("tokenizer.json", "vocab.json", "merges.txt") if name not in names]
        dead = next((f" {name} is {absent(folder / name)}" for name in missing if (folder / name).is_symlink()), "")
        raise CheckpointError(
            f"{folder}: has no tokenizer: {', '.join(missing)} missing. A tokenizer is tokenizer.json, or vocab.json "
            f"and merges.txt.{dead or ' Copy them from the model you started from.'}"
        )
    if not names & {"preprocessor_config.json", "processor_config.json"}:
        raise CheckpointError(
            f"{folder}: has no picture processor: neither preprocessor_config.json nor processor_config.json. "
            "Copy it from the model you started from."
        )
    for file in files:
        if file.suffix == ".json" and file.name not in read:
            read_json(file)
    config = read_json(base / "config.json")
    family = Family.of(config.get("model_type"), where=str(base))
    check_media(folder, {file.name: file for file in files if file.name in MEDIA_FILES}, config, family)


def check_media(folder: Path, files: Mapping[str, Path], config: Mapping[str, Any], family: Family) -> None:
    """Compare the settings of picture and video processor with the model, as far as the files have them.

    Args:
        folder: for messages.
        files: name -> path, of `MEDIA_FILES`.
        config: content of the model's config.json.
        family: of the model.

    Raises:
        CheckpointError: a patch size or a class belongs to another model; names both values and the file.
    """
    found = {name: read_json(path) for name, path in files.items()}
    advice = f"Copy {', '.join(MEDIA_FILES)} from the model you started from, those that it has."
    classes: dict[str, tuple[str, str]] = {}
    for name, content in found.items():
        classes.setdefault("processor_class", (str(content.get("processor_class")), name))
    for part, key in (("image_processor", "image_processor_type"), ("video_processor", "video_processor_type")):
        name, settings = _settings_of(part, found)
        for size, here in (family.plain_patches(config) or {}).items():
            if (there := settings.get(size)) not in (None, here):
                raise CheckpointError(
                    f"{folder}: {size} of its {part.replace('_', ' ')} is {there}, by {name}; config.json has {here} "
                    f"for the vision tower: they belong to different models{_owners(size, there, family)}. {advice}"
                )
        classes[f"{part}_class"] = (str(settings.get(key)).removesuffix("Fast"), f"{key} in {name}")
    for attribute, (there, where) in classes.items():
        known = {getattr(one, attribute): one for one in reversed(FAMILIES.values())}
        if there in known and there != (here := getattr(family, attribute)):
            raise CheckpointError(
                f"{folder}: the {attribute.removesuffix('_class').replace('_', ' ')} of {where} is {there}, that of "
                f"{known[there].label}; {family.label} has {here}. {advice}"
            )


def _settings_of(part: str, found: Mapping[str, dict[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The file with the settings of one part, and the settings; in transformers' order of precedence (5.17, 5.23)."""
    nested = found.get("processor_config.json", {}).get(part)
    if isinstance(nested, dict):
        return "processor_config.json", nested
    own = ("video_preprocessor_config.json",) if part == "video_processor" else ()
    name = next((name for name in (*own, "preprocessor_config.json") if name in found), "")
    return name, found.get(name, {})


def _owners(size: str, value: Any, family: Family) -> str:
    """The families that have such a size, as a remark; "" if there are none."""
    owners = [one.label for one in FAMILIES.values() if one.patch_sizes.get(size) == value]
    return f" ({value} is that of {', '.join(owners)})" if owners and family.label not in owners else ""
