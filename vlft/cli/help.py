"""Help from stored texts, so that `--help` and wrong flags do not wait seconds for transformers to load.

`help/VERB.txt` is the output of the verb's own parser for `--help`. For a verb with the flags of train it lists the
common flags, and `help/VERB-all.txt` lists every flag, for `--help all`. The files show each change of the command line
in a diff; a test compares them with the parsers. Most flags come from transformers, so the texts are valid only for the
version they were written with. With another version the verbs' parsers answer.

    python -m vlft.cli.help         writes them again
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vlft.cli.verbs import VERBS, Verb
from vlft.config import door, table
from vlft.config.kinds import Bool, Word
from vlft.config.names import help_asked, wrong_usage

FOLDER = Path(__file__).parent / "help"
WIDTH = 100  # columns


def answer(verb: Verb, argv: Sequence[str]) -> str | None:
    """Return the verb's help if argv asks for it, else None.

    Raises:
        UsageError: a flag in argv is unknown, or argv is empty and the verb needs data.
        ConfigError: the value of a flag in argv cannot be carried out.
    """
    asked = help_asked(argv)
    if asked:
        return _text(verb, every=asked == "all") if _holds() else None
    if not argv and verb.needs_data:
        raise wrong_usage(verb.name, "no data file and no model are set. Examples are at the end of its help")
    if verb.name in table.VERBS:
        door.check(verb.name, argv, names(verb))
    return None


def names(verb: Verb) -> set[str]:
    """Return the names of the verb's flags with `_` for `-`, and their `no_` forms."""
    kinds = table.kinds(verb.name)
    return {*kinds, *(f"no_{name}" for name, kind in kinds.items() if isinstance(kind, Bool) and kind.many == "maybe")}


def flags(verb: Verb) -> dict[str, list[str]]:
    """Return the names of the verb's flags, each with its valid words; an empty list if any value is valid."""
    if verb.name in table.VERBS:
        kinds = table.kinds(verb.name).items()
        return {name: list(kind.words) if isinstance(kind, Word) else [] for name, kind in kinds}
    listed = re.findall(r"^  (?:-\w, )?--(\w[\w-]*)(?: \{([^}]*)\})?", _text(verb, every=True), re.M)
    return {name: words.split(",") if words else [] for name, words in listed}


def texts() -> Iterator[tuple[str, Verb, bool]]:
    """Yield for each stored text the name of its file, its verb, and whether it lists every flag."""
    for verb in VERBS.values():
        for every in (False, True) if verb.train_flags else (False,):
            yield _name(verb, every), verb, every


def printed(verb: Verb, *, every: bool) -> str:
    """Return what the verb's own parser prints for `--help` or `--help all`. The variable COLUMNS sets its width."""
    run = importlib.import_module(verb.module).run
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run(["--help", "all"] if every else ["--help"])
    return out.getvalue()


def write() -> None:
    """Write all texts again, for the installed version of transformers."""
    os.environ["COLUMNS"] = str(WIDTH)
    FOLDER.mkdir(exist_ok=True)
    for name, verb, every in texts():
        (FOLDER / name).write_text(printed(verb, every=every), encoding="utf-8")
    (FOLDER / "transformers.txt").write_text(version("transformers") + "\n", encoding="utf-8")


def _holds() -> bool:
    """Whether the texts were written for the installed version of transformers."""
    try:
        return (FOLDER / "transformers.txt").read_text(encoding="utf-8").strip() == version("transformers")
    except (OSError, PackageNotFoundError):
        return False


def _name(verb: Verb, every: bool) -> str:
    return f"{verb.name}-all.txt" if every and verb.train_flags else f"{verb.name}.txt"


def _text(verb: Verb, *, every: bool) -> str:
    return (FOLDER / _name(verb, every)).read_text(encoding="utf-8")


if __name__ == "__main__":
    write()
