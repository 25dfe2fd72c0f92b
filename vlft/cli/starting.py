"""What a command shows before its heavy imports: what it works on, and on a terminal a line with its stages.

`vlft.cli.main` enters `starting` once the flags are checked. Neighbour: `vlft.screen` draws the line. Only the process
of rank 0 shows anything.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence

from vlft import screen
from vlft.cli.launched import rank
from vlft.cli.verbs import Verb
from vlft.config import table
from vlft.config.checks import TOWERS
from vlft.config.kinds import TRUE
from vlft.config.said import Said, read_line
from vlft.config.values import DEFAULTS
from vlft.errors import VlftError

FEW = 2  # data files that are named
#: Verbs that load weights or train, which takes long. `plan` does with --measure.
LONG = ("train", "merge", "chat", "eval", "bench", "demo")
ON_STDERR = ("chat", "eval")  # their stdout holds the answer, or the figures, only


@contextlib.contextmanager
def starting(verb: Verb, argv: Sequence[str]) -> Iterator[None]:
    """Print what the command works on, and show its stages until it ends.

    Args:
        verb: the command.
        argv: the words after it.
    """
    if rank(os.environ) != "0":
        yield
        return
    said, others = _read(verb, argv)
    # The document of --json is written to the terminal directly.
    hidden = _is_true(said.get("disable_tqdm")) or ("json" in said and sys.stdout.isatty())

    def about() -> None:
        if verb.name in LONG or "measure" in said:
            stream = sys.stderr if verb.name in ON_STDERR or "json" in said else sys.stdout
            stream.write(_described(verb, said, others) + "\n")
            stream.flush()

    with screen.live(about=about, draw=not hidden):
        screen.stage(verb.doing)
        yield


def _read(verb: Verb, argv: Sequence[str]) -> tuple[Mapping[str, Said], Sequence[str]]:
    """Return the flags by name, and the other words. The verb reports flags that cannot be read."""
    if verb.name not in table.VERBS:
        said = {name: Said(name=name, words=()) for name in ("json",) if f"--{name}" in argv}
        return said, [word for word in argv if not word.startswith("-")]
    try:
        line = read_line(argv, table.kinds(verb.name), others=verb.name in table.WITH_WORDS)
    except VlftError:
        return {}, ()
    return line.values(), line.others


def _is_true(said: Said | None) -> bool:
    return said is not None and said.word.lower() in ("", *TRUE)


def _described(verb: Verb, said: Mapping[str, Said], others: Sequence[str]) -> str:
    """Return what the command works on: `vlft train: Qwen/Qwen2-VL-2B-Instruct, language lora; rows of a.json`."""
    texts = []
    if others:
        texts.append(" -> ".join(others[:2]) if verb.name == "merge" else others[0])
    if "model_id" in said:
        modes = {tower: said[tower].word if tower in said else DEFAULTS[tower] for tower in TOWERS}
        towers = ", ".join(f"{tower} {mode}" for tower, mode in modes.items() if mode != "frozen")
        if "adapter" in said:  # which decides what trains
            towers = f"adapter {said['adapter'].word}"
        texts.append(f"{said['model_id'].word}, {towers or 'all towers frozen'}")
    files = [word for name in ("data_path", "data_mix") if name in said for word in said[name].words]
    if files:
        more = f" and {len(files) - FEW} more" if len(files) > FEW else ""
        texts.append(f"rows of {', '.join(files[:FEW])}{more}")
    if "output_dir" in said and verb.name == "train":
        texts.append(f"into {said['output_dir'].word}")
    return f"vlft {verb.name}: {'; '.join(texts)}".removesuffix(": ")
