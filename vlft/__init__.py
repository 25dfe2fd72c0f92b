"""vlft: fine-tune Qwen-VL models on your own pictures, videos and conversations. The command line is `vlft --help`.

From Python: `from vlft import open_base, load_rows, data_loader, load_model`, see examples/guides/python.md. The names
are imported when they are first asked for (PEP 562), so that `import vlft` loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlft.api import (
        Base,
        Loader,
        Rows,
        data_loader,
        evaluate,
        load_model,
        load_rows,
        open_base,
        parameter_groups,
        preview_row,
        save_model,
    )

__version__ = "0.1.0"

__all__ = [
    "Base",
    "Loader",
    "Rows",
    "__version__",
    "data_loader",
    "evaluate",
    "load_model",
    "load_rows",
    "open_base",
    "parameter_groups",
    "preview_row",
    "save_model",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module("vlft.api"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
