"""Find the runs in a file of another kit: a shell script, a command line, or a YAML or JSON file.

Neighbours: `vlft.config.shell` reads scripts, `launchers` their commands. `settle` translates each run.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlft.config.kits import KITS, trl
from vlft.config.kits.outcome import Kit
from vlft.config.migrate import launchers
from vlft.config.migrate.launchers import METHOD, Launched
from vlft.config.said import Said, flags_of, placeholders, read_line
from vlft.config.shell.expand import Text
from vlft.config.shell.walk import Script, follow
from vlft.config.table import kinds
from vlft.config.translate import OURS, kit_of
from vlft.errors import ConfigError

LARGEST = 2_000_000  # bytes of a file; larger ones are data
_PLAIN_KEY = re.compile(r"[A-Za-z_][\w.-]*")
_NOT_READ = {
    ".py": "a Python file",
    ".ipynb": "a notebook",
    ".toml": "a TOML file",
    ".jsonl": "a data file",
    ".parquet": "a data file",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that a file describes.

    Attributes:
        where: its place: the file, with the line of a command.
        kit: the kit that it was written for; `OURS` for vlft; None if only its flags can decide.
        flags: its flags.
        environment: the variables that its command sees.
        processes: its number of processes; None if that is not known.
        counted: what says so.
        nodes: on how many nodes they run.
        why: placeholder -> why the value is not known.
        notes: what the user must know about its place in the script.
        refused: what kind of training it is, if vlft does not have it; else "".
    """

    where: str
    kit: Kit | None
    flags: tuple[Said, ...]
    environment: Mapping[str, str]
    processes: int | None
    counted: str
    nodes: int
    why: Mapping[str, str]
    notes: tuple[str, ...]
    refused: str


@dataclass(frozen=True, kw_only=True)
class Document:
    """The runs of a file, and what else was found in it."""

    runs: tuple[Run, ...]
    remarks: tuple[str, ...]


def read(old: str) -> Document:
    """Read a file, `-` for standard input, or a command line given as text.

    Raises:
        ConfigError: it cannot be read, or it describes no run.
    """
    text, path = _text(old)
    name = path or "the text"
    if not text.strip():
        raise ConfigError(f"{name} is empty, so there is nothing to translate")
    content = _settings(text, name)
    if content is not None:
        runs = [_of_settings(one, name, name) for one in content]
        return Document(runs=tuple(runs), remarks=())
    return _of_script(text, path)


def _text(old: str) -> tuple[str, str]:
    if old == "-":
        return sys.stdin.read(), ""
    path = Path(old)
    if not os.path.exists(old):
        if re.search(r"\s--?\w|\s\S+\.ya?ml\b", old):
            return old, ""
        from vlft.config.places import near_miss

        raise ConfigError(f"--translate {old}: no such file{near_miss(old)}")
    if path.is_dir():
        raise ConfigError(f"--translate {old}: is a folder. Name the script, the command line or the YAML in it")
    if path.suffix.lower() in _NOT_READ:
        raise ConfigError(_unreadable(old, _NOT_READ[path.suffix.lower()]))
    if path.stat().st_size > LARGEST:
        raise ConfigError(
            f"--translate {old}: {path.stat().st_size:,} bytes, at most {LARGEST:,}: name a script or a YAML"
        )
    try:
        return path.read_text(encoding="utf-8-sig"), old
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--translate {old}: cannot be read as text ({error})") from error


def _unreadable(name: str, what: str) -> str:
    return (
        f"--translate {name}: is {what}. It takes a shell script, a file with a command line, or a YAML or JSON of "
        "Qwen2-VL-Finetune, LLaMA-Factory, ms-swift, axolotl or TRL. Write the command that starts the training into "
        "a file, as you would type it in a terminal; words of a Python list are separated by blanks"
    )


