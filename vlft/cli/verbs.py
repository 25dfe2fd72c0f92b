"""The verbs of vlft, one row each. `main`, `help`, `complete`, the tests and the guides read this table.

A verb's module has `parser()`, which builds its command line, and `run(argv) -> exit status` (see `vlft.cli.command`).
It is imported only when the verb runs. To add a verb, add a row here and a module.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Verb:
    """One command.

    Attributes:
        name: the word after `vlft`.
        text: its line in `vlft --help`.
        doing: what it does, shown on a terminal until it shows something more precise.
        module: the module that implements it.
        train_flags: it takes the flags of `vlft train`. Its `--help` lists the common flags, and `--help all` lists
            every flag.
        needs_data: it needs at least one flag or data file.
    """

    name: str
    text: str
    doing: str
    module: str
    train_flags: bool = False
    needs_data: bool = False


def _verb(
    name: str, text: str, doing: str, *, module: str = "", train_flags: bool = False, needs_data: bool = False
) -> Verb:
    module = f"vlft.cli.{module or name}"
    return Verb(name=name, text=text, doing=doing, module=module, train_flags=train_flags, needs_data=needs_data)


def _like_train(name: str, text: str, doing: str, *, module: str = "") -> Verb:
    return _verb(name, text, doing, module=module, train_flags=True, needs_data=True)


_ROWS = (
    _like_train("train", "fine-tune a Qwen-VL model on your data", "starting"),
    _verb("merge", "merge a run's adapter into its base model, and compare the logits", "merging"),
    _like_train(
        "check-data", "find every row that cannot be trained, and report why", "checking rows", module="check_data"
    ),
    _verb(
        "export",
        "write rows for verl, TRL or llm-compressor, with pictures as bytes",
        "exporting rows",
        train_flags=True,
    ),
    _verb("import", "convert a published data set into rows and pictures", "converting", module="import_data"),
    _like_train("preview", "show rows as the model sees them, with trained tokens marked", "reading rows"),
    _verb("demo", "train a tiny model on pictures, in minutes, on a CPU", "running the demo"),
    _like_train("plan", "show what a run would train, at which rates, in how many steps", "planning"),
    _verb("report", "write the report page of a run again: curves, answers, times", "writing the page"),
    _verb("eval", "score a model's answers to held-out rows, and compare models", "reading rows"),
    _verb("chat", "ask a model about pictures and videos", "loading the model"),
    _verb("bench", "measure loading and training, and compare with stock transformers", "measuring", train_flags=True),
)
#: Name -> verb, in the order of `vlft --help`.
VERBS = {verb.name: verb for verb in _ROWS}
