"""Shell completion by argcomplete (`pip install argcomplete`) from the stored help texts, without heavy imports.

In ~/.bashrc or ~/.zshrc:  eval "$(register-python-argcomplete vlft)"
"""

from __future__ import annotations

import argparse

from vlft.cli.help import flags
from vlft.cli.verbs import VERBS


def complete() -> None:
    """Print the shell's completions. Ends the process if argcomplete is installed."""
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
