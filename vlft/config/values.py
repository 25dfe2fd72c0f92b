"""Values of flags before they are parsed, and the defaults of flags that are compared with other flags."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

#: Flag -> default. A test compares them with the dataclasses.
DEFAULTS: Mapping[str, Any] = {
    "method": "sft",
    "vision": "frozen",
    "merger": "frozen",
    "language": "lora",
    "bits": "16",
    "packing": True,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "max_nonfinite_steps": 0,
    "logging_nan_inf_filter": False,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "linear",
    "optim": "adamw_torch_fused",
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 500,
    "load_best_model_at_end": False,
    "eval_on_start": False,
    "fp16": False,
    "stall_timeout": 1800,
    "cache_vision_features": False,
    "vision_cache_gb": 50,
}


class Values:
    """Flag -> value for the flags that were given with valid values, and defaults for the others.

    Args:
        said: flag -> its values.
        wrong: flags that were given with other values, which have a message already.
    """

    def __init__(self, said: Mapping[str, tuple[Any, ...]], wrong: Collection[str] = ()) -> None:
        self._said = said
        self._wrong = wrong

    def is_wrong(self, *names: str) -> bool:
        """Whether one of these flags was given with a value that is not valid, so that its default says nothing."""
        return any(name in self._wrong for name in names)

    def given(self, name: str) -> bool:
        return name in self._said

    def every(self, name: str) -> tuple[Any, ...]:
        """Return all values of a flag that takes several."""
        return self._said.get(name, ())

    def of(self, name: str) -> Any:
        """Return the value of a flag, or its default. A flag without a value is True."""
        if name not in self._said:
            return DEFAULTS.get(name)
        return self._said[name][-1] if self._said[name] else True
