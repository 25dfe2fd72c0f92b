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
from vlft.evaluation.run_rows import held_out_of
from vlft.evaluation.settings import MAX_NEW_TOKENS
from vlft.metrics import DEFAULT

LOG = logging.getLogger("vlft")
PathLike = str | os.PathLike[str]


@speaks_python
def evaluate(
    model: PathLike,
    data_path: PathLike | Sequence[PathLike] | None = None,
    *,
    held_out: bool = False,
    metrics: Sequence[str] | None = None,
    labels: PathLike | None = None,
    compare: Sequence[PathLike] = (),
    image_folder: PathLike | None = None,
    columns: str | None = None,
    missing_tags: MissingTags = "error",
    box_format: BoxFormat | None = None,
    on_bad_row: Literal["error", "skip"] = "error",
    allow_outside_folder: bool = False,
    allow_remote_media: bool = False,
    batch: int = 8,
    max_new_tokens: int | None = None,
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
        data_path: one or more data files; None with `held_out`.
        held_out: evaluate the rows that the run `model` holds out (`--eval_split`), read as the run reads them.
        metrics: names of metrics, or `FILE.py:FUNCTION`; None: `exact_match` and `rouge_l`, or with `labels` those of
            labels.
        labels: a text file with a label on each line: they are scored by their log-probability instead of generating
            answers.
        compare: further models or files of answers.
        image_folder: the folder that relative media paths start from; None: each data file's own folder.
        columns: which columns hold the parts of a row, as the flag.
        missing_tags: rows whose pictures have no tags, as the flag.
        box_format: unit of the boxes in the rows; None: that of the run's rows.
        on_bad_row: a row that cannot be evaluated is an error, or is skipped.
        allow_outside_folder: allow relative paths that leave the folder.
        allow_remote_media: download media with addresses.
        batch: most rows that are answered together.
        max_new_tokens: most tokens of an answer; None: 512. Has no effect with `labels`, and is refused.
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
    if (data_path is None) != held_out:
        raise UsageError(
            f"data_path is {data_path!r} and held_out is {held_out}: name data files, or set held_out for the rows "
            "that a run holds out"
        )
    if labels is not None and max_new_tokens is not None:
        raise UsageError(f"max_new_tokens={max_new_tokens} has no effect with labels, which generates no answers")
    data = DataFlags(
        image_folder=None if image_folder is None else os.fspath(image_folder),
        columns=columns,
        missing_tags=missing_tags,
        on_bad_row=on_bad_row,
        allow_outside_folder=allow_outside_folder,
        allow_remote_media=allow_remote_media,
    )
    files: tuple[str, ...] = ()
    rows = None
    if data_path is None:
        held = held_out_of(os.fspath(model), data)
        files, data, rows = held.files, held.data, held.rows
    else:
        files = _paths("data_path", [data_path] if isinstance(data_path, str | os.PathLike) else data_path)
    settings = evaluation.Settings(
        models=(os.fspath(model), *_paths("compare", compare)),
        files=files,
        data=data,
        rows=rows,
        metrics=(() if labels else DEFAULT) if metrics is None else _words("metrics", metrics),
        labels=None if labels is None else Path(labels),
        box_format=box_format,
        batch=batch,
        max_new_tokens=MAX_NEW_TOKENS if max_new_tokens is None else max_new_tokens,
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
