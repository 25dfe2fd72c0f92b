"""Recognise lists of data sets of other kits that are passed as data files, and refer the user to `--data_mix`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from vlft.text import counted

SHOWN = 8  # data sets that a message lists
ENDINGS = (".yaml", ".yml")
# Keys with which an entry names its file.
FILE_KEYS = ("annotation", "file_name", "json_path", "dataset_path", "path", "data_path")
FOLDER_KEYS = ("root", "image_folder", "images_folder", "folder", "media_dir")
HUB_KEYS = ("hf_hub_url", "ms_hub_url", "om_hub_url", "hf_dataset_id", "ms_dataset_id", "script_url", "cloud_file_name")


def registry_row(raw: dict) -> str | None:
    """Return the message for a row that is an entry of a registry; None for any other row.

    ms-swift's dataset_info.json is a list of such entries.
    """
    if any(isinstance(raw.get(key), str) for key in (*HUB_KEYS, "dataset_path")):
        name = next(raw[key] for key in ("dataset_path", *HUB_KEYS) if isinstance(raw.get(key), str))
        return (
            f"names a data set ({name}) and holds no conversation: it is a list of data sets, not data. List the files "
            "in a YAML file of `- path: FILE` entries and pass it as --data_mix"
        )
    return None


def registry_at(path: str) -> str | None:
    """Return the message for a YAML file that lists data sets; None for any other file."""
    if not path.lower().endswith(ENDINGS) or not os.path.isfile(path):
        return None
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            value = yaml.safe_load(file)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    if isinstance(value, list) and value and all(isinstance(one, dict) and "path" in one for one in value):
        return f"{path}: lists data sets and holds no rows. Pass it as --data_mix {path}"
    return registry_of(path, value)


def registry_of(path: str, value: object) -> str | None:
    """Return the message for a file that lists data sets instead of rows; None for any other file.

    Recognised are LLaMA-Factory's dataset_info.json, InternVL's meta file, and the YAML files of LLaVA-NeXT and
    ms-swift.

    Args:
        path: path of the file.
        value: content of the file.
    """
    entries = list(_entries(value))
    if not entries:
        return None
    folder = os.path.dirname(path)
    lines = [line for name, entry in entries for line in _mixed(name, entry, folder)]
    files = sum(line.startswith("- path") for line in lines)
    if not files:
        names = ", ".join(name for name, _ in entries[:SHOWN])
        return (
            f"{path}: lists data sets ({names}) and holds no rows, and names no local file. Download them, list their "
            "files in a YAML file of `- path: FILE` entries, and pass it as --data_mix."
        )
    shown = lines[: 4 * SHOWN]
    more = "\n  ..." if len(lines) > len(shown) else ""
    return (
        f"{path}: lists {counted(len(entries), 'data set')} and holds no rows. Write this to "
        "mix.yaml and pass --data_mix mix.yaml instead of --data_path:\n  " + "\n  ".join(shown) + more
    )


def _entries(value: object) -> Iterator[tuple[str, dict]]:
    if isinstance(value, dict) and isinstance(value.get("datasets"), list):  # LLaVA-NeXT, ms-swift
        for place, entry in enumerate(value["datasets"]):
            if isinstance(entry, dict) and _names(entry):
                yield f"datasets[{place}]", entry
    elif isinstance(value, dict):  # LLaMA-Factory, InternVL
        if value and all(isinstance(entry, dict) and _names(entry) for entry in value.values()):
            yield from ((str(name), entry) for name, entry in value.items())
    elif isinstance(value, list) and value and all(isinstance(entry, dict) and _names(entry) for entry in value):
        yield from ((f"[{place}]", entry) for place, entry in enumerate(value))


def _names(entry: dict) -> bool:
    return any(isinstance(entry.get(key), str) for key in (*FILE_KEYS, *HUB_KEYS))


def _mixed(name: str, entry: dict[str, Any], folder: str) -> list[str]:
    """Return an entry as lines of a mix file."""
    file = next((entry[key] for key in FILE_KEYS if isinstance(entry.get(key), str)), None)
    if file is None:
        hub = next(entry[key] for key in HUB_KEYS if isinstance(entry.get(key), str))
        return [f"# {name}: {hub} is on a hub. Download it first"]
    lines = [f"- path: {os.path.join(folder, file) if folder else file}"]
    root = next((entry[key] for key in FOLDER_KEYS if isinstance(entry.get(key), str) and entry[key]), None)
    if root is not None:
        lines.append(f"  image_folder: {root}")
    repeat = entry.get("repeat_time", entry.get("repeat"))
    if isinstance(repeat, int | float) and not isinstance(repeat, bool) and repeat not in (0, 1):
        lines.append(f"  repeat: {repeat}")
    some = entry.get("num_samples")
    strategy = str(entry.get("sampling_strategy", "")).partition(":")[2]
    if isinstance(some, int) and not isinstance(some, bool):
        lines.append(f"  cap: {some}")
    elif strategy.isdigit():
        lines.append(f"  cap: {strategy}")
    elif strategy.rstrip("%").isdigit():
        lines.append(f"  repeat: {int(strategy.rstrip('%')) / 100:g}")
    if isinstance(entry.get("columns"), dict) or entry.get("formatting"):
        lines.append(f"  # {name} has its own column names: compare them with data/README.md")
    return lines
