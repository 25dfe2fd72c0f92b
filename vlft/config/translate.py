"""Translate a command line of another kit into flags of vlft, and find the flags that have no counterpart.

Neighbours: `vlft.config.kits` holds the tables, `vlft.config.door` builds the error message. Imports nothing heavy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from vlft.config.kinds import FALSE, Kind
from vlft.config.kits import ANYWHERE, KITS, grpo
from vlft.config.kits.adapters import UNSUPPORTED
from vlft.config.kits.common import REPLACED
from vlft.config.kits.features import by_feature
from vlft.config.kits.outcome import Becomes, Cannot, Idle, Kit, Outcome, filled_in
from vlft.config.kits.swift import from_environment
from vlft.config.names import mistyped
from vlft.config.said import Said, as_written, quoted, wrapped

#: A command line with at least this many flags of one kit is read as that kit's, with its defaults and meanings.
WHOSE = 3
#: No kit: the flags are those of vlft.
OURS = Kit(name="", rules={})


@dataclass(frozen=True, kw_only=True)
class Change:
    """One or more flags of another kit, and their translation.

    Attributes:
        said: the flags. Several if they have a meaning only together.
        outcome: their translation.
    """

    said: tuple[Said, ...]
    outcome: Outcome

    @property
    def before(self) -> str:
        return " ".join(map(str, self.said))


@dataclass(frozen=True, kw_only=True)
class Translation:
    """A translated command line.

    Attributes:
        kit: the kit that the line was written for; "" if that is not clear.
        flags: flags of vlft, name -> words, in the order in which they were given.
        changes: flags that are written differently in vlft.
        remarks: flags whose value has no effect in vlft.
        refusals: flags for something that vlft does not support.
        unknown: flags that no table lists.
    """

    kit: str
    flags: Mapping[str, tuple[str, ...]]
    changes: tuple[Change, ...]
    remarks: tuple[Change, ...]
    refusals: tuple[Change, ...]
    unknown: tuple[Said, ...]

    def command(self, verb: str, words: Sequence[str] = ()) -> str:
        """Return the command line for vlft, in several lines if it is long."""
        return wrapped(" ".join(["vlft", verb, *map(quoted, words)]), self.flags, indent=6)


def translate(
    said: Mapping[str, Said],
    kinds: Mapping[str, Kind],
    environ: Mapping[str, str] | None = None,
    *,
    kit: Kit | None = None,
    processes: int | None = None,
) -> Translation:
    """Translate each flag of a command line.

    Args:
        said: name -> the flag as it was given last.
        kinds: the flags of the verb in vlft.
        environ: the environment, from which ms-swift reads some settings.
        kit: the kit that the flags belong to; `OURS` if it is vlft; None: the one that has the most of them.
        processes: the number of processes of the run, for the size of a step; None if it is not known.
    """
    whole = kit is not None  # the flags are a whole run, so the kit's defaults count
    kit = kit_of(said, kinds) if kit is None else None if kit is OURS else kit
    order = [*([kit] if kit else []), *ANYWHERE, *(other for other in KITS if other is not kit)]
    settled: dict[str, Change] = {}
    values = {name: one.words for name, one in said.items() if name not in kinds or (kit and name in kit.names)}
    if kit is not None:
        settled |= _said_twice(said, kit)
    learns = grpo.asked({name: one.words for name, one in said.items()})
    if learns:
        settled |= _of_grpo(said, kinds)
    for one in [kit, *(other for other in KITS if other is not kit)] if kit else KITS:
        theirs = kit.names if kit is not None and one is not kit else frozenset()
        here = {
            _meant(name, one, values) if one is kit else name: name
            for name in values
            if name not in settled and name not in theirs
        }
        for rule in one.together:
            left = {name: values[written] for name, written in here.items() if written not in settled}
            found = rule(left)
            if found is not None:
                names = [here[name] for name in found[0]]
                change = Change(said=tuple(said[name] for name in names), outcome=_idle_if_given(found[1], said, names))
                settled |= dict.fromkeys(names, change)
    for name, flag in said.items():
        if name in settled or (learns and name in grpo.OURS):
            continue
        if (outcome := _outcome_of(flag, kinds, kit, order)) is not None:
            settled[name] = Change(said=(flag,), outcome=outcome)
    # With GRPO a micro-batch is not a pack: its size has the kits' own meaning.
    if not learns and (batch := _batch(said, settled, kit, processes, whole=whole)) is not None:
        settled |= {one.name: batch for one in batch.said}
    return _gathered(said, kinds, kit, settled, environ or {})


def _of_grpo(said: Mapping[str, Said], kinds: Mapping[str, Kind]) -> dict[str, Change]:
    """Translate the flags of a GRPO run that mean something else in other trainings."""
    rules = {name: grpo.rule_of(name) for name in said if name not in kinds}
    found = {name: rule(said[name].words) for name, rule in rules.items() if rule is not None}
    return {
        name: Change(said=(said[name],), outcome=_idle_if_given(outcome, said, [name]))
        for name, outcome in found.items()
    }


def kit_of(said: Collection[str], kinds: Collection[str], least: int = WHOSE) -> Kit | None:
    """Return the kit that has the most of the flags that vlft lacks; None if no kit has at least `least` of them."""
    shared = set(kinds).union(*(one.names for one in ANYWHERE))
    counts = [len((set(said) & kit.names) - shared) for kit in KITS]
    return KITS[counts.index(max(counts))] if max(counts) >= least else None


def _said_twice(said: Mapping[str, Said], kit: Kit) -> dict[str, Change]:
    """Return the flags of another kit that repeat, or contradict, a flag of this kit with the same meaning."""
    found = {}
    for name, own in kit.synonyms.items():
        if name in said and own in said and name not in kit.names:
            same = said[name].words == said[own].words
            why = f"{said[own]} " + ("says the same" if same else "says otherwise, and is used")
            found[name] = Change(said=(said[name],), outcome=Idle(why=why) if same else Cannot(why=why))
    return found


def _meant(name: str, kit: Kit, given: Collection[str]) -> str:
    """Return the kit's own flag for a flag of another kit with the same meaning, unless that is also given."""
    own = kit.synonyms.get(name, name)
    return name if name in kit.names or own in given else own


