"""The command line's door: find the verb, hand it the rest, turn what went wrong into one message and an exit status.

Neighbours: `vlft.cli.<verb>.run(argv) -> int`, imported only when called, so that help and wrong usage answer at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from vlft import __version__
from vlft.cli import help
from vlft.cli.launched import without_local_rank
from vlft.errors import Preempted, UsageError, VlftError

VERBS = {
    "train": "fine-tune a Qwen2-VL on your data",
    "merge": "merge what a run trained into its base model, and compare the two",
    "check-data": "name every row that cannot be trained, and why",
    "import": "turn a published data set into rows and pictures",
    "preview": "show rows as the model sees them, trained tokens marked",
    "demo": "see a tiny model learn from pictures, in minutes, on a CPU",
    "plan": "say what would be trained, at which rate, in how many steps",
    "report": "make the page of a run anew: curves, answers, where the time went",
    "chat": "ask a model about pictures and videos",
    "bench": "measure loading and training, beside stock transformers",
}

_LISTED = "\n".join(f"  {verb:<12} {what}" for verb, what in VERBS.items())

HELP = f"""usage: vlft VERB [arguments]

Fine-tune Qwen2-VL on your own pictures, videos and conversations, and get weights anyone can load.

{_LISTED}

vlft VERB --help says more; vlft --version prints the version ({__version__}).
A run, from data to weights:

  vlft check-data train.json --image_folder images
  vlft train --config examples/lora_vision.yaml --model_id Qwen/Qwen2-VL-2B-Instruct \\
      --data_path train.json --image_folder images --output_dir output/run
  vlft merge output/run output/merged
  vlft chat output/merged --image picture.jpg "What is this?"
"""

INTERRUPTED = 130  # as shells report SIGINT (128 + 2) and, below, SIGPIPE (128 + 13)
BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: what follows `vlft`; None takes it from the process.

    Returns:
        The exit status: 0 done, 1 the verb failed on the user's data, flags or folders, 2 wrong usage,
        75 saved and stopped by a signal, 130 interrupted.

    Raises:
        SystemExit: from a verb's own argument parser (its --help and its usage errors).
    """
    try:
        status = _dispatch(without_local_rank(sys.argv[1:] if argv is None else argv, os.environ))
        sys.stdout.flush()  # a reader that went away shall show here, not at interpreter exit
        return status
    except VlftError as error:
        if not error.said:
            print(f"stopped: {error}" if isinstance(error, Preempted) else f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # What is still buffered would raise again when Python flushes at exit, so it goes nowhere.
        # https://docs.python.org/3/library/signal.html#note-on-sigpipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


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

        complete(list(VERBS))
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
    if (text := help.answer(verb, rest)) is not None:
        print(text, end="")
        return 0
    return importlib.import_module(help.module_of(verb)).run(rest)
