"""Translate a run into flags that `vlft.config.door` accepts, and list what has no counterpart.

To the translation of the flags (`vlft.config.translate`) it adds the kit's own defaults where they differ from vlft's,
and it leaves out flags that could not act here. Neighbours: `documents` has the runs, `written` prints the result.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vlft.config import grpo, preference, variants
from vlft.config.checks import OF_ADAPTER, contradictions
from vlft.config.kinds import Bool, Kind, Place
from vlft.config.kits import ANYWHERE, KITS
from vlft.config.kits.outcome import Becomes, Cannot, Idle, Kit
from vlft.config.migrate.clips import as_limits_of_clips
from vlft.config.migrate.documents import Run
from vlft.config.migrate.effects import SIZES, Flags, adjusted, without_effect
from vlft.config.names import mistyped
from vlft.config.rewards import ELSEWHERE
from vlft.config.said import Said, as_written, placeholders
from vlft.config.table import kinds
from vlft.config.translate import OURS, Translation, kit_of, overridden, step_rows, translate
from vlft.config.values import DEFAULTS, Values


@dataclass(frozen=True, kw_only=True)
class ToFill:
    """A value that the user must still set.

    Attributes:
        flag: the flag.
        value: the value as it is: a placeholder, or a path that does not exist here.
        why: why it is not known, or what is missing.
    """

    flag: str
    value: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Settled:
    """A translated run.

    Attributes:
        run: the run.
        kit: its kit's name; "" if that is not clear, `vlft` for our own.
        processes: its number of processes; None if that is not known.
        told: the translation of its flags.
        flags: the flags of vlft for it, name -> words.
        own_defaults: those of `flags` that are defaults of the kit, and are not in the file.
        left_out: (flag as written, why): flags that have no counterpart.
        idle: (flag as written, why): flags without an effect.
        fill_in: what the user must still set.
        mixed: kit -> its flags, if the file mixes flags of several kits.
        notes: everything else that the user must know.
    """

    run: Run
    kit: str
    processes: int | None
    told: Translation
    flags: Mapping[str, tuple[str, ...]]
    own_defaults: Mapping[str, tuple[str, ...]]
    left_out: tuple[tuple[str, str], ...]
    idle: tuple[tuple[str, str], ...]
    fill_in: tuple[ToFill, ...]
    mixed: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def settle(run: Run, gpus: int | None) -> Settled:
    """Translate a run.

    Args:
        run: the run.
        gpus: the number of processes that the user names; None: the one that the file names, if it does.
    """
    known = kinds("train")
    said = {one.name: one for one in run.flags}
    kit = run.kit if run.kit is not None else kit_of(said, known, least=1)
    processes = gpus or run.processes
    told = translate(said, known, run.environment, kit=kit or OURS, processes=processes)
    flags: Flags = dict(told.flags)
    left_out = [(change.before, change.outcome.why) for change in told.refusals if isinstance(change.outcome, Cannot)]
    left_out += [(str(one), _unknown(one.name, known)) for one in told.unknown]
    idle = [(change.before, change.outcome.why) for change in told.remarks if isinstance(change.outcome, Idle)]
    _drop_wrong(flags, known, said, left_out)
    sure = run.kit is not None and run.kit is not OURS
    own_defaults = _defaults(run.kit, said, flags, processes) if sure and run.kit is not None else {}
    flags |= own_defaults
    for name, why in without_effect(flags):
        if name in own_defaults:
            del own_defaults[name]
        else:
            idle.append((as_written(name, flags[name]), why))
        del flags[name]
    notes = [*run.notes, *_clashes(told), *(as_limits_of_clips(flags) if kit is not None else [])]
    notes += adjusted(flags)
    own_defaults = {name: flags[name] for name in own_defaults if name in flags}
    if run.refused:
        notes.insert(0, run.refused)
    if kit is not None and kit.remark and sure and "method" not in flags:
        notes.append(kit.remark)
    if kit is not None and kit is not OURS and any(".py:" in word for word in flags.get("reward", ())):
        notes.append(f"a function of --reward gets the columns of its row by name: {ELSEWHERE}")
    _complete_evaluation(flags)
    if not gpus and run.counted and flags.get("global_batch", ("",))[0].isdigit() and (run.processes or 1) > 1:
        notes.append(f"global_batch counts {run.processes} processes ({run.counted})")
    if run.nodes > 1 and not gpus:
        notes.append(f"start it on each of the {run.nodes} nodes, with --node_rank, --master_addr and --master_port")
    fill_in = list(_to_fill(flags, known, run, told))
    # What contradicts something is left to the user, unless a flag is missing.
    sound = {
        name: tuple(known[name].value(word) for word in words)
        for name, words in flags.items()
        if name in known and not any(known[name].problem(word) for word in words)
    }
    needed = {one.flag for one in fill_in}
    for text in contradictions(Values(sound), "train"):
        name = text.removeprefix("--").partition(" ")[0]
        if name == "deepspeed" and "deepspeed" in flags:
            value = " ".join(flags["deepspeed"])
            fill_in.append(ToFill(flag=name, value=value, why=text.partition(": ")[2]))
        elif "is missing" in text and name not in flags:
            fill_in.append(ToFill(flag=name, value="", why=text))
        elif name not in needed and "no such model folder" not in text:
            notes.append(f"still to settle: {text}")
    return Settled(
        run=run,
        kit="vlft" if run.kit is OURS or (kit is None and not told.changes) else kit.name if kit else "",
        processes=processes,
        told=told,
        flags=flags,
        own_defaults=own_defaults,
        left_out=tuple(left_out),
        idle=tuple(idle),
        fill_in=tuple(fill_in),
        mixed=_mixed(said, kit, known),
        notes=tuple(notes),
    )


def _unknown(name: str, known: Mapping[str, Kind]) -> str:
    meant = mistyped(name, known)
    return "vlft has no such flag" + (f". If --{meant} is meant, correct the name in the file" if meant else "")


def _drop_wrong(
    flags: Flags, known: Mapping[str, Kind], said: Mapping[str, Said], left_out: list[tuple[str, str]]
) -> None:
    """Leave out values that vlft does not take, such as an optimizer that it does not have."""
    for name, words in list(flags.items()):
        kind = known.get(name)
        if kind is None:
            continue
        if (isinstance(kind, Bool) or kind.many == "maybe") and not words:
            flags[name] = words = ("true",)
        if not words and kind.many in ("one", "some"):
            left_out.append((f"--{name}", "its value is missing"))
            del flags[name]
            continue
        if kind.many in ("one", "maybe") and len(words) > 1:
            left_out.append((as_written(name, words[1:]), f"--{name} takes one value; the first one is kept"))
            words = flags[name] = words[:1]
        problems = [kind.problem(word) for word in words if kind.angled or not placeholders(word)]
        problem = next((one for one in problems if one is not None and "is not installed" not in one.text), None)
        if problem is not None:
            left_out.append((as_written(name, words), problem.text or "empty"))
            del flags[name]
        elif name == "fp16" and words and kind.value(words[0]):
            left_out.append(
                (as_written(name, words), "Qwen-VL's activations overflow float16: bf16 is used where it can be")
            )
            del flags[name]


def _defaults(kit: Kit, said: Mapping[str, Said], flags: Flags, processes: int | None) -> Flags:
    """Return the kit's defaults that change what is trained, for flags that are not set."""
    given = {name: one.words for name, one in said.items()}
    found = {name: words for name, words in kit.defaults(given, flags).items() if name not in flags}
    if "adapter" in flags:
        decided = {*OF_ADAPTER, "bits", "quant_type", "double_quant", "language_blocks", "vision_blocks"}
        found = {name: words for name, words in found.items() if name not in decided}
    if flags.get("method") == ("grpo",):
        found |= _completions(kit, flags, processes)
    elif not any(name in flags for name in SIZES):
        found |= step_rows(str(kit.batch[0]), None, kit, processes).flags
    last = {name: words[-1] for name, words in (flags | found).items() if words}
    ours = dict(DEFAULTS) | preference.defaults(last) | grpo.defaults(last) | variants.defaults(last)
    if "num_train_epochs" in ours and not {"num_train_epochs", "max_steps"} & set(flags | found):
        found["num_train_epochs"] = ("3",)  # that of TrainingArguments; ours depends on the method
    return {name: words for name, words in found.items() if name not in ours or str(ours[name]) != words[0]}