def _settings(text: str, name: str) -> list[dict[Any, Any]] | None:
    """Return the settings in a YAML or JSON file, one mapping for each document in it; None if it is a script."""
    import yaml

    is_yaml = name.lower().endswith((".yaml", ".yml", ".json"))
    if text.startswith("#!") and not is_yaml:
        return None
    if re.search(r"^\s*(import |from \S+ import |subprocess\.|!pip )", text, re.M) and not is_yaml:
        raise ConfigError(_unreadable(name, "Python"))
    try:
        loaded = list(yaml.safe_load_all(text)) if not name.lower().endswith(".json") else [json.loads(text)]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if is_yaml:
            raise ConfigError(f"--translate {name}: not valid {name.rpartition('.')[2].upper()} ({error})") from None
        return None
    found = [one for one in loaded if one is not None]
    plain = all(isinstance(one, dict) and all(_PLAIN_KEY.fullmatch(str(key)) for key in one) for one in found)
    if found and plain:
        return found
    if is_yaml:
        kind = type(next((one for one in found if not isinstance(one, dict)), "nothing")).__name__
        raise ConfigError(f"--translate {name}: expected `flag: value` lines, found a {kind}. Is it a data file?")
    return None


def _of_settings(content: Mapping[Any, Any], where: str, name: str) -> Run:
    for mark, what in (
        ({"zero_optimization"}, "settings of DeepSpeed: name them with --deepspeed"),
        (
            {"compute_environment", "distributed_type"},
            "settings of accelerate: use torchrun to start several processes",
        ),
        ({"file_name"}, "a list of data sets"),
    ):
        inner = next((one for one in content.values() if isinstance(one, dict)), {})
        if mark <= set(content) or (mark == {"file_name"} and "file_name" in inner):
            raise ConfigError(f"--translate {name}: holds {what}, and no flags of a training")
    environment = (
        {str(key): str(value) for key, value in (content.get("env") or {}).items()}
        if isinstance(content.get("env"), dict)
        else {}
    )
    flags = [Said(name=key, words=words) for key, words in flags_of(content) if key != "env" or not environment]
    written = {one.name: one for one in flags}
    return Run(
        where=where,
        kit=kit_of(written, kinds("train")),
        flags=tuple(written.values()),
        environment=environment,
        processes=None,
        counted="",
        nodes=1,
        why={},
        notes=(),
        refused="",
    )


def _of_script(text: str, path: str) -> Document:
    name = path or "the text"
    script = follow(text, path, recorded=launchers.OWN_FUNCTIONS)
    remarks = list(script.remarks)
    every = [launchers.read(command) for command in script.commands]
    found: list[Launched] = []
    if (own := launchers.own_script(script.commands)) is not None:
        found = [own]
    else:
        for read_as in every:
            if isinstance(read_as, str):
                remarks.append(read_as)
            elif read_as is not None:
                found.append(read_as)
        found = found or _only_flags(script)
        remarks += _stray_flags(script, found)
    runs = []
    for one in found:
        run = _of_command(one, script, path, remarks, many=sum(map(bool, every)) > 1)
        if run is not None:
            runs.append(run)
    if not runs:
        reasons = "".join(f"\n  {remark}" for remark in remarks)
        raise ConfigError(
            f"--translate {name}: found no command that starts a training. It knows those of Qwen2-VL-Finetune, "
            f"LLaMA-Factory, ms-swift, axolotl, TRL and vlft{reasons}"
        )
    return Document(runs=tuple(runs), remarks=tuple(dict.fromkeys(remarks)))


def _only_flags(script: Script) -> list[Launched]:
    """Read a file that holds nothing but flags."""
    return [
        Launched(
            line=command.line,
            kit="",
            verb="train",
            flags=command.words,
            config=None,
            processes=None,
            counted="",
            command=command,
        )
        for command in script.commands[:1]
        if command.words[0].text.startswith("--")
    ]


