"""Help from stored texts: asking, or a wrong flag, must not cost the seconds that transformers takes to load.

`help/VERB.txt` is what the verb's own parser prints for `--help`. A verb that takes the flags of train prints the
common ones there, and every flag in `help/VERB-all.txt`, for `--help all`. So the surface of the command line is in
files, where a change shows up; a test compares. Most flags come from transformers, so the texts are right beside the
one version they were made with; beside another version the verbs answer for themselves.

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
from vlft.config import door
from vlft.config.names import help_asked, wrong_usage

FOLDER = Path(__file__).parent / "help"
WIDTH = 100  # columns


def answer(verb: Verb, argv: Sequence[str]) -> str | None:
    """The verb's help if argv asks for it, else None.

    Raises:
        UsageError, ConfigError: a flag in argv is unknown or wrong (see `vlft.config.door`), or argv is empty and the
            verb needs data.
    """
    asked = help_asked(argv)
    if verb.name == "chat" and not asked:  # none of its flags is transformers'
        door.check(verb.name, argv, names(verb))
    if not _holds():
        return None
    if asked:
        return _text(verb, every=asked == "all")
    if verb.train_flags:
        if not argv and verb.needs_data:
            raise wrong_usage(verb.name, "no data file and no model are named. Examples are at the end of its help")
        door.check(verb.name, argv, names(verb))
    return None


def names(verb: Verb) -> set[str]:
    """Names of the flags a verb takes, `headers-only` as `headers_only`, and their `no_` forms."""
    known = {name.replace("-", "_") for name in flags(verb)}
    return known | ({f"no_{name}" for name in known} if verb.train_flags else set())


def flags(verb: Verb) -> dict[str, list[str]]:
    """Names of the flags a verb takes, each with the words it may be; none where it may be anything."""
    found = {}
    for one in {verb.name, "train"} if verb.train_flags else {verb.name}:
        text = _text(VERBS[one], every=True)
        for name, words in re.findall(r"^  (?:-\w, )?--(\w[\w-]*)(?: \{([^}]*)\})?", text, re.M):
            found[name] = words.split(",") if words else []
    return found


def texts() -> Iterator[tuple[str, Verb, bool]]:
    """Each stored text: the name of its file, its verb, whether it lists every flag."""
    for verb in VERBS.values():
        for every in (False, True) if verb.train_flags else (False,):
            yield _name(verb, every), verb, every


def printed(verb: Verb, *, every: bool) -> str:
    """What the verb's own parser prints for `--help` or `--help all`, as wide as the environment's COLUMNS."""
    run = importlib.import_module(verb.module).run
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run(["--help", "all"] if every else ["--help"])
    return out.getvalue()


def write() -> None:
    """Write all texts again, beside the transformers that is installed."""
    os.environ["COLUMNS"] = str(WIDTH)
    FOLDER.mkdir(exist_ok=True)
    for name, verb, every in texts():
        (FOLDER / name).write_text(printed(verb, every=every), encoding="utf-8")
    (FOLDER / "transformers.txt").write_text(version("transformers") + "\n", encoding="utf-8")


def _holds() -> bool:
    """Whether the texts were made beside the transformers that is installed."""
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
