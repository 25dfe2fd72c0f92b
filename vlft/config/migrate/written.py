"""Print a translated run: as a command with notes, as a YAML, and as JSON. Neighbour: `settle` translates it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlft.config.migrate.settle import Settled, changes
from vlft.config.said import as_written, quoted, wrapped
from vlft.text import counted

COLUMN = 52  # widest column of flags before the arrows


def as_text(one: Settled, config: str = "", told: set[str] | None = None) -> str:
    """Return the command for vlft, and everything that the user must know about it.

    Args:
        one: the run.
        config: the YAML that holds its flags; "" without one.
        told: what was already said about earlier runs of the file, and is not said again. Adds to it.
    """
    told = set() if told is None else told
    whose = {"vlft": "already for vlft", "": "the kit is not clear"}.get(one.kit, f"for {one.kit}")
    lines = [f"# {one.run.where}: {whose}"]
    if one.mixed:
        mixed = "; ".join(f"{kit}: {' '.join(names[:6])}" for kit, names in one.mixed.items())
        lines.append(f"# flags of several kits are mixed. Each one is translated by its own kit. {mixed}")
    lines += [f"# {line}" for line in one.notes[:1] if line == one.run.refused]
    lines.append(command(one, config))
    known = {"", *(item.why for item in one.fill_in)}
    changed = [(before, after if note in known else f"{after}   ({note})") for before, after, note in changes(one)]
    own = [as_written(name, words) for name, words in one.own_defaults.items()]
    parts: list[tuple[str, Iterable[str]]] = [
        ("fill in:", (f"--{item.flag} {item.value}: {item.why}" if item.value else item.why for item in one.fill_in)),
        ("no counterpart:", (f"{before}: {why}" for before, why in one.left_out)),
        ("note:", [note for note in one.notes if note != one.run.refused]),
        (f"defaults of {one.kit} that differ from vlft's, so they are set:", [" ".join(own)] if own else []),
        ("written differently here:", _arrows(changed)),
        ("no effect here:", (f"{before} ({why})" if why else before for before, why in one.idle)),
    ]
    for head, texts in parts:
        if texts := [text for text in texts if f"{head} {text}" not in told]:
            told |= {f"{head} {text}" for text in texts}
            lines += [head, *(f"  {text}" for text in texts)]
    return "\n".join(lines)


def _arrows(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(before) for before, _ in rows if len(before) <= COLUMN), default=0)
    lines = []
    for before, after in rows:
        lines += (
            [f"{before:<{width}}  ->  {after}"] if len(before) <= width else [before, f"{'':<{width}}  ->  {after}"]
        )
    return lines


def command(one: Settled, config: str = "") -> str:
    """Return the command line that starts the run, in several lines if it is long."""
    processes = one.processes or 1
    nodes = one.run.nodes if processes == one.run.processes and processes % one.run.nodes == 0 else 1
    launcher = f"torchrun {f'--nnodes {nodes} ' if nodes > 1 else ''}--nproc_per_node {processes // nodes} -m "
    start = f"{launcher if processes > 1 else ''}vlft train"
    return wrapped(start, {"config": (config,)} if config else one.flags, indent=4)


def as_yaml(one: Settled) -> str:
    """Return the flags as a YAML that `--config` takes, with comments for what must be filled in or is missing."""
    open_values = {item.flag: item.why for item in one.fill_in}
    lines = [f"# Translated from {one.run.where}" + (f" ({one.kit})" if one.kit not in ("", "vlft") else "")]
    for name, words in one.flags.items():
        value = _value(words)
        comment = "fill in: " + open_values[name] if name in open_values else ""
        comment = comment or (f"default of {one.kit}" if name in one.own_defaults else "")
        lines.append(f"{name}: {value}" + (f"  # {' '.join(comment.split())}" if comment else ""))
    lines += [
        f"# fill in {item.flag}: {' '.join(item.why.split())}" for item in one.fill_in if item.flag not in one.flags
    ]
    lines += [f"# no counterpart: {' '.join(f'{before}: {why}'.split())}" for before, why in one.left_out]
    return "\n".join(lines) + "\n"


def as_json(one: Settled, out: str = "") -> dict[str, Any]:
    """Return the run for the JSON document of `--json`."""
    return {
        "where": one.run.where,
        "kit": one.kit,
        "flags": {name: _plain(words) for name, words in one.flags.items()},
        "command": command(one, out),
        "processes": one.processes,
        "changes": [{"from": before, "to": after, "note": note} for before, after, note in changes(one)],
        "defaults": {name: _plain(words) for name, words in one.own_defaults.items()},
        "fill_in": [{"flag": item.flag, "value": item.value, "why": item.why} for item in one.fill_in],
        "no_counterpart": [{"flag": before, "why": why} for before, why in one.left_out],
        "no_effect": [{"flag": before, "why": why} for before, why in one.idle],
        "mixed": {kit: list(names) for kit, names in one.mixed.items()},
        "notes": list(one.notes),
        "out": out or None,
    }


def _value(words: Sequence[str]) -> str:
    if len(words) == 1:
        return _scalar(words[0])
    return "true" if not words else f"[{', '.join(_scalar(word, inside=True) for word in words)}]"


def _scalar(word: str, *, inside: bool = False) -> str:
    """Return a word as YAML that reads back as the same word, without quotes where that is possible."""
    import json

    loaded = _loaded(f"[{word}]" if inside else word)
    if inside:
        loaded = loaded[0] if isinstance(loaded, list) and len(loaded) == 1 else None
    same = loaded == word or (isinstance(loaded, bool) and word == str(loaded).lower())
    if not same and isinstance(loaded, int | float) and not isinstance(loaded, bool):
        try:
            same = float(word) == loaded
        except ValueError:  # 1:30 is a number in base 60 in YAML
            same = False
    return word if same else json.dumps(word, ensure_ascii=False)


def _loaded(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _plain(words: Sequence[str]) -> Any:
    """Return the value of a flag for JSON: a number or a bool where the word is one."""
    values = [_typed(word) for word in words]
    return True if not values else values[0] if len(values) == 1 else values


def _typed(word: str) -> Any:
    if word.lower() in ("true", "false"):
        return word.lower() == "true"
    for kind in (int, float):
        try:
            number = kind(word)
        except ValueError:
            continue
        if number == number and abs(number) < float("inf"):
            return number
    return word


def summary(runs: Sequence[Settled], remarks: Sequence[str], files: Mapping[int, str]) -> str:
    """Return the text for all runs of a file.

    Args:
        runs: the translated runs.
        remarks: what else was found in the file.
        files: index of a run -> the YAML that was written for it.
    """
    told: set[str] = set()
    blocks = [as_text(one, files.get(place, ""), told) for place, one in enumerate(runs)]
    if len(runs) > 1:
        blocks.insert(0, f"# {counted(len(runs), 'run')} in this file. What holds for several is said once")
    if remarks:
        blocks.append("\n".join(["not translated:", *(f"  {remark}" for remark in remarks)]))
    for place, path in files.items():
        then = "Fill in what is listed above, then" if runs[place].fill_in else "Next"
        blocks.append(f"written: {path}. {then}: vlft plan --config {quoted(path)}")
    return "\n\n".join(blocks)