def _outcome_of(flag: Said, kinds: Mapping[str, Kind], kit: Kit | None, order: Sequence[Kit]) -> Outcome | None:
    """Translate a single flag. None if it is a flag of vlft that needs no change, or if it is unknown."""
    if flag.name == "deepspeed" and (preset := _preset(flag.word)):
        if preset == "zero0":
            return Idle(why="without ZeRO every process holds the whole state, as without --deepspeed")
        return Becomes(flags={"deepspeed": (preset,)})
    name, words = flag.name, flag.words
    if name in kinds and not (kit and name in kit.rules):
        return None
    bare = name.removeprefix("no_")
    if bare != name and bare not in kinds and bare in REPLACED:
        name, words = bare, ("false",)
    for one in order:
        if name in one.rules and (name not in kinds or one is kit):
            outcome = one.rules[name](words)
            same = isinstance(outcome, Becomes) and dict(outcome.flags) == {name: words}
            return None if same else outcome
    rule = UNSUPPORTED.get(name)
    if rule is None and name not in kinds and not mistyped(name, kinds):
        rule = by_feature(name)
    return None if rule is None or name in kinds else rule(words)


def _preset(path: str) -> str:
    """Return the preset for a kit's DeepSpeed file that does not exist: `scripts/zero3.json` -> `zero3`; else ""."""
    if path.lower() in ("zero0", "z0"):
        return "zero0"
    if os.path.exists(path) or not path.endswith(".json"):
        return ""
    stage = re.search(r"z(?:ero)?_?([0123])", os.path.basename(path).lower())
    offload = "_offload" if "offload" in path.lower() and stage and stage[1] in "23" else ""
    return f"zero{stage[1]}{offload}" if stage else ""


def _idle_if_given(outcome: Outcome, said: Mapping[str, Said], names: Collection[str]) -> Outcome:
    """Replace the outcome by `Idle` if other flags of the command line than these already say the same to vlft."""
    if (
        isinstance(outcome, Becomes)
        and not set(outcome.flags) & set(names)
        and all(name in said and said[name].words == words for name, words in outcome.flags.items())
    ):
        return Idle(why=f"{_flags(outcome.flags)} sets it")
    return outcome


def _batch(
    said: Mapping[str, Said], settled: Mapping[str, Change], kit: Kit | None, processes: int | None, *, whole: bool
) -> Change | None:
    """Translate rows of a micro-batch x accumulation into `--global_batch`, because in vlft a micro-batch is a pack."""
    sizes = ["per_device_train_batch_size", "micro_batch_size", "per_device_batch_size"]
    if "gradient_accumulation_steps" in said and not set(sizes) & set(said):
        sizes.append("batch_size")  # beside accumulation it means a micro-batch
    names = [name for name in (*sizes, "gradient_accumulation_steps") if name in said]
    unpacked = "packing" in said and "packing" not in settled and said["packing"].word.lower() in FALSE
    foreign = bool(whole and kit) or any(not isinstance(change.outcome, Idle) for change in settled.values())
    others = [name for name in ("per_device_eval_batch_size",) if name in said and (names or kit)]
    if unpacked or not foreign or not names + others:
        return None
    if "global_batch" in said or any(
        _sets(change, "global_batch") for name, change in settled.items() if name not in names
    ):
        why = "--global_batch sets the rows of a step"
        return Change(said=tuple(said[name] for name in (*names, *others)), outcome=Idle(why=why)) if whole else None
    if not names and not whole:
        return Change(
            said=tuple(said[name] for name in others), outcome=Idle(why="evaluation is packed as training is")
        )
    if kit is None and all(said[name].word == "1" for name in names if name in sizes):
        return None
    given = {name: said[name].word for name in names}
    if not whole and not all(word.isdigit() for word in given.values()):
        return None
    rows = next((given[name] for name in sizes if name in given), str(kit.batch[0]) if kit and whole else "1")
    outcome = step_rows(rows, given.get("gradient_accumulation_steps"), kit if whole else None, processes)
    return Change(said=tuple(said[name] for name in (*names, *others)), outcome=outcome)


