"""Chat with a model: open the result of a run (or any Qwen-VL) and answer conversations with it.

`model` opens and answers, `turns` makes turns from what a user types, `loop` holds a conversation, `commands` reads its
commands, and `saved` writes it to a file. The names below are imported when they are first asked for (PEP 562): the
commands and file names of a user are checked without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlft.answering import question_of
    from vlft.chat.model import Chat, Reply, open_model
    from vlft.chat.turns import question, system_turn
    from vlft.model.generate import Sampling

__all__ = ["Chat", "Reply", "Sampling", "open_model", "question", "question_of", "system_turn"]

_MODULES = {
    **dict.fromkeys(("Chat", "Reply", "open_model"), "vlft.chat.model"),
    **dict.fromkeys(("question", "system_turn"), "vlft.chat.turns"),
    "Sampling": "vlft.model.generate",
    "question_of": "vlft.answering",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value
