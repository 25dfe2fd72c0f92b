"""Read the commands that start a training: launchers, the commands and scripts of the kits, the number of processes.

Neighbours: `vlft.config.shell` finds the commands in a script, `documents` collects the runs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlft.config.kits.preferences import OTHERS
from vlft.config.kits.verbs import MEANT
from vlft.config.migrate.processes import SWITCHES, Start, count_of, number_of, options_of, processes_of
from vlft.config.named_base import counted_like
from vlft.config.shell.expand import Text, Values, unknown
from vlft.config.shell.walk import Command

#: Commands whose words are never a training, although they may name one.
_PRINTERS = frozenset(("echo", "printf", "cat", "grep", "ls", "which", "type", "man", "pip", "pip3", "ps", "pkill"))
_PYTHON = re.compile(r"(python|pypy)[\d.]*|<[^<>]*python[^<>]*>", re.I)
_MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate",
    "deepspeed.launcher.runner": "deepspeed",
}
#: End of a script's path, or a module -> (kit, what it does). The longest one that fits counts.
_ENTRIES = {
    "train_sft.py": ("Qwen2-VL-Finetune", "train"),
    "src/train/train.py": ("Qwen2-VL-Finetune", "train"),
    "src/training/train.py": ("Qwen2-VL-Finetune", "train"),
    "train_dpo.py": ("Qwen2-VL-Finetune", "dpo"),
    "train_grpo.py": ("Qwen2-VL-Finetune", "grpo"),
    "train_cls.py": ("Qwen2-VL-Finetune", "classification"),
    "merge_lora_weights.py": ("Qwen2-VL-Finetune", "merge-lora"),
    "src/serve/app.py": ("Qwen2-VL-Finetune", "app"),
    "src/train.py": ("LLaMA-Factory", "train"),
    "src/train_bash.py": ("LLaMA-Factory", "train"),
    "llamafactory/launcher.py": ("LLaMA-Factory", "train"),
    "llamafactory.launcher": ("LLaMA-Factory", "train"),
    "llamafactory.cli": ("LLaMA-Factory", ""),
    "cli/sft.py": ("ms-swift", "sft"),
    "cli/pt.py": ("ms-swift", "pt"),
    "cli/rlhf.py": ("ms-swift", "rlhf"),
    "swift.cli.sft": ("ms-swift", "sft"),
    "swift.cli.pt": ("ms-swift", "pt"),
    "swift.cli.rlhf": ("ms-swift", "rlhf"),
    "axolotl.cli.train": ("axolotl", "train"),
    "trl.cli": ("TRL", ""),
    "trl.cli.main": ("TRL", ""),
    **{f"trl.scripts.{verb}": ("TRL", verb) for verb in ("sft", "dpo", "grpo", "kto", "reward", "rloo")},
    **{f"scripts/{verb}.py": ("TRL", verb) for verb in ("sft", "dpo", "grpo", "kto", "reward", "rloo")},
    **{f"scripts/{verb}_vlm.py": ("TRL", verb) for verb in ("sft", "dpo", "grpo")},
    "sft_vlm.py": ("TRL", "sft"),
    "vlft": ("vlft", ""),
    "vlft.cli.main": ("vlft", ""),
}
#: Command -> its kit. The verb follows.
_COMMANDS = {
    "swift": "ms-swift",
    "megatron": "ms-swift",
    "llamafactory-cli": "LLaMA-Factory",
    "lmf": "LLaMA-Factory",
    "axolotl": "axolotl",
    "trl": "TRL",
    "vlft": "vlft",
}
_TRAINS = frozenset(
    ("train", "sft", "pt", "rlhf", "dpo", "grpo", "kto", "orpo", "cpo", "rm", "reward", "rloo", "gkd", "ppo")
)
#: Verb -> value of `--method`, where the kit's own flags do not name the method.
METHOD = {"dpo": "dpo", "orpo": "orpo", "simpo": "simpo", "grpo": "grpo", "rlhf": "dpo"}
_OTHER = _TRAINS - {"train", "sft", "pt"} - set(METHOD)
#: Verb -> what its training does that vlft does not do.
OTHER_TRAINING = {
    **dict.fromkeys(
        _OTHER,
        f"this training is not supported ({OTHERS}); what follows is supervised fine-tuning",
    ),
    "pt": "pre-training computes the loss on the whole text; vlft trains the assistant turns of conversations",
    "classification": "classification heads are not trained here; what follows is supervised fine-tuning",
}


@dataclass(frozen=True, kw_only=True)
class Launched:
    """A command that trains.

    Attributes:
        line: its line in the script.
        kit: the kit whose command it is; "" if that is not known; `vlft` for our own.
        verb: its verb, e.g. `sft`.
        flags: the words after it that are flags and values.
        config: the YAML or JSON file that it names; None without one.
        processes: how many processes it starts; None if that is not known.
        counted: what says so.
        nodes: on how many nodes they run.
        command: its source.
        notes: what its launcher reads that is not read here.
    """

    line: int
    kit: str
    verb: str
    flags: Values
    config: Text | None
    processes: int | None
    counted: str
    command: Command
    nodes: int = 1
    notes: tuple[str, ...] = ()


def read(command: Command) -> Launched | str | None:
    """Read a command.

    Returns:
        The training that it starts; or why a command of a kit is left out; or None for any other command.
    """
    words = list(command.words)
    if not words or os.path.basename(words[0].text) in _PRINTERS:
        return None
    start = Start()
    place = next((at for at, word in enumerate(words) if _is_program(words, at)), None)
    if place is None:
        return None
    before = {os.path.basename(word.text) for word in words[:place]} | set(command.wrappers)
    if before & {"srun", "mpirun", "mpiexec"}:
        start.counts.append((None, "", 1))
    return _program(words[place:], command, start)


def _is_program(words: Sequence[Text], at: int) -> bool:
    name = os.path.basename(words[at].text)
    return (
        name in _COMMANDS
        or name in SWITCHES
        or _PYTHON.fullmatch(name) is not None
        or (name.endswith(".py") and not any(word.text.startswith("-") for word in words[:at]))
    )


def _program(words: list[Text], command: Command, start: Start) -> Launched | str | None:
    name, rest = os.path.basename(words[0].text), words[1:]
    if name in _COMMANDS:
        return _verb(_COMMANDS[name], rest, command, start)
    if name in SWITCHES:
        if name == "accelerate":
            if not rest or rest[0].text != "launch":
                return None
            rest = rest[1:]
        options, rest, module = options_of(rest, SWITCHES[name])
        start.counts.append(count_of(name, options))
        if name == "accelerate" and "config_file" in options:
            start.notes.append(
                f"accelerate's --config_file {options['config_file'].text} is not read. The number of processes and "
                "the stage of ZeRO stand in it: set them with --gpus and, except for GRPO, --deepspeed"
            )
        return _script(rest, command, start, module=module)
    if name.endswith(".py"):
        return _script(words, command, start, module=False)
    while rest and rest[0].text.startswith("-") and rest[0].text not in ("-m", "-c"):
        rest = rest[2:] if rest[0].text in ("-W", "-X") else rest[1:]
    if rest and rest[0].text == "-c":
        return None
    module = bool(rest) and rest[0].text == "-m"
    rest = rest[module:]
    if module and rest and rest[0].text in _MODULES:
        name = _MODULES[rest[0].text]
        launch = [Text(text="launch")] if name == "accelerate" else []
        return _program([Text(text=name), *launch, *rest[1:]], command, start)
    start.single = True
    return _script(rest, command, start, module=module)


def _script(words: list[Text], command: Command, start: Start, *, module: bool) -> Launched | str | None:
    if not words:
        return None
    name = words[0].text
    fits = [end for end in _ENTRIES if name == end or (not module and f"/{name}".endswith(f"/{end}"))]
    if fits:
        kit, verb = _ENTRIES[max(fits, key=len)]
        return _verb(kit, words[1:] if not verb else [Text(text=verb), *words[1:]], command, start)
    if not any(word.text.startswith("--") for word in words) and not _config(words[1:]):
        return None
    return _launched("", "train", words[1:], command, start)


def _verb(kit: str, words: list[Text], command: Command, start: Start) -> Launched | str | None:
    verb = words[0].text if words else ""
    if verb in _TRAINS or verb in OTHER_TRAINING:
        return _launched(kit, verb, words[1:], command, start)
    if kit == "vlft" or verb.startswith("-") or not verb:
        return None
    meant = MEANT.get(verb.lower().replace("_", "-"))
    return f"line {command.line}: {verb} of {kit} does not train" + (f". Use: {meant}" if meant else "")


def _launched(kit: str, verb: str, words: list[Text], command: Command, start: Start) -> Launched:
    config = _config(words)
    flags = [word for word in words if word is not config]
    if config is not None:
        at = next((at for at, word in enumerate(flags) if word.text in ("--config", "--config_file")), None)
        flags = flags if at is None else flags[:at] + flags[at + 1 :]
        flags = [word for word in flags if word.text not in (f"--config={config.text}",)]
    if "--" in [word.text for word in flags]:  # axolotl passes what follows to its launcher
        at = [word.text for word in flags].index("--")
        start.counts.append(count_of("torchrun", options_of(flags[at + 1 :], SWITCHES["torchrun"])[0]))
        flags = flags[:at]
    flags = [part for word in flags for part in _pair(word, flags)]
    processes, counted, nodes = processes_of(kit, command, start, flags)
    return Launched(
        line=command.line,
        kit=kit,
        verb=verb,
        flags=tuple(flags),
        config=config,
        processes=processes,
        counted=counted,
        command=command,
        nodes=nodes,
        notes=tuple(start.notes),
    )


def _config(words: Sequence[Text]) -> Text | None:
    """Return the settings file that a command names: its first word, or the value of `--config`."""
    for place, word in enumerate(words):
        if word.text == "--config" and place + 1 < len(words):
            return words[place + 1]
        if word.text.startswith("--config="):
            return Text(text=word.text.removeprefix("--config="), missing=word.missing)
    first = words[0] if words else None
    return first if first is not None and first.text.endswith((".yaml", ".yml", ".json")) else None


def _pair(word: Text, flags: Sequence[Text]) -> list[Text]:
    """Turn the first words into flags if they are LLaMA-Factory's `name=value`."""
    match = re.fullmatch(r"([A-Za-z_]\w*)=(.*)", word.text, re.S)
    before = [one.text for one in flags[: next(at for at, one in enumerate(flags) if one is word)]]
    if match is None or any(text.startswith("--") for text in before):
        return [word]
    return [Text(text=f"--{match[1]}"), Text(text=match[2], missing=word.missing)]