def _sets(change: Change, name: str) -> bool:
    return isinstance(change.outcome, Becomes) and name in change.outcome.flags


def step_rows(rows: str, accumulation: str | None, kit: Kit | None, processes: int | None) -> Becomes:
    """Return `--global_batch` for the rows of a step.

    Args:
        rows: rows of a micro-batch on one device. It may be a placeholder.
        accumulation: micro-batches of a step; None: the kit's default.
        kit: the kit whose defaults count; None: 1.
        processes: number of processes; None: unknown.
    """
    if accumulation is None:
        own = kit.batch[1] if kit else 1
        accumulation = "1" if not rows.isdigit() else str(own or max(1, -(-16 // (int(rows) * (processes or 1)))))
    if not (rows.isdigit() and accumulation.isdigit()):
        names = "_x_".join(word.strip("<>") or "?" for word in (rows, accumulation, str(processes or "GPUS")))
        return Becomes(flags={"global_batch": (filled_in(names),)}, note="rows of an optimizer step over all GPUs")
    note = "" if processes else "for one GPU: multiply it by the number of GPUs"
    return Becomes(flags={"global_batch": (str(int(rows) * int(accumulation) * (processes or 1)),)}, note=note)


def _gathered(
    said: Mapping[str, Said],
    kinds: Mapping[str, Kind],
    kit: Kit | None,
    settled: Mapping[str, Change],
    environ: Mapping[str, str],
) -> Translation:
    flags: dict[str, tuple[str, ...]] = {}
    unknown = []
    for name, one in said.items():
        if name in settled:
            outcome = settled[name].outcome
            if isinstance(outcome, Becomes):
                for new, words in outcome.flags.items():
                    # A flag of vlft in the command line wins. Of two kits the one that the line was written for wins.
                    if (new not in said or new in settled) and not (new in flags and _foreign(settled[name], kit)):
                        flags[new] = words
        elif name in kinds or (name.removeprefix("no_") in kinds and name not in kinds):
            flags[name] = one.words
        else:
            unknown.append(one)
    changes = list({id(change): change for change in settled.values()}.values())
    if kit is not None and kit.name == "ms-swift":
        for variable, value, outcome in from_environment(environ, "".join(flags.get("model_id", ()))):
            added = {name: words for name, words in outcome.flags.items() if name not in flags}
            flags |= added
            there = (Said(name=variable, words=(value,)),)
            changes += [Change(said=there, outcome=Becomes(flags=added, note=outcome.note))] if added else []
    return Translation(
        kit=kit.name if kit else "",
        flags=flags,
        changes=tuple(one for one in changes if isinstance(one.outcome, Becomes)),
        remarks=tuple(one for one in changes if isinstance(one.outcome, Idle)),
        refusals=tuple(one for one in changes if isinstance(one.outcome, Cannot)),
        unknown=tuple(unknown),
    )


def _foreign(change: Change, kit: Kit | None) -> bool:
    return kit is not None and not any(one.name in kit.names for one in change.said)


def overridden(told: Translation, change: Change) -> str:
    """Return the flags whose value in a translation comes from another flag of the file than this one; "" if none."""
    if not isinstance(change.outcome, Becomes):
        return ""
    others = {
        name: told.flags[name]
        for name, words in change.outcome.flags.items()
        if name in told.flags and told.flags[name] != words and name != "eval_strategy"
    }
    return _flags(others)


def _flags(flags: Mapping[str, tuple[str, ...]]) -> str:
    return " ".join(as_written(name, words) for name, words in flags.items())


def shown(change: Change) -> str:
    """Return the translation as text: the flags of vlft with a note, or the reason."""
    outcome = change.outcome
    if isinstance(outcome, Becomes):
        return _flags(outcome.flags) + (f"   ({outcome.note})" if outcome.note else "")
    return outcome.why
