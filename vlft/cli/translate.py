"""`vlft plan --translate OLD`: translate a script, a command line or a YAML of another kit into flags of vlft.

It is a part of `vlft plan`, but needs none of its flags, no base, no data, and neither torch nor transformers. So it
has a command line of its own. Neighbour: `vlft.config.migrate` does the work.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vlft.cli.command import CommandParser, Write, add_json, command
from vlft.errors import ConfigError, UsageError

EXAMPLES = """\
examples:
  vlft plan --translate finetune_lora.sh
  vlft plan --translate llama_factory.yaml --out new.yaml        then: vlft train --config new.yaml
  vlft plan --translate - --gpus 8 < command.txt
"""


def wanted(argv: Sequence[str]) -> bool:
    """Whether a command line of `vlft plan` asks for a translation."""
    before = argv[: argv.index("--")] if "--" in argv else argv
    return any(word.partition("=")[0] == "--translate" for word in before)


def parser() -> CommandParser:
    """Build the command line of `vlft plan --translate`."""
    parser = CommandParser(
        "plan",
        description="Translate a shell script, a command line, or a YAML or JSON of Qwen2-VL-Finetune, LLaMA-Factory, "
        "ms-swift, axolotl or TRL into flags of vlft. A script is read, never executed. What has no counterpart is "
        "listed with the reason, and what the file does not contain is a placeholder such as <MODEL>.",
        examples=EXAMPLES,
    )
    parser.add_argument("--translate", metavar="OLD", required=True, help="the file, or - for standard input")
    parser.add_argument("--out", metavar="NEW.yaml", help="also write the flags as a YAML for --config; must be new")
    parser.add_argument("--gpus", type=int, metavar="N", help="processes of the run, for the rows of a step")
    add_json(parser)
    return parser


def _check_words(argv: Sequence[str]) -> None:
    """Refuse all flags that have no effect beside --translate, in one message."""
    ours = ("translate", "out", "gpus", "json", "help", "h")
    names = [word.lstrip("-").partition("=")[0] for word in argv if word.startswith("--")]
    if others := [name for name in dict.fromkeys(names) if name not in ours]:
        flags = " ".join(f"--{name}" for name in others)
        raise UsageError(
            f"vlft plan --translate: {flags} cannot be combined with it. It takes --out, --gpus and --json. Write the "
            "result with --out NEW.yaml; then vlft plan --config NEW.yaml takes every other flag"
        )
    for name in ("--translate", "--out"):
        if sum(word.partition("=")[0] == name for word in argv) > 1:
            raise UsageError(f"vlft plan --translate: {name} is given twice. Translate one file after the other")


def run(argv: Sequence[str]) -> int:
    """Translate the file and print the result."""
    _check_words(argv)
    return _run(argv)


@command(parser, heavy=False)
def _run(flags: Any, write: Write) -> int:
    from vlft.config.migrate import documents, settle, written
    from vlft.files import write_text

    if not flags.translate.strip():
        raise UsageError("vlft plan --translate: name the file, or - for standard input")
    if flags.gpus is not None and flags.gpus < 1:
        raise UsageError(f"vlft plan --translate: --gpus is {flags.gpus}, must be at least 1")
    document = documents.read(flags.translate)
    runs = [settle.settle(one, flags.gpus) for one in document.runs]
    files = {}
    if flags.out is not None:
        files = dict(enumerate(_names(flags.out, len(runs))))
        for path in files.values():
            _check_new(path)
        for place, path in files.items():
            write_text(path, written.as_yaml(runs[place]))
    if flags.json:
        found = [written.as_json(one, files.get(place, "")) for place, one in enumerate(runs)]
        write({"runs": found, "remarks": list(document.remarks)})
    else:
        print(written.summary(runs, document.remarks, files))
    return 0


def _names(out: str, number: int) -> list[str]:
    """Return the name of the YAML of each run: `new.yaml`, or `new-1.yaml`, `new-2.yaml` for several runs."""
    stem, ending = os.path.splitext(out)
    return [out] if number == 1 else [f"{stem}-{place}{ending}" for place in range(1, number + 1)]


def _check_new(path: str) -> None:
    if not path.endswith((".yaml", ".yml")):
        raise ConfigError(f"--out {path}: the name of a YAML ends with .yaml")
    if os.path.lexists(path):
        raise ConfigError(f"--out {path} already exists. Choose a new name; nothing was written")
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        raise ConfigError(f"--out {path}: {folder} is no folder. Create it first")
