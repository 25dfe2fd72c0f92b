"""Silence other libraries' progress bars and warnings for developers. Imports nothing heavy."""

from __future__ import annotations

import logging
import os
import sys
import warnings

from vlft.config.device import may_have_gpu


def quiet() -> None:
    """Silence other libraries. Call it before they are imported. Warnings for users are still printed."""
    # peft 0.21 calls a method that transformers 5.23 renames, and accelerate 1.15 uses an option that torch 2.15
    # renames. Users can fix neither.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch|accelerate)\b")
    # bitsandbytes 0.50 warns when it is imported that a faster CPU kernel for 4 bits was not downloaded, also where
    # nothing is quantised: peft imports it for every adapter.
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_no_kernel_warning)
    # Each call tokenises only a few short texts, so threads would cost more time than they save, and the tokenizer
    # would warn about them in every loader worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not may_have_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it guessed it
    if not sys.stderr.isatty():  # a progress bar is useful on a terminal, but noise in a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it too, when it is imported
        if (imported := sys.modules.get("transformers.utils.logging")) is not None:
            imported.disable_progress_bar()


def _is_no_kernel_warning(record: logging.LogRecord) -> bool:
    return "gemm_4bit_forward" not in str(record.msg)
