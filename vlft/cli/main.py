"""The command line's door: find the verb, hand it the rest, turn what went wrong into one message and an exit status.

Neighbours: `vlft.cli.verbs` lists the verbs. The module of a verb has `run(argv) -> int`, and is imported only when the
verb runs, so that help and wrong usage answer at once.
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
from vlft.cli import help
from vlft.cli.launched import without_local_rank
from vlft.cli.verbs import VERBS
from vlft.errors import Interrupted, Preempted, UsageError, VlftError
from vlft.interrupts import Interrupts

_LISTED = "\n".join(f"  {verb.name:<12} {verb.text}" for verb in VERBS.values())

HELP = f"""usage: vlft VERB [arguments]

Fine-tune Qwen2-VL on your own pictures, videos and conversations, and get weights anyone can load.

{_LISTED}

vlft VERB --help says more, vlft VERB --help all lists every flag. vlft --version prints the version ({__version__}).
A run, from data to weights:

  vlft check-data train.json --image_folder images
  vlft train --config examples/lora_vision.yaml --model_id Qwen/Qwen2-VL-2B-Instruct \\
      --data_path train.json --image_folder images --output_dir output/run
  vlft merge output/run output/merged
  vlft chat output/merged --image picture.jpg "What is this?"
"""

BROKEN_PIPE = 141  # as shells report SIGPIPE: 128 + 13
#: Seconds in which a process that failed, or was interrupted, is gone. Python waits for threads and for what libraries
#: registered to be called at exit, and a loader or a download may keep it waiting.
FAREWELL = 10.0
QUICK_FAREWELL = 2.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: what follows `vlft`; None takes it from the process, which is expected to end afterwards.

    Returns:
        The exit status: 0 done, 1 the verb failed on the user's data, flags or folders, 2 wrong usage,
        75 saved and stopped by a signal, 130 stopped by Ctrl-C.

    Raises:
        SystemExit: from the `--help` of a verb whose text is not stored (see `vlft.cli.help`).
    """
    if argv is None:  # without leaving the context: a second Ctrl-C still ends the process while Python exits
        return _guarded(sys.argv[1:], Interrupts().__enter__(), _Farewell().begin)
    with Interrupts() as interrupts:
        return _guarded(argv, interrupts, lambda seconds, status: None)


def _guarded(argv: Sequence[str], interrupts: Interrupts, end_within: Callable[[float, int], None]) -> int:
    """As `main`.

    Args:
        end_within: is told of a failure: the seconds until the process must end, and its status. That is
            within `except`: afterwards what the failure held is let go, and a loader waits for its processes.
    """
    try:
        status = _dispatch(without_local_rank(argv, os.environ))
        sys.stdout.flush()  # a reader that went away shall show here, not at interpreter exit
        return status
    except VlftError as error:
        if not error.said:
            print(f"stopped: {error}" if isinstance(error, Preempted) else f"error: {error}", file=sys.stderr)
        interrupts.answered()
        end_within(FAREWELL, error.exit_code)
        return error.exit_code
    except BrokenPipeError:
        # What is still buffered would raise again when Python flushes at exit, so it goes nowhere.
        # https://docs.python.org/3/library/signal.html#note-on-sigpipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        end_within(FAREWELL, BROKEN_PIPE)
        return BROKEN_PIPE
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt) and not interrupts.raised:
            end_within(FAREWELL, 1)
            raise  # a fault of ours
        # An import that is interrupted may end in an error of the library's own.
        print("interrupted", file=sys.stderr)
        interrupts.answered()
        end_within(QUICK_FAREWELL, Interrupted.exit_code)
        return Interrupted.exit_code


class _Farewell:
    """A short end for a process that failed: what was registered with `atexit`, and no more.

    Python would then take every module apart, which takes seconds with torch loaded.
    """

    def __init__(self) -> None:
        self._status: int | None = None
        atexit.register(self._leave)  # before all others, so it is called after them

    def begin(self, seconds: float, status: int) -> None:
        """The process ends with this status, and in so many seconds at the latest."""
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


#: Commands of other kits, and other words for ours -> what to type here. Behind a word of ours stands what it does.
MEANT = {
    **dict.fromkeys(("sft", "finetune", "fine-tune", "tune", "fit", "run", "lora", "pt", "pretrain"), "vlft train"),
    **dict.fromkeys(("infer", "inference", "predict", "generate", "ask", "demo-chat", "cli"), "vlft chat"),
    **dict.fromkeys(
        ("export", "merge-lora", "save", "convert-weights"), "vlft merge RUN OUT (weights anyone can load)"
    ),
    **dict.fromkeys(("check", "validate", "verify", "lint", "data", "preprocess"), "vlft check-data"),
    **dict.fromkeys(("show", "view", "inspect", "visualize"), "vlft preview"),
    **dict.fromkeys(("estimate", "memory", "dry-run", "params", "plan-memory"), "vlft plan"),
    **dict.fromkeys(("benchmark", "profile"), "vlft bench"),
    **dict.fromkeys(("convert", "download"), "vlft import"),
    **dict.fromkeys(("plot", "logs", "curves"), "vlft report"),
    **dict.fromkeys(("version", "env"), "vlft --version"),
    **dict.fromkeys(
        ("eval", "evaluate", "test"),
        "vlft train --eval_path FILE --eval_strategy epoch for the loss, vlft chat for answers",
    ),
    **dict.fromkeys(
        ("api", "serve", "deploy", "rollout"), "vlft merge RUN OUT, and serve OUT with vLLM or transformers"
    ),
    **dict.fromkeys(
        ("webui", "web-ui", "ui", "webchat", "app"), "vlft chat in the terminal; there are no web pages to start"
    ),
    **dict.fromkeys(
        ("rlhf", "dpo", "grpo", "rm"), "vlft train (supervised only; preference training is not supported)"
    ),
}


def _meant(verb: str) -> str:
    """What someone who typed an unknown command may have meant: by its meaning, else by its spelling."""
    if (meant := MEANT.get(verb.lower().replace("_", "-"))) is not None:
        return f"Use: {meant}"
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
    if (text := help.answer(VERBS[verb], rest)) is not None:
        print(text, end="")
        return 0
    return importlib.import_module(VERBS[verb].module).run(rest)
