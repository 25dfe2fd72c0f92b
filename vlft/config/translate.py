"""A command line of another kit as one of ours: each flag by its value, and what has no counterpart.

Neighbours: `vlft.config.kits` holds the tables, `vlft.config.door` refuses with what this finds. Imports nothing heavy.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlft.config.kinds import FALSE, Kind
from vlft.config.kits import ANYWHERE, KITS
from vlft.config.kits.common import REPLACED
from vlft.config.kits.outcome import Becomes, Cannot, Idle, Kit, Outcome
from vlft.config.kits.swift import ENVIRONMENT
from vlft.config.said import Said, quoted

#: So many flags of one kit make a line that kit's, and say what its defaults and shared names mean.
WHOSE = 3
WIDTH = 110


@dataclass(frozen=True, kw_only=True)
class Change:
    """Flags of another kit, side by side where they only mean something together, and what they are here."""

    said: tuple[Said, ...]
    outcome: Outcome

    @property
    def before(self) -> str:
        return " ".join(map(str, self.said))


@dataclass(frozen=True, kw_only=True)
class Translation:
    """What a line of flags is here.

    Attributes:
        kit: whose line it looks like; "" where that is not plain.
        flags: ours, name -> words, in the order in which they were said.
        changes: flags with another form here.
        remarks: flags whose value changes nothing here.
        refusals: flags that ask for what vlft does not do.
        unknown: flags that no table knows.
    """

    kit: str
    flags: Mapping[str, tuple[str, ...]]
    changes: tuple[Change, ...]
    remarks: tuple[Change, ...]
    refusals: tuple[Change, ...]
    unknown: tuple[Said, ...]

    def command(self, verb: str, words: Sequence[str] = ()) -> str:
        """The command line of ours, in lines of a page's width."""
        parts = [" ".join([f"--{name}", *map(quoted, said)]) for name, said in self.flags.items()]
        lines = [" ".join(["vlft", verb, *map(quoted, words)])]
        for part in parts:
            if len(lines[-1]) + len(part) > WIDTH:
                lines.append(part)
            else:
                lines[-1] += f" {part}"
        return " \\\n      ".join(lines)


def translate(
    said: Mapping[str, Said], kinds: Mapping[str, Kind], environ: Mapping[str, str] | None = None
) -> Translation:
    """Say each flag of a line as vlft says it.

    Args:
        said: name -> the flag as it was given last.
        kinds: the flags there are here.
        environ: of the process; ms-swift takes some settings from there.
    """
    kit = _whose(said, kinds)
    order = [*([kit] if kit else []), *ANYWHERE, *(other for other in KITS if other is not kit)]
    settled: dict[str, Change] = {}
    values = {name: one.words for name, one in said.items() if name not in kinds or (kit and name in kit.names)}
    for one in [kit, *(other for other in KITS if other is not kit)] if kit else KITS:
        for rule in one.together:
            left = {name: words for name, words in values.items() if name not in settled}
            found = rule(left)
            if found is not None:
                change = Change(said=tuple(said[name] for name in found[0]), outcome=_beside(found[1], said))
                settled |= dict.fromkeys(found[0], change)
    for name, flag in said.items():
        if name not in settled and (outcome := _alone(flag, kinds, kit, order)) is not None:
            settled[name] = Change(said=(flag,), outcome=outcome)
    if (batch := _batch(said, settled, kit)) is not None:
        settled |= {one.name: batch for one in batch.said}
    return _gathered(said, kinds, kit, settled, environ or {})


def _whose(said: Mapping[str, Said], kinds: Mapping[str, Kind]) -> Kit | None:
    """The kit that has most of the flags that are not ours; None where no kit has enough of them."""
    shared = set(kinds).union(*(one.names for one in ANYWHERE))
    counts = [len((set(said) & kit.names) - shared) for kit in KITS]
    return KITS[counts.index(max(counts))] if max(counts) >= WHOSE else None


def _alone(flag: Said, kinds: Mapping[str, Kind], kit: Kit | None, order: Sequence[Kit]) -> Outcome | None:
    """What a flag is by itself; None for one of ours that says what it says, and for one that nobody knows."""
    if flag.name == "deepspeed" and (preset := _preset(flag.word)):
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
    return None


def _preset(path: str) -> str:
    """Our name of a kit's DeepSpeed file that is not here: `scripts/zero3.json`, `ds_z2_offload_config.json`."""
    if os.path.exists(path) or not path.endswith(".json"):
        return ""
    stage = re.search(r"z(?:ero)?_?([123])", os.path.basename(path).lower())
    offload = "_offload" if "offload" in path.lower() and stage and stage[1] != "1" else ""
    return f"zero{stage[1]}{offload}" if stage else ""


def _beside(outcome: Outcome, said: Mapping[str, Said]) -> Outcome:
    """Idle where our own flags stand beside it and say the same already."""
    if isinstance(outcome, Becomes) and all(
        name in said and said[name].words == words for name, words in outcome.flags.items()
    ):
        return Idle(why=f"{_flags(outcome.flags)} says it")
    return outcome


def _batch(said: Mapping[str, Said], settled: Mapping[str, Change], kit: Kit | None) -> Change | None:
    """Rows of a micro-batch x accumulation as `--global_batch`, since a micro-batch is a pack here."""
    sizes = ("per_device_train_batch_size", "micro_batch_size")
    names = [name for name in (*sizes, "gradient_accumulation_steps") if name in said]
    unpacked = "packing" in said and "packing" not in settled and said["packing"].word.lower() in FALSE
    foreign = any(not isinstance(change.outcome, Idle) for change in settled.values())
    if not names or unpacked or not foreign or "global_batch" in said:
        return None
    try:
        product = 1
        for name in names:
            product *= int(said[name].word)
    except ValueError:
        return None
    if kit is None and all(said[name].word == "1" for name in names if name in sizes):
        return None
    names += [name for name in ("per_device_eval_batch_size",) if name in said]
    return Change(
        said=tuple(said[name] for name in names),
        outcome=Becomes(flags={"global_batch": (str(product),)}, note="of one GPU: multiply it by the number of GPUs"),
    )


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
                    if new not in said or new in settled:  # what is said in our own words stands
                        flags[new] = words
        elif name in kinds or (name.removeprefix("no_") in kinds and name not in kinds):
            flags[name] = one.words
        else:
            unknown.append(one)
    changes = list({id(change): change for change in settled.values()}.values())
    if kit is not None and kit.name == "ms-swift":
        for variable, flag in ENVIRONMENT.items():
            if variable in environ and flag not in flags:
                words = (environ[variable],)
                flags[flag] = words
                one = Said(name=variable, words=words)
                changes.append(Change(said=(one,), outcome=Becomes(flags={flag: words}, note="of the environment")))
    return Translation(
        kit=kit.name if kit else "",
        flags=flags,
        changes=tuple(one for one in changes if isinstance(one.outcome, Becomes)),
        remarks=tuple(one for one in changes if isinstance(one.outcome, Idle)),
        refusals=tuple(one for one in changes if isinstance(one.outcome, Cannot)),
        unknown=tuple(unknown),
    )


def _flags(flags: Mapping[str, tuple[str, ...]]) -> str:
    return " ".join(" ".join([f"--{name}", *map(quoted, words)]) for name, words in flags.items())


def shown(change: Change) -> str:
    """What a change says, behind an arrow or a colon."""
    outcome = change.outcome
    if isinstance(outcome, Becomes):
        return _flags(outcome.flags) + (f"   ({outcome.note})" if outcome.note else "")
    return outcome.why
