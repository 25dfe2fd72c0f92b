"""The command line of verbs that look at rows: data files as plain words, and every flag that `vlft train` takes.

Used by `vlft.cli.check_data` and `vlft.cli.preview`; imports transformers, so only inside their `parser`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from vlft.cli.command import add_json
from vlft.config.flags import DataFlags, ModelFlags, TrainFlags
from vlft.config.names import wrong_usage
from vlft.config.parse import FlagParser, Parsed

_OF_TRAINING = frozenset(f.name for f in dataclasses.fields(TrainFlags) if f.init)


class RowParser(FlagParser):
    """Parses DATA, data and model flags. Flags of training proper are taken too, and named as not looked at.

    So a train command, or the config.yaml of a run, can be checked as it stands.
    """

    def __init__(self, verb: str, **kwargs: Any) -> None:
        super().__init__(verb, (DataFlags, ModelFlags, TrainFlags), **kwargs)
        # Parsed, but never built: TrainingArguments would look for devices and join processes.
        self.dataclass_types = list(self.dataclass_types)[:2]
        for action in self._actions:
            if action.dest.removeprefix("no_") in _OF_TRAINING:
                action.help = argparse.SUPPRESS
        self.add_argument(
            "data",
            metavar="DATA",
            nargs="*",
            help="data: .json, .jsonl, .csv, .parquet, .tar, folders (or --data_path)",
        )
        add_json(self)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with DATA before, between or after the flags."""
        return self.parse_intermixed_args(args, namespace)


def data_files(verb: str, parsed: Parsed) -> list[str]:
    """The data files of a command line; says on stderr which flags are of training only.

    Raises:
        UsageError: no data file, or named both ways.
    """
    named = list(parsed.extra.data)
    every = parsed.flags[0].training_files
    if named and parsed.flags[0].data_mix is not None and not set(named) <= set(every):
        other = next(file for file in named if file not in every)
        raise wrong_usage(
            verb, f"{other} is none of the data files of --data_mix ({', '.join(every)}). Name one of them"
        )
    if not (files := named or every):
        raise wrong_usage(verb, "no data file: name a .json, .jsonl, .csv, .parquet or .tar, or a folder of a data set")
    if idle := sorted(parsed.given & _OF_TRAINING):
        print(f"not looked at here, training only: --{', --'.join(idle)}", file=sys.stderr)
    return files


MOST_ROWS = 200


def rows_in(text: str) -> list[int]:
    """`3,17,40-44` as numbers, each once, in the order given.

    Raises:
        ValueError: something else, a range that runs backwards, or more than `MOST_ROWS`.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first and last.isdigit():
            return [-int(last)]  # refused with how many rows there are
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{part.strip()!r} is no row")
        start, end = int(first), int(last or first)
        if end < start:
            raise ValueError(f"{part.strip()} runs backwards")
        if end - start >= MOST_ROWS or len(found) >= MOST_ROWS:
            raise ValueError(f"more than {MOST_ROWS} rows are too many to look at")
        found |= dict.fromkeys(range(start, end + 1))
    return list(found)