def _stray_flags(script: Script, found: Sequence[Launched]) -> list[str]:
    """Return a remark for flags that begin a line of their own, as after a comment between continued lines."""
    read_lines = {one.command.line for one in found}
    return [
        f"line {command.line}: {' '.join(word.text for word in command.words[:2])} ... belongs to no command. A "
        "comment, or a line without a backslash, ends the command before it. These flags are left out"
        for command in script.commands
        if command.words[0].text.startswith("-") and command.line not in read_lines
    ]


def _of_command(one: Launched, script: Script, path: str, remarks: list[str], *, many: bool) -> Run | None:
    name = path or "the text"
    flags = read_line([word.text for word in one.flags], kinds("train"), others=False)
    said = {flag.name: flag for flag in flags.flags}
    if flags.others:
        remarks.append(f"line {one.line}: {' '.join(flags.others[:4])} belongs to no flag, and is left out")
    notes = [*one.notes]
    notes += [f"{variable} is {value} in this round of the loop" for variable, value in one.command.loops.items()]
    if one.command.maybe is not None:
        notes.append(f"it runs only if the condition in line {one.command.maybe} holds")
    why = {placeholder: reason for word in one.flags for placeholder, reason in word.missing}
    environment = {key: text.text for key, text in one.command.environment.items()}
    why |= {placeholder: reason for text in one.command.environment.values() for placeholder, reason in text.missing}
    if one.config is not None:
        base = _named_settings(one.config, script, path, remarks, one.line)
        if base is None and not said:
            return None
        if base is not None:
            said = {flag.name: flag for flag in base.flags} | said
            environment = dict(base.environment) | environment
            one = replace(one, kit=one.kit or (base.kit.name if base.kit else ""))
    if one.verb in METHOD and one.kit != "vlft" and not {"method", "rlhf_type"} & set(said):
        said = {"method": Said(name="method", words=(METHOD[one.verb],))} | said
    if one.kit != "vlft" and trl.wrote(said, one.kit):
        one = replace(one, kit=trl.KIT.name)
    kit = next((kit for kit in KITS if kit.name == one.kit), OURS if one.kit == "vlft" else None)
    if kit is None:
        kit = kit_of(said, kinds("train"))
        names = set(kinds("train")).union(*(known.names for known in KITS))
        if len(set(said) & names) < 2:
            return None  # some other program with flags
    if kit is not None and kit.name == "ms-swift" and not script.passes_arguments:
        environment = {key: value for key, value in environment.items() if value}
    if script.passes_arguments and not path.endswith("common.sh"):
        notes.append('it passes the arguments of the script on ("$@"): add yours')
    return Run(
        where=f"{name}, line {one.line}" if many or path else name,
        kit=kit,
        flags=tuple(said.values()),
        environment=environment,
        processes=one.processes,
        counted=one.counted,
        nodes=one.nodes,
        why={key: reason for key, reason in why.items() if key in _used(said, environment)},
        notes=tuple(notes),
        refused=launchers.OTHER_TRAINING.get(one.verb, "") if one.kit != "vlft" else "",
    )


def _used(said: Mapping[str, Said], environment: Mapping[str, str]) -> set[str]:
    words = [word for flag in said.values() for word in flag.words] + list(environment.values())
    return {placeholder for word in words for placeholder in placeholders(word)}


def _named_settings(config: Text, script: Script, path: str, remarks: list[str], line: int) -> Run | None:
    """Read the YAML or JSON that a command names. The script itself may write it."""
    name = config.text
    text = script.files[name].text if name in script.files else None
    if text is None:
        places = (name, os.path.join(os.path.dirname(path), name))
        place = next((one for one in places if os.path.isfile(one)), None)
        if place is None or config.missing:
            remarks.append(
                f"line {line}: {name} is not there, so its settings are missing. Then: vlft plan --translate {name}"
            )
            return None
        text = _text(place)[0]
    content = _settings(text, name if name.endswith((".yaml", ".yml", ".json")) else f"{name}.yaml")
    return _of_settings(content[0], name, name) if content else None
