"""Match the files that a row lists to the tags and parts of its turns. Opens no file.

`vlft.data.rows.records` checks rows, `vlft.data.rows.media_refs` checks paths, and `vlft.data.rows.placeholders`
finds the words that stand for files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from vlft.data.rows.keys import MEDIA_KEYS, Kind
from vlft.data.rows.media_refs import Places, clip, images, is_one_video, picture, refuse_many_files, videos
from vlft.data.rows.normalise import PlainRow
from vlft.data.rows.overrides import within
from vlft.data.rows.placeholders import Tags, tags_of
from vlft.data.rows.turns import Column, Said, Shown
from vlft.data.sample import Image, Overrides, Part, Role, Text, Video
from vlft.errors import RowRef
from vlft.text import counted


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A checked turn, before its media are inserted.

    Attributes:
        role: role of the turn.
        pieces: its texts, and placeholders of its media, in order.
        field: the turn, for messages.
        text_field: its text, for messages.
        whole: whether its text is one string, not a list of parts.
        columns: (kind, files) that the turn itself lists.
    """

    role: Role
    pieces: tuple[Text | Shown, ...]
    field: str
    text_field: str
    whole: bool
    columns: tuple[tuple[Kind, Column], ...] = ()

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces if isinstance(piece, Text))

    @property
    def trained(self) -> bool:
        return self.role == "assistant" and any(isinstance(piece, Text) and piece.trained for piece in self.pieces)

    @property
    def blank(self) -> bool:
        return not self.text.strip() and not any(isinstance(piece, Shown) for piece in self.pieces)


def tags_in(row: RowRef, shape: PlainRow, roles: Sequence[Role]) -> Tags:
    """Find what stands for media in the texts of a row. `roles` are those of its turns and rejected answers."""
    said, files, named, shown = [], {}, {}, False
    for kind, column in shape.columns.items():
        own = [found for turn in shape.turns for other, found in turn.columns if other == kind]
        parts = [p for turn in shape.turns for p in turn.pieces if isinstance(p, Shown) and p.kind == kind]
        listed = sum(_files(kind, one.value) for one in (column, *own))
        # A part without a file of its own uses one of the list.
        files[kind] = max(0, listed - sum(part.value is None for part in parts))
        shown = shown or listed > 0 or bool(parts)
        named[kind] = column.tags + tuple(tag for one in own for tag in one.tags)
    for turn, role in zip((*shape.turns, *shape.rejected), roles, strict=True):
        said += [(role, piece) for piece in turn.pieces if isinstance(piece, Said)]
    return tags_of(row, said, files, named, shown=shown)


def _files(kind: Kind, value: object) -> int:
    """Count the pictures or videos that a row lists. A list that may be the frames of one video counts as one."""
    if value is None or value == "":
        return 0
    if not isinstance(value, list):
        return 1
    return 1 if kind == "video" and is_one_video(value) else len(value)


def as_videos(shape: PlainRow, entries: list[Entry]) -> list[Entry]:
    """Turn `<image>` tags into video tags in a row with equally many videos and no pictures, as LLaVA-NeXT has them."""
    tags = [piece for entry in entries for piece in entry.pieces if isinstance(piece, Shown)]
    files = shape.columns["video"].value
    listed = 1 if files is not None and is_one_video(files) else _files("video", files)
    pictures = shape.columns["image"].value is not None or any(entry.columns for entry in entries)
    plain = all(tag.kind == "image" and tag.value is None and tag.place is None for tag in tags)
    if pictures or not tags or not plain or len(tags) != listed:
        return entries
    return [
        replace(entry, pieces=tuple(replace(p, kind="video") if isinstance(p, Shown) else p for p in entry.pieces))
        for entry in entries
    ]


def with_tags(shape: PlainRow, entries: list[Entry], *, first: bool) -> tuple[list[Entry], tuple[tuple[str, str], ...]]:
    """Add tags for files without one, if the form of the row or `--missing_tags first` asks for it.

    Args:
        shape: the row in the one form.
        entries: its turns.
        first: whether `--missing_tags first` is set.

    Returns:
        The turns, and (field of a text, tags added before it) for the tags that the flag added.
    """
    found, added = list(entries), []
    start = next((i for i, entry in enumerate(entries) if entry.role == "user"), None)
    if start is None:
        return entries, ()
    for place, entry in enumerate(entries):
        own = dict(entry.columns)
        columns = own if place != start else {kind: own.get(kind, shape.columns[kind]) for kind in MEDIA_KEYS}
        tags: list[Shown] = []
        for kind in MEDIA_KEYS:  # pictures, then videos
            if kind not in columns or columns[kind].value in (None, ""):
                continue
            among = [entry] if kind in own else [one for one in entries if kind not in dict(one.columns)]
            if not any(_is_tag(piece, kind) for one in among for piece in one.pieces):
                tags += [Shown(kind=kind, field=entry.field)] * _files(kind, columns[kind].value)
        if tags and (first or shape.form.untagged):
            found[place] = replace(entry, pieces=(*tags, *_without_newlines(entry)))
            if not shape.form.untagged:
                added.append((entry.text_field, "".join(f"<{tag.kind}>" for tag in tags)))
    return found, tuple(added)


