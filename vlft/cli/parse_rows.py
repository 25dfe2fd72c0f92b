"""The command line of verbs that look at rows: data files as plain words, and every flag that `vlft train` takes.

Used by `vlft.cli.check_data` and `vlft.cli.preview`; imports transformers, so only inside their `run`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from vlft.config.flags import DataFlags, ModelFlags, TrainFlags
from vlft.config.parse import FlagParser, Parsed


class RowParser(FlagParser):
    """Parses DATA, data and model flags. Flags of training proper are taken too, and named as not looked at.

    So a train command, or the config.yaml of a run, can be checked as it stands.
    """

    def __init__(self, verb: str, **kwargs: Any) -> None:
        super().__init__(verb, (DataFlags, ModelFlags, TrainFlags), **kwargs)
        # Parsed, but never built: TrainingArguments would look for devices and join processes.
        self.dataclass_types = list(self.dataclass_types)[:2]
        self._of_training = {f.name for f in dataclasses.fields(TrainFlags) if f.init}
        for action in self._actions:
            if action.dest.removeprefix("no_") in self._of_training:
                action.help = argparse.SUPPRESS
        self.add_argument(
            "data",
            metavar="DATA",
            nargs="*",
            help="data: .json, .jsonl, .csv, .parquet, .tar, folders (or --data_path)",
        )
        self.add_argument("--json", action="store_true", help="print one JSON document instead of text")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, with DATA before, between or after the flags."""
        return self.parse_intermixed_args(args, namespace)

    def parse_files(self, argv: Sequence[str]) -> tuple[list[str], Parsed]:
        """The data files and the flags; says on stderr which flags are of training only.

        Raises:
            UsageError: no data file, or named both ways; and as `parse`.
        """
        parsed = self.parse(argv)
        named = list(parsed.extra.data)
        every = parsed.flags[0].training_files
        if named and parsed.flags[0].data_mix is not None and not set(named) <= set(every):
            other = next(file for file in named if file not in every)
            self.error(f"{other} is none of the data files of --data_mix ({', '.join(every)}). Name one of them")
        files = named or every
        if not files:
            self.error("no data file: name a .json, .jsonl, .csv, .parquet or .tar, or a folder of a data set")
        if idle := sorted(parsed.given & self._of_training):
            print(f"not looked at here, training only: --{', --'.join(idle)}", file=sys.stderr)
        return files, parsed
