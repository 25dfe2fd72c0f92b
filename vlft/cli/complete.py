"""Shell completion by argcomplete (`pip install argcomplete`) from the stored help texts: a TAB loads no library.

In ~/.bashrc or ~/.zshrc:  eval "$(register-python-argcomplete vlft)"
"""

from __future__ import annotations

import argparse

from vlft.cli.help import flags
from vlft.cli.verbs import VERBS


def complete() -> None:
    """Answer the shell's question for the words that may follow; ends the process where argcomplete is installed."""
    try:
        import argcomplete
    except ImportError:
        return
    parser = argparse.ArgumentParser(prog="vlft")
    subparsers = parser.add_subparsers()
    for verb in VERBS.values():
        one = subparsers.add_parser(verb.name)
        one.add_argument("words", nargs="*")
        for name, words in flags(verb).items():
            if name != "help":
                one.add_argument(f"--{name}", choices=words or None)
    argcomplete.autocomplete(parser)