def _without_newlines(entry: Entry) -> tuple[Text | Shown, ...]:
    """Return the pieces to put after a tag. Newlines next to a tag are dropped, as for tags written in the text."""
    first = entry.pieces[0] if entry.pieces else None
    if not entry.whole or not isinstance(first, Text):
        return entry.pieces
    text = first.text.lstrip("\r\n")
    return (*([replace(first, text=text)] if text else []), *entry.pieces[1:])


def _is_tag(piece: Text | Shown, kind: Kind) -> bool:
    return isinstance(piece, Shown) and piece.kind == kind and piece.value is None


def media_of(row: RowRef, shape: PlainRow, entries: list[Entry], places: Places) -> dict[Kind, list[Image | Video]]:
    """Return the row's pictures and videos in the order in which its tags and parts show them.

    Raises:
        DataError: the numbers of tags and files differ, or a path is not followed.
    """
    found = {kind: list(_shown(row, shape, entries, places, kind)) for kind in shape.columns}
    found["video"] = _each_nframes(row, shape, found["video"])
    return found


def _shown(row: RowRef, shape: PlainRow, entries: list[Entry], places: Places, kind: Kind) -> Iterator[Image | Video]:
    overrides = shape.overrides[kind]
    own = [dict(entry.columns).get(kind) for entry in entries]
    pieces = [[p for p in entry.pieces if isinstance(p, Shown) and p.kind == kind] for entry in entries]
    numbered = any(piece.place is not None for some in pieces for piece in some)
    # The turns without a list of their own use the row's list.
    pools = [(shape.columns[kind], [i for i, column in enumerate(own) if column is None])]
    pools += [(column, [i]) for i, column in enumerate(own) if column is not None]
    every: list[Image | Video] = []
    following: dict[int, Iterator[Image | Video]] = {}
    for column, turns in pools:
        some = [piece for i in turns for piece in pieces[i]]
        tags = [piece.field for piece in some if piece.value is None]
        refuse_many_files(row, column.key, column.value, others=len(some) - len(tags))
        listed = _listed(row, kind, column, places, 1 if numbered else len(tags), overrides)
        if not numbered:
            _match(row, kind, column.key, tags, listed)
        every += listed
        files = iter(listed)
        following |= dict.fromkeys(turns, files)
    if numbered:
        _match_numbers(row, kind, [piece for some in pieces for piece in some], len(every))
    make: Callable[..., Image | Video] = picture if kind == "image" else clip
    for i, some in enumerate(pieces):
        for piece in some:
            if piece.value is not None:
                yield make(row, piece.value, piece.field, places, within(overrides, piece.overrides))
                continue
            medium = next(following[i]) if piece.place is None else every[piece.place]
            yield replace(medium, overrides=within(medium.overrides, piece.overrides))


def _listed(
    row: RowRef, kind: Kind, column: Column, places: Places, tags: int, overrides: Overrides
) -> Sequence[Image | Video]:
    if kind == "image":
        return images(row, column.value, places, key=column.key, overrides=overrides)
    return videos(row, column.value, places, tags=tags, key=column.key, overrides=overrides)


def _match_numbers(row: RowRef, kind: Kind, pieces: Sequence[Shown], files: int) -> None:
    tags = [piece for piece in pieces if piece.value is None]
    for tag in tags:
        if tag.place is None:
            raise row.bad(tag.field, f"<{kind}> next to tags that number their {kind}. Number all tags or none")
        if not 0 <= tag.place < files:
            raise row.bad(tag.field, f"shows {kind} {tag.place}, counted from 0, and the row has {files}")
    unseen = sorted(set(range(files)) - {tag.place for tag in tags if tag.place is not None})
    if unseen:
        raise row.bad(
            tags[0].field, f"{kind} {unseen[0]} of {files}, counted from 0, has no tag. Add a tag, or drop the {kind}"
        )


def _match(row: RowRef, kind: Kind, key: str, tags: Sequence[str], files: Sequence[Image | Video]) -> None:
    if len(tags) == len(files):
        return
    have = f'{counted(len(tags), f"<{kind}> tag", zero="no")}, {counted(len(files), "path", zero="no")} in "{key}"'
    if len(tags) < len(files):
        way = "" if tags else "; or use --missing_tags first, which shows all of them at the beginning"
        raise row.bad(files[len(tags)].field, f"{have}. Add a tag to the human turn it belongs to, or drop a path{way}")
    raise row.bad(tags[len(files)], f"{have}. Add a path or drop a tag")


def _each_nframes(row: RowRef, shape: PlainRow, clips: list[Image | Video]) -> list[Image | Video]:
    if not shape.nframes:
        return clips
    if len(shape.nframes) != len(clips):
        raise row.bad(
            "num_frames",
            f"{counted(len(shape.nframes), 'number')}, {counted(len(clips), 'video', zero='no')}. Write one number for "
            "each video",
        )
    return [
        medium
        if isinstance(medium, Video) and medium.frames
        else replace(medium, overrides=within(medium.overrides, Overrides(nframes=nframes)))
        for medium, nframes in zip(clips, shape.nframes, strict=True)
    ]


def parts_of(entry: Entry, media: dict[Kind, Iterator]) -> tuple[Part, ...]:
    """Return the pieces of a turn, with each placeholder replaced by the next medium of its kind."""
    return tuple(next(media[piece.kind]) if isinstance(piece, Shown) else piece for piece in entry.pieces)
