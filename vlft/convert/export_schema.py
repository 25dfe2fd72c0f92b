"""Columns of exported files: their Arrow types, and what `datasets` reads them as (pictures, instead of bytes)."""

from __future__ import annotations

import json
from collections.abc import Collection
from typing import Any

from vlft.config.thinking import APART


def schema_of(kind: str, *, pairs: bool, arguments: Collection[str] = (), apart: bool = False) -> Any:
    """The pyarrow schema of an export.

    `datasets` (2.14 to 5) takes the types of columns from the file's metadata, so that `load_dataset` returns pictures.

    Args:
        kind: a key of `vlft.convert.export_rows.FORMS`.
        pairs: whether the rows are preference rows.
        arguments: names of the arguments of the chat template that each row has.
        apart: whether messages have the thoughts of answers apart from their text.
    """
    import pyarrow as pa

    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    thoughts = [(APART, pa.string())] if apart else []
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part)), *thoughts]))
    plain = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), *thoughts]))
    where: list[tuple[str, Any]] = [("file", pa.string()), ("index", pa.int64()), ("id", pa.string())]
    pictures = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    limited = pa.list_(pa.struct([("bytes", pa.binary()), ("min_pixels", pa.int64()), ("max_pixels", pa.int64())]))
    if kind == "verl":
        truth = pa.struct([("style", pa.string()), ("ground_truth", pa.string())])
        columns = [("data_source", pa.string()), ("prompt", plain), ("images", limited), ("ability", pa.string())]
        return pa.schema([*columns, ("reward_model", truth), ("extra_info", pa.struct(where))])
    if arguments:
        where.insert(0, ("chat_template_kwargs", pa.struct([(name, pa.bool_()) for name in arguments])))
    if kind == "calibration":
        return _with_pictures(pa.schema([("messages", turns), ("images", pictures), *where]))
    answers = [("chosen", turns), ("rejected", turns)] if pairs else [("completion", turns), ("answer", pa.string())]
    return _with_pictures(pa.schema([("prompt", turns), ("images", pictures), *answers, *where]))


def _with_pictures(schema: Any) -> Any:
    features = {field.name: _feature(field.type) for field in schema}
    features["images"] = {"feature": {"_type": "Image"}, "_type": "List"}
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _feature(kind: Any) -> Any:
    """A type in the words of `datasets`."""
    import pyarrow as pa

    if pa.types.is_list(kind):
        return {"feature": _feature(kind.value_type), "_type": "List"}
    if pa.types.is_struct(kind):
        return {field.name: _feature(field.type) for field in kind}
    return {"dtype": str(kind), "_type": "Value"}