def _completions(kit: Kit, flags: Flags, processes: int | None) -> Flags:
    """Return the completions of a micro-batch and the micro-batches of a step by a kit's defaults, where not set."""
    size, accumulation = flags.get("per_device_train_batch_size", (str(kit.batch[0]),))[0], kit.batch[1]
    found: Flags = {"per_device_train_batch_size": (size,)}
    if accumulation is None and size.isdigit():
        found["gradient_accumulation_steps"] = (str(max(1, -(-16 // (int(size) * (processes or 1))))),)
    return {name: words for name, words in found.items() if name not in flags and "global_batch" not in flags}


def _complete_evaluation(flags: Flags) -> None:
    """Set when to evaluate and by what to compare, where the file says how often but not what."""
    if "eval_path" not in flags and "eval_split" not in flags:
        return
    if "eval_steps" in flags and flags.get("eval_strategy") == ("epoch",):
        flags["eval_strategy"] = ("steps",)
    if flags.get("save_strategy") == ("best",) or "early_stopping_patience" in flags:
        flags.setdefault("metric_for_best_model", ("eval_loss",))


def _clashes(told: Translation) -> list[str]:
    """Return a note for each flag whose value another flag of the file overrides."""
    return [
        f"{change.before} is overridden: another flag of the file sets {others}"
        for change in told.changes
        if (others := overridden(told, change))
    ]


def _to_fill(flags: Flags, known: Mapping[str, Kind], run: Run, told: Translation) -> Iterator[ToFill]:
    notes = {
        name: change.outcome.note
        for change in told.changes
        if isinstance(change.outcome, Becomes)
        for name in change.outcome.flags
    }
    for name, words in flags.items():
        kind = known.get(name)
        for word in words:
            if not (kind and kind.angled) and (empty := placeholders(word)):
                why = next((run.why[one] for one in empty if one in run.why), notes.get(name) or "not known")
                yield ToFill(flag=name, value=word, why=why)
            elif isinstance(kind, Place) and kind.of in ("file", "folder", "either") and word not in kind.words:
                if not os.path.exists(word) and not any(sign in word for sign in "*?["):
                    why = "does not exist here"
                    if name == "eval_path":
                        why = notes.get(name) or why
                    yield ToFill(flag=name, value=word, why=why)
            elif (
                name == "model_id"
                and (word.startswith(("/", ".", "~")) or word.count("/") > 1)
                and not os.path.exists(os.path.expanduser(word))
            ):
                yield ToFill(
                    flag=name, value=word, why="no such model folder here; a hub id such as Qwen/... also works"
                )
            elif kind is not None and (problem := kind.problem(word)) is not None:
                yield ToFill(flag=name, value=word, why=problem.text)


def _mixed(said: Mapping[str, Said], kit: Kit | None, known: Mapping[str, Kind]) -> dict[str, tuple[str, ...]]:
    """Return kit -> flags if the flags are of several kits. One stray flag without a mark of its kit does not count."""
    if kit is None:
        return {}
    shared = set(known).union(*(one.names for one in ANYWHERE))
    own = [name for name in said if name in kit.names - shared]
    left = set(said) - shared - kit.names
    found = {}
    for other in KITS:
        names = tuple(name for name in said if name in left & other.names)
        if other is not kit and (len(names) > 1 or set(names) & other.marks):
            found[other.name] = names
            left -= set(names)
    return {kit.name: tuple(own), **found} if found else {}


def changes(settled: Settled) -> Iterator[tuple[str, str, str]]:
    """Yield (flags as written, flags of vlft, note) for each flag that is written differently in vlft."""
    for change in settled.told.changes:
        outcome = change.outcome
        if isinstance(outcome, Becomes) and not overridden(settled.told, change):  # `_clashes` notes those
            kept = {name: settled.flags[name] for name in outcome.flags if name in settled.flags}
            if kept:
                yield change.before, " ".join(as_written(*one) for one in kept.items()), outcome.note
