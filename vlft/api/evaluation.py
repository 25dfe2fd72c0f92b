"""`evaluate` for Python: the arguments of `vlft eval` as keywords."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from vlft.api.door import speaks_python
from vlft.config.flags import DataFlags
from vlft.config.row_flags import BoxFormat, MissingTags
from vlft.config.thinking import Thinking
from vlft.errors import UsageError
from vlft.evaluation import evaluate as evaluation
from vlft.evaluation.result import Evaluation

LOG = logging.getLogger("vlft")
PathLike = str | os.PathLike[str]


@speaks_python
def evaluate(
    model: PathLike,
    data_path: PathLike | Sequence[PathLike],
    *,
    metrics: Sequence[str] = ("exact_match", "rouge_l"),
    compare: Sequence[PathLike] = (),
    image_folder: PathLike | None = None,
    columns: str | None = None,
    missing_tags: MissingTags = "error",
    box_format: BoxFormat | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    allow_outside_folder: bool = False,
    allow_remote_media: bool = False,
    batch: int = 8,
    max_new_tokens: int = 512,
    limit: int | None = None,
    out: PathLike | None = None,
    thinking: Thinking = "auto",
    base_model: str | None = None,
    device: str | None = None,
) -> Evaluation:
    """Ask a model about rows, greedily, and compare its answers with the right ones.

    Answers are kept in a file, as those of `vlft eval`: the same call again only computes metrics.

    Args:
        model: run folder, `checkpoint-N`, adapter, merged or base model, or a file of answers.
        data_path: one or more data files.
        metrics: names of metrics, or `FILE.py:FUNCTION`.
        compare: further models or files of answers.
        image_folder: the folder that relative media paths start from; None: each data file's own folder.
        columns: which columns hold the parts of a row, as the flag.
        missing_tags: rows whose pictures have no tags, as the flag.
        box_format: unit of the boxes in the rows; None: that of the run's rows.
        on_bad_row: a row that cannot be evaluated is an error, or is skipped.
        allow_outside_folder: allow relative paths that leave the folder.
        allow_remote_media: download media with addresses.
        batch: most rows that are answered together.
        max_new_tokens: most tokens of an answer.
        limit: most rows, from the first on; None: all.
        out: where to write the answers; None: in the folder `eval`.
        thinking: whether the model thinks before it answers.
        base_model: folder or hub id of an adapter's base, if it has moved.
        device: where to run models, such as `cpu`; None: the GPU if there is one.

    Returns:
        The figures, and every row with its answers.

    Raises:
        UsageError: an argument is of the wrong type or out of range.
        ConfigError: a metric cannot be computed, a row is refused, or answers cannot be kept.
        CheckpointError: a model cannot be opened or loaded.
        DataError: a picture or video cannot be decoded.
    """
    for name, value in (("batch", batch), ("max_new_tokens", max_new_tokens), ("limit", limit)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UsageError(f"{name} is {value!r}, must be a number from 1")
    data = DataFlags(
        image_folder=None if image_folder is None else os.fspath(image_folder),
        columns=columns,
        missing_tags=missing_tags,
        on_bad_row=on_bad_row,
        allow_outside_folder=allow_outside_folder,
        allow_remote_media=allow_remote_media,
    )
    settings = evaluation.Settings(
        models=(os.fspath(model), *_paths("compare", compare)),
        files=_paths("data_path", [data_path] if isinstance(data_path, str | os.PathLike) else data_path),
        data=data,
        metrics=_words("metrics", metrics),
        box_format=box_format,
        batch=batch,
        max_new_tokens=max_new_tokens,
        limit=limit,
        out=None if out is None else Path(out),
        thinking=thinking,
        base_model=base_model,
        device=device,
    )
    return evaluation.evaluate(settings, say=LOG.info)


def _paths(name: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(one, str | os.PathLike) for one in given):
        raise UsageError(f"{name} is {given!r}, must be a list of paths")
    return tuple(map(os.fspath, given))


def _words(name: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not given or not all(isinstance(one, str) for one in given):
        raise UsageError(f"{name} is {given!r}, must be a list of names")
    return tuple(given)
