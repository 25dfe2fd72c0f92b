"""The entry point of the command line: run a verb, and turn errors into one message and an exit status.

Neighbours: `vlft.cli.verbs` lists the verbs. `vlft --help` imports only this module and that table. A verb's module has
`run(argv) -> int`, and is imported only when the verb runs.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import importlib
import os
import sys
import threading
from collections.abc import Callable, Sequence

from vlft import __version__
from vlft.cli.launched import without_local_rank
from vlft.cli.verbs import VERBS
from vlft.errors import Interrupted, Preempted, UsageError, VlftError
from vlft.interrupts import Interrupts

_LISTED = "\n".join(f"  {verb.name:<12} {verb.text}" for verb in VERBS.values())

HELP = f"""usage: vlft VERB [arguments]

Fine-tune Qwen-VL models on your own pictures, videos and conversations, and get weights anyone can load.

{_LISTED}

vlft VERB --help describes a verb, vlft VERB --help all lists every flag.
vlft --version prints the version ({__version__}).

A run, from data to weights:

  vlft check-data train.json --image_folder images
  vlft train --config examples/lora_vision.yaml --model_id Qwen/Qwen2-VL-2B-Instruct \\
      --data_path train.json --image_folder images --output_dir output/run
  vlft merge output/run output/merged
  vlft chat output/merged --image picture.jpg "What is this?"
"""

BROKEN_PIPE = 141  # as shells report SIGPIPE: 128 + 13
#: Seconds until a process that failed, or was interrupted, is ended by force. Python waits for threads and for the exit
#: handlers of libraries, and a loader or a download may block it.
FAREWELL = 10.0
QUICK_FAREWELL = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: the words after `vlft`; None: the process's own, which must end afterwards.

    Returns:
        The exit status: 0 success, 1 the verb failed because of the user's data, flags or folders, 2 wrong usage,
        75 stopped by a signal after saving, 130 stopped by Ctrl-C.

    Raises:
        SystemExit: the parser of a verb printed `--help`, because its text is not stored (see `vlft.cli.help`).
    """
    if argv is None:  # the context is never left, so that a second Ctrl-C still ends the process while Python exits
        return _guarded(sys.argv[1:], Interrupts().__enter__(), _Farewell().begin)
    with Interrupts() as interrupts:
        return _guarded(argv, interrupts, lambda seconds, status: None)


def _guarded(argv: Sequence[str], interrupts: Interrupts, end_within: Callable[[float, int], None]) -> int:
    """Run one verb and handle its errors. Arguments and result are the ones of `main`.

    Args:
        end_within: called after a failure with the seconds until the process must end, and its status. It is called
            inside `except`, because leaving `except` frees the objects of the failure, and a loader among them waits
            for its processes.
    """
    try:
        status = _dispatch(without_local_rank(argv, os.environ))
        sys.stdout.flush()  # raises BrokenPipeError here rather than when the interpreter exits
        return status
    except VlftError as error:
        if not error.said:
            print(f"stopped: {error}" if isinstance(error, Preempted) else f"error: {error}", file=sys.stderr)
        interrupts.answered()
        end_within(FAREWELL, error.exit_code)
        return error.exit_code
    except BrokenPipeError:
        # Python would raise again when it flushes the buffer at exit, so the buffer is sent to devnull.
        # https://docs.python.org/3/library/signal.html#note-on-sigpipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end_within(FAREWELL, BROKEN_PIPE)
        return BROKEN_PIPE
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt) and not interrupts.raised:
            end_within(FAREWELL, 1)
            raise  # a bug in vlft
        # An interrupted import may raise another error of the library instead of KeyboardInterrupt.
        print("interrupted", file=sys.stderr)
        interrupts.answered()
        end_within(QUICK_FAREWELL, Interrupted.exit_code)
        return Interrupted.exit_code


class _Farewell:
    """End a failed process quickly: after the handlers of `atexit`, skip the rest of Python's shutdown.

    Python would then free every module, which takes seconds with torch loaded.
    """

    def __init__(self) -> None:
        self._status: int | None = None
        atexit.register(self._leave)  # registered first, so it is called last

    def begin(self, seconds: float, status: int) -> None:
        """End the process with this status, after `seconds` at the latest."""
        self._status = status
        last = threading.Timer(seconds, os._exit, [status])
        last.daemon = True
        last.start()

    def _leave(self) -> None:
        if self._status is not None:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError, ValueError):
                    stream.flush()
            os._exit(self._status)


def _meant(verb: str) -> str:
    """Return a hint for an unknown command: a synonym, else a similar spelling."""
    from vlft.config.kits.verbs import MEANT

    if (meant := MEANT.get(verb.lower().replace("_", "-"))) is not None:
        return f"Use: {meant}"
    if verb.endswith((".sh", ".yaml", ".yml")):
        return (
            f"Use: vlft plan --translate {verb} for a file of another kit, vlft train --config FILE.yaml for your own"
        )
    near = difflib.get_close_matches(verb, [*VERBS, "--help", "--version"], n=1)
    return f"Did you mean: vlft {near[0]}" if near else "See: vlft --help"


def _dispatch(argv: list[str]) -> int:
    if "_ARGCOMPLETE" in os.environ:
        from vlft.cli.complete import complete

        complete()
    if not argv:
        print(HELP, end="", file=sys.stderr)
        return UsageError.exit_code
    verb, rest = argv[0], argv[1:]
    if verb in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if verb == "--version":
        print(f"vlft {__version__}")
        return 0
    if verb not in VERBS:
        raise UsageError(f"unknown command {verb!r}. The commands are {', '.join(VERBS)}.\n  {_meant(verb)}")
    from vlft.cli import help, translate
    from vlft.cli.starting import starting

    if verb == "plan" and translate.wanted(rest):
        return translate.run(rest)
    if (text := help.answer(VERBS[verb], rest)) is not None:
        print(text, end="")
        return 0
    with starting(VERBS[verb], rest):
        return importlib.import_module(VERBS[verb].module).run(rest)