#: Functions of vlft's scripts that `own_script` reads. They are not followed.
OWN_FUNCTIONS = frozenset(("finetune", "tower_rate", "picture_tokens", "frame_pixels"))


def own_script(commands: Sequence[Command]) -> Launched | None:
    """Read a script of vlft (scripts/finetune.sh and others): its function `finetune` runs the flags of `preset`."""
    last = next((one for one in reversed(commands) if one.words and one.words[0].text == "finetune"), None)
    if last is None or "preset" not in last.variables:
        return None
    words: list[Text] = []
    given = {**last.variables, **{name: (text,) for name, text in last.environment.items()}}
    for variable, flag in {"MODEL": "model_id", "DATA": "data_path", "OUTPUT": "output_dir"}.items():
        if f"--{flag}" not in [word.text for word in last.words]:
            why = f"${variable} is set when the script is started"
            words += [Text(text=f"--{flag}"), *(given.get(variable) or (unknown(variable, why),))]
    if "IMAGE_FOLDER" in given:
        words += [Text(text="--image_folder"), *given["IMAGE_FOLDER"]]
    words += [Text(text="--global_batch"), *given.get("GLOBAL_BATCH", (Text(text="128"),))]
    words += given["preset"]
    own = [word.text for word in (*words, *last.words)]
    at = len(own) - own[::-1].index("--model_id")
    base = counted_like("".join(own[at : at + 1]))
    for one in commands:
        if one.words and one.words[0].text == "picture_tokens" and len(one.words) > 2:
            for name, tokens in zip(("min", "max"), one.words[1:3], strict=True):  # "$@" follows
                flag, area = f"image_{name}_pixels", f"{base.factor} x {base.factor}"
                known = tokens.text.isdigit()
                pixels = Text(text=str(int(tokens.text) * base.factor**2)) if known else None
                words += [Text(text=f"--{flag}"), pixels or unknown(flag.upper(), f"{tokens.text} x {area}")]
        limits_frames = base.video_rule == "qwen-vl-utils"
        if one.words and one.words[0].text == "frame_pixels" and len(one.words) > 1 and limits_frames:
            words += [Text(text="--video_max_pixels"), one.words[1]]
        if one.words and one.words[0].text == "tower_rate" and len(one.words) > 2:
            tower, rate = one.words[1].text, one.words[2]
            at = max((place for place, word in enumerate(own) if word == f"--{tower}"), default=-1)
            if own[at + 1 : at + 2] != ["frozen"]:
                words += [Text(text=f"--{tower}_lr"), rate]
    gpus = number_of(given["GPUS"][0]) if "GPUS" in given else None
    return Launched(
        line=last.line,
        kit="vlft",
        verb="train",
        flags=(*words, *last.words[1:]),
        config=None,
        processes=gpus,
        counted="GPUS" if gpus else "",
        command=last,
    )
