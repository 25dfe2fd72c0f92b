"""Silence other libraries' progress bars and warnings for developers."""

from __future__ import annotations

import os
import sys
import warnings


def quiet() -> None:
    """Silence other libraries. Call it before models are loaded. Warnings for users are still printed."""
    # peft 0.21 calls a method that transformers 5.23 renames, and accelerate 1.15 uses an option that torch 2.15
    # renames. Users can fix neither.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch|accelerate)\b")
    # Each call tokenises only a few short texts, so threads would cost more time than they save, and the tokenizer
    # would warn about them in every loader worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed it
    if not sys.stderr.isatty():  # a progress bar is useful on a terminal, but noise in a log file
        from transformers.utils import logging

        logging.disable_progress_bar()
