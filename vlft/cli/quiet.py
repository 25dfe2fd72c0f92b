"""Keep other libraries' noise out of what a verb prints: their progress bars and notes to developers."""

from __future__ import annotations

import os
import sys
import warnings


def quiet() -> None:
    """Call before models are loaded. Warnings meant for users still come through."""
    # peft 0.21 calls a method that transformers 5.23 renames, accelerate 1.15 an option that torch 2.15 does; none is
    # the user's to mend.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch|accelerate)\b")
    # Rows are tokenised a few short texts at a time: threads would cost more than they bring, and the tokenizer would
    # warn of them in every loader worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would warn that it guessed so
    if not sys.stderr.isatty():  # a bar in a log file is noise; on a terminal it says how long a large model takes
        from transformers.utils import logging

        logging.disable_progress_bar()
