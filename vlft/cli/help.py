"""Help from stored texts: asking, or a wrong flag, must not cost the seconds that transformers takes to load.

`help/VERB.txt` is what each verb's own parser prints, and so the surface of the command line in files that a change
shows up in; a test compares. Most flags come from transformers, so the texts hold beside the one version they were
made with; beside another the verbs answer for themselves.

    python -m vlft.cli.help         writes them anew
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from vlft.config import door
from vlft.config.names import wrong_usage

FOLDER = Path(__file__).parent / "help"
WIDTH = 100  # columns
#: Verbs that take the flags of train, though they do not list them all.
TAKES_TRAIN_FLAGS = ("train", "check-data", "preview", "plan", "bench")


def answer(verb: str, argv: Sequence[str]) -> str | None:
    """The verb's help if argv asks for it, else None.

    Raises:
        UsageError, ConfigError: a flag in argv is unknown or wrong (see `vlft.config.door`), or nothing is said at all.
    """
    before = argv[: argv.index("--")] if "--" in argv else argv
    if verb == "chat" and not {"-h", "--help"} & set(before):  # none of its flags is transformers'
        door.check(verb, argv, names(verb))
    if not _holds():
        return None
    if "-h" in before or "--help" in before:
        return _text(verb)
    if verb in TAKES_TRAIN_FLAGS:
        if not argv and verb != "bench":  # which asks for another word first
            raise wrong_usage(verb, "no data file and no model are named. Examples are at the end of its help")
        door.check(verb, argv, names(verb))
    return None


def names(verb: str) -> set[str]:
    """Names of the flags a verb takes, `headers-only` as `headers_only`, and their `no_` forms."""
    known = {name.replace("-", "_") for name in flags(verb)}
    return known | ({f"no_{name}" for name in known} if verb in TAKES_TRAIN_FLAGS else set())


def _holds() -> bool:
    """Whether the texts were made beside the transformers that is installed."""
    try:
        return (FOLDER / "transformers.txt").read_text(encoding="utf-8").strip() == version("transformers")
    except (OSError, PackageNotFoundError):
        return False


def _text(verb: str) -> str:
    return (FOLDER / f"{verb}.txt").read_text(encoding="utf-8")


def flags(verb: str) -> dict[str, list[str]]:
    """Names of the flags a verb takes, with the words they may be; none where they may be anything."""
    found = {}
    for of in {verb, "train"} if verb in TAKES_TRAIN_FLAGS else {verb}:
        for name, words in re.findall(r"^  (?:-\w, )?--(\w[\w-]*)(?: \{([^}]*)\})?", _text(of), re.M):
            found[name] = words.split(",") if words else []
    return found


def module_of(verb: str) -> str:
    """Where a verb lives: in the module of its name, but for `import`, which no statement could import."""
    return f"vlft.cli.{'import_data' if verb == 'import' else verb.replace('-', '_')}"


def printed(verb: str) -> str:
    """What the verb's own parser prints for --help, as wide as the environment's COLUMNS."""
    run = importlib.import_module(module_of(verb)).run
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        run(["--help"])
    return out.getvalue()


def write() -> None:
    """Write all texts anew, beside the transformers that is installed."""
    from vlft.cli.main import VERBS

    os.environ["COLUMNS"] = str(WIDTH)
    FOLDER.mkdir(exist_ok=True)
    for verb in VERBS:
        (FOLDER / f"{verb}.txt").write_text(printed(verb), encoding="utf-8")
    (FOLDER / "transformers.txt").write_text(version("transformers") + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
