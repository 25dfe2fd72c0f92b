"""`vlft ui`: a page in the browser to check data, train, compare and merge in."""

from __future__ import annotations

import argparse
import os
import sys
import threading
import webbrowser
from importlib.util import find_spec

from vlft.cli.command import CommandParser, Write, command
from vlft.errors import ConfigError

PORT = 7865
EXAMPLES = """\
examples:
  vlft ui
  vlft ui --folder my_data
  vlft ui --port 8000 --no_browser
  ssh -L 7865:127.0.0.1:7865 machine      (in a terminal of your own computer, to open the page of another machine)
"""


def parser() -> CommandParser:
    """Build the command line of `vlft ui`."""
    parser = CommandParser(
        "ui",
        description="Open a page in the browser: choose data, check it, look at rows as the model sees them, plan, "
        "train, compare and merge. It is served on 127.0.0.1 only, and its address holds a token. Runs continue when "
        "it ends.",
        examples=EXAMPLES,
    )
    parser.add_argument(
        "--port", type=int, metavar="N", help=f"port of the page (default: {PORT}, or the next free one)"
    )
    parser.add_argument("--folder", metavar="DIR", help="the folder that is open at first (default: this one)")
    parser.add_argument("--no_browser", "--no-browser", action="store_true", help="print the address, open no browser")
    return parser


@command(parser, heavy=False)
def run(flags: argparse.Namespace, write: Write) -> int:
    """Serve the page until Ctrl-C."""
    folder = os.path.abspath(os.path.expanduser(flags.folder or os.curdir))
    if not os.path.isdir(folder):
        raise ConfigError(f"--folder {flags.folder}: is no folder. Name a folder on this machine.")
    if flags.port is not None and not 1 <= flags.port <= 65535:
        raise ConfigError(f"--port {flags.port}: is no port. Use a number from 1024 to 65535.")
    open_page(folder, port=flags.port, browser=not flags.no_browser)
    return 0


def open_page(folder: str, *, port: int | None, browser: bool) -> None:
    """Serve the page until Ctrl-C.

    Args:
        folder: the folder that is open at first.
        port: of the page; None: `PORT` or the next free one.
        browser: whether to open the address.

    Raises:
        ConfigError: the port is taken, or gradio is not installed.
    """
    if find_spec("gradio") is None:
        raise ConfigError("vlft ui needs gradio, which is not installed. Install it: pip install 'vlft[ui]'")
    from vlft.ui.guard import Keys
    from vlft.ui.server import desk_for, listen, serve

    listening = listen(port or PORT, given=port is not None)
    taken, keys = listening.getsockname()[1], Keys()
    address = f"http://127.0.0.1:{taken}/?token="

    def ready() -> None:
        print(f"vlft ui: {address}{keys.token}", flush=True)
        print("Ctrl-C ends the page; runs that were started in it continue.", file=sys.stderr)
        if browser:
            # In a thread: a browser of the terminal would keep this one, which serves the page.
            threading.Thread(target=webbrowser.open, args=(address + keys.once,), daemon=True).start()

    serve(listening, desk_for(folder), keys=keys, ready=ready)
