"""Read the pixel and frame budgets that a row or a part sets for its own media.

`vlft.data.media.limits` combines them with the flags.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, Literal

from vlft.data.rows.source import kind_of
from vlft.data.sample import Overrides
from vlft.errors import RowRef

PIXELS = ("min_pixels", "max_pixels")
FRAMES = ("fps", "nframes", "max_frames")
SPAN = ("video_start", "video_end")
# Keys of qwen-vl-utils 0.0.14 that are refused -> what to use instead.
NOT_TAKEN = {
    "resized_height": "min_pixels and max_pixels",
    "resized_width": "min_pixels and max_pixels",
    "total_pixels": "max_pixels",
    "min_frames": "nframes",
}
# Kind of media -> row keys for that kind -> the budget that they set.
OF_ROW: dict[Literal["image", "video"], dict[str, str]] = {
    "image": {"image_min_pixels": "min_pixels", "image_max_pixels": "max_pixels"},
    "video": {
        "video_min_pixels": "min_pixels",
        "video_max_pixels": "max_pixels",
        "video_max_frames": "max_frames",
        "num_frames": "nframes",  # lmms-finetune
        "sample_fps": "fps",  # qwen-vl-utils, for lists of frames
    },
}
ROW_KEYS = (*PIXELS, *FRAMES, *SPAN, *NOT_TAKEN, "raw_fps", *(key for keys in OF_ROW.values() for key in keys))


def of_row(row: RowRef, raw: dict) -> dict[Literal["image", "video"], Overrides]:
    """Return the budgets that the keys of a row set, by kind of media.

    Raises:
        DataError: an invalid value, or a key that is not supported.
    """
    found: dict[Literal["image", "video"], Overrides] = {}
    for kind, names in OF_ROW.items():
        taken = _taken(kind)
        keys = {key: key for key in taken} | names
        given = {
            key: (ours, raw[key])
            for key, ours in keys.items()
            if raw.get(key) is not None and not isinstance(raw[key], list if key == "num_frames" else ())
        }
        for other, key in (("num_frames", "nframes"), ("sample_fps", "fps")):
            if {key, other} <= given.keys() and raw[key] != raw[other]:
                raise row.bad(other, f"is {raw[other]}, and {key} is {raw[key]}. Keep one of them")
        # "image_min_pixels" wins over "min_pixels": it is more specific.
        values = {ours: (key, value) for key, (ours, value) in given.items()}
        found[kind] = _checked(row, values, "")
    _refuse_others(row, raw, "")
    return found


def nframes_of(row: RowRef, raw: dict) -> tuple[int, ...]:
    """Return the frames of each video if `num_frames` lists them (lmms-finetune), else an empty tuple.

    Raises:
        DataError: an invalid value, or `nframes` is also set.
    """
    value = raw.get("num_frames")
    if not isinstance(value, list):
        return ()
    if raw.get("nframes") is not None and value:
        raise row.bad("num_frames", "both num_frames and nframes. Keep one of them")
    found = [_checked(row, {"nframes": (f"num_frames[{i}]", frames)}, "").nframes for i, frames in enumerate(value)]
    return tuple(frames for frames in found if frames is not None)


def of_part(row: RowRef, part: dict, field: str, kind: Literal["image", "video"]) -> Overrides:
    """Return the budgets that a part sets for its own picture or video.

    Raises:
        DataError: an invalid value, or a key that is not supported or has no effect on this kind.
    """
    _refuse_others(row, part, f"{field}.")
    for key in (*FRAMES, *SPAN, "sample_fps"):
        if kind == "image" and part.get(key) is not None:
            raise row.bad(f"{field}.{key}", "is for videos, but this is a picture. Drop it")
    values = {key: (key, part[key]) for key in _taken(kind) if part.get(key) is not None}
    if kind == "video" and part.get("sample_fps") is not None:
        if part.get("fps") not in (None, part["sample_fps"]):
            raise row.bad(f"{field}.sample_fps", f"is {part['sample_fps']}, and fps is {part['fps']}. Keep one of them")
        values["fps"] = ("sample_fps", part["sample_fps"])
    return _checked(row, values, f"{field}.")


def within(outer: Overrides, inner: Overrides) -> Overrides:
    """Combine the budgets of a row and of a part. If both set a budget, the part's wins."""
    values = {f.name: getattr(inner, f.name) for f in fields(inner) if getattr(inner, f.name) is not None}
    if values.keys() & {"fps", "nframes", "max_frames"}:  # three ways to set the number of frames
        outer = replace(outer, fps=None, nframes=None, max_frames=None)
    return replace(outer, **values)


def _taken(kind: str) -> tuple[str, ...]:
    return PIXELS if kind == "image" else (*PIXELS, *FRAMES, *SPAN)


def _refuse_others(row: RowRef, values: dict, at: str) -> None:
    for key, instead in NOT_TAKEN.items():
        if values.get(key) is not None:
            raise row.bad(f"{at}{key}", f"is not supported. Use {instead}")
    # qwen-vl-utils knows it as the rate of the video that a list of frames was taken from. The time of a frame follows
    # from `sample_fps` alone.
    if values.get("raw_fps") is not None and values.get("sample_fps") is None and values.get("fps") is None:
        raise row.bad(f"{at}raw_fps", "does not say how many frames per second the list has. Use sample_fps")


def _checked(row: RowRef, values: dict[str, tuple[str, Any]], at: str) -> Overrides:
    for name, (key, value) in values.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number:
            raise row.bad(f"{at}{key}", f"is {kind_of(value)}, where a number belongs")
        whole = name in (*PIXELS, "nframes", "max_frames")
        if not (0 <= value < 1e15) or (whole and value != int(value)) or (name not in SPAN and value == 0):
            raise row.bad(f"{at}{key}", f"is {value}. Use a {'whole number' if whole else 'number'} above 0")
        if name in ("nframes", "max_frames") and value % 2:
            raise row.bad(f"{at}{key}", f"is {value}: frames go in pairs. Use an even number")
        values[name] = (key, int(value) if whole else float(value))
    for one, other, why in (
        ("fps", "nframes", "both set how many frames a video gets"),
        ("nframes", "max_frames", "both set how many frames a video gets"),
    ):
        if one in values and other in values:
            raise row.bad(f"{at}{values[other][0]}", f"{one} and {other} {why}. Keep one of them")
    for low, high in (PIXELS, SPAN):
        if low in values and high in values and values[low][1] > values[high][1]:
            (name, least), (other, most) = values[low], values[high]
            raise row.bad(f"{at}{name}", f"{least} is above {other} {most}. Change one of them")
    return Overrides(**{name: value for name, (_, value) in values.items()})
