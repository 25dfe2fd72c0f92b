"""The command line of verbs that read rows: data files as plain words, and every flag of `vlft train`.

`vlft.cli.check_data` and `vlft.cli.preview` use it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping
from typing import Any

from vlft.cli.command import add_json
from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.names import wrong_usage
from vlft.config.parse import FlagParser, Parsed
from vlft.config.table import TRAIN


def _row_types(values: Mapping[str, Any], extra: argparse.Namespace) -> tuple[type, ...]:
    return DataFlags, ModelFlags


class RowParser(FlagParser):
    """Parse DATA and the flags of data and model. Flags of training are accepted, and reported as without effect.

    So the words of a train command, or the config.yaml of a run, can be used unchanged.
    """

    def __init__(self, verb: str, **kwargs: Any) -> None:
        super().__init__(verb, _row_types, helped=(DataFlags, ModelFlags), **kwargs)
        self.add_argument(
            "data",
            metavar="DATA",
            nargs="*",
            help="data: .json, .jsonl, .csv, .parquet, .tar, folders (or --data_path)",
        )
        add_json(self)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, with DATA before, between or after the flags."""
        return self.parse_intermixed_args(args, namespace)


def data_files(verb: str, parsed: Parsed, *, acting: Collection[str] = ()) -> list[str]:
    """Return the data files of a command line. Prints on stderr which flags act in training only.

    Args:
        verb: the verb's name.
        parsed: its command line.
        acting: flags of training that the verb uses too.

    Raises:
        UsageError: there is no data file, or a file is not in `--data_mix`.
    """
    named = list(parsed.extra.data)
    every = parsed.flags[0].training_files
    if named and parsed.flags[0].data_mix is not None and not set(named) <= set(every):
        other = next(file for file in named if file not in every)
        raise wrong_usage(
            verb, f"{other} is none of the data files of --data_mix ({', '.join(every)}). Use one of them"
        )
    if not (files := named or every):
        raise wrong_usage(verb, "no data file: pass a .json, .jsonl, .csv, .parquet or .tar, or a folder of a data set")
    say_idle(parsed, acting=acting)
    return files


def say_idle(parsed: Parsed, *, acting: Collection[str] = ()) -> None:
    """Print on stderr which flags of the command line act in training only. A YAML is that of a run, and has many.

    Args:
        parsed: a command line.
        acting: flags of training that the verb uses too.
    """
    if idle := sorted((parsed.typed & set(TRAIN)) - set(acting)):
        print(f"no effect here, training only: --{', --'.join(idle)}", file=sys.stderr)


MOST_ROWS = 200


def rows_in(text: str) -> list[int]:
    """Return the numbers of `3,17,40-44`, each once, in the order given.

    Raises:
        ValueError: the text has another form, a range is reversed, or there are more than `MOST_ROWS` rows.
    """
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first and last.isdigit():
            return [-int(last)]  # refused later, with the number of rows
        if not first.isdigit() or (dash and not last.isdigit()):
            raise ValueError(f"{part.strip()!r} is not a row number")
        start, end = int(first), int(last or first)
        if end < start:
            raise ValueError(f"{part.strip()} is reversed")
        if end - start >= MOST_ROWS or len(found) >= MOST_ROWS:
            raise ValueError(f"more than {MOST_ROWS} rows are too many for a preview")
        found |= dict.fromkeys(range(start, end + 1))
    return list(found)
