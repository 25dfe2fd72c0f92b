"""Read WebDataset tars as rows: members with one key are a row, such as `000.jpg` with `000.json` or `000.txt`.

Members are read in order and never written under their own names: media files are named by their content. Formats
that run code when they are read (pickles) are refused. The format: https://github.com/webdataset/webdataset
"""

from __future__ import annotations

import json
import lzma
import os
import re
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vlft.data.rows.keys import MEDIA_KEYS, Kind
from vlft.data.rows.source import LINE_BYTES, PICTURES, SOUNDS, VIDEOS, BrokenLine, Keep, Source
from vlft.errors import ConfigError

TEXTS = (".txt", ".text", ".caption", ".cls", ".cls2", ".transcript")
# Endings of formats that run code when they are read, or hold arrays instead of pictures.
REFUSED = (".pyd", ".pickle", ".pkl", ".pth", ".pt", ".ten", ".tb", ".npy", ".npz", ".mp", ".msg")
PICTURE_BYTES = 1 << 30
VIDEO_BYTES = 4 << 30
NESTED_KEYS = ("url", "path")  # these also name media, but only inside objects of the row
NAMING_KEYS = (*NESTED_KEYS, *(key for keys in MEDIA_KEYS.values() for key in keys))
HEADER_BYTES = 1 << 20  # limit for headers with names and attributes
BLOCK = 512  # bytes; two empty blocks end a tar
_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]+)")
_KINDS = {
    tarfile.SYMTYPE: "a link",
    tarfile.LNKTYPE: "a link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a named pipe",
}
_LONG_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)
_JUNK = ("._", ".DS_Store", "Thumbs.db")  # files that macOS and Windows add


def tar_source(path: str, files: Sequence[str]) -> Source:
    """Open tars (also compressed by gzip, bzip2 or xz) as one table.

    Its columns are the endings of members and the keys of their JSON.

    Args:
        path: the data file as the user named it.
        files: the tars, in order.
    """

    def rows(keep: Keep) -> Iterator[dict[str, Any] | BrokenLine]:
        for file in files:
            yield from _rows(file, keep)

    return Source(columns=None, size=sum(map(os.path.getsize, files)), unit="B", rows=rows)


class _Member(tarfile.TarInfo):
    """A member whose header has a plausible size. tarfile would read a longer header into memory."""

    def _proc_member(self, tar: tarfile.TarFile) -> Any:  # Python 3.11 to 3.14 call it for each header
        if self.type in _LONG_HEADERS and self.size > HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {self.size:,} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


@dataclass(kw_only=True)
class _Sample:
    """The members of one key that were read so far.

    Attributes:
        key: the key.
        row: the columns of the row.
        media: kind -> ending of a member -> path of its file.
        members: endings of its members.
        wrong: why the row cannot be read; empty if it can.
    """

    key: str
    row: dict[str, Any] = field(default_factory=dict)
    media: dict[Kind, dict[str, str]] = field(default_factory=lambda: {"image": {}, "video": {}})
    members: set[str] = field(default_factory=set)
    wrong: str = ""


def _rows(file: str, keep: Keep) -> Iterator[dict[str, Any] | BrokenLine]:
    sample: _Sample | None = None
    seen: set[int] = set()  # hashes of keys, which need less memory than millions of keys
    done = 0
    try:
        with open(file, "rb") as raw, tarfile.open(fileobj=raw, mode="r|*", tarinfo=_Member) as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # before Python 3.13, all members stay in memory
                done, before = raw.tell(), done
                keep.done(done - before)
                name = _split(file, member)
                if name is None:
                    continue
                key, ending = name
                if sample is None or key != sample.key:
                    if sample is not None:
                        yield _row(sample)
                    if hash(key) in seen:
                        raise ConfigError(
                            f"{file}: the members of {key} are not next to each other. Write the tar again, sorted: "
                            "tar --sort=name -cf new.tar FOLDER"
                        )
                    seen.add(hash(key))
                    sample = _Sample(key=key)
                if ending in sample.members:
                    raise ConfigError(f"{file}: holds {member.name} twice. Write the tar again with each member once.")
                sample.members.add(ending)
                _take(file, sample, ending, tar, member, keep)
            _check_end(file, tar)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk, which `unpack` reports
        raise ConfigError(
            f"{file}: damaged or cut short, or not a tar ({error}). Download or write it again."
        ) from error
    if sample is not None:
        yield _row(sample)


def _split(file: str, member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Return key and ending (`.jpg`, `.0.jpg`) of a member; None if it does not belong to a row."""
    name = member.name
    base = name.rpartition("/")[2]
    if member.isdir() or base.startswith(_JUNK[0]) or base in _JUNK:
        return None
    if not member.isreg() or member.issparse():
        kind = "a sparse file" if member.issparse() else _KINDS.get(member.type, "not a regular file")
        raise ConfigError(f"{file}: its member {name} is {kind}. Write the tar again with regular files (tar -h).")
    found = _NAME.fullmatch(name)
    if found is None:
        raise ConfigError(
            f"{file}: its member {name} has no key and ending (such as 000.jpg), so it belongs to no row. Write the "
            "tar without it."
        )
    return found[1], f".{found[2]}"


def _take(file: str, sample: _Sample, ending: str, tar: tarfile.TarFile, member: tarfile.TarInfo, keep: Keep) -> None:
    """Add a member to its row."""
    last = f".{ending.rpartition('.')[2].lower()}"
    column = ending[1:]
    if last in REFUSED:
        raise ConfigError(
            f"{file}: its member {member.name} is not read: pickles run code when they are read, and arrays are not "
            "picture files. Write texts as .json or .txt, pictures as .jpg or .png."
        )
    if last in PICTURES or last in VIDEOS:
        kind: Kind = "image" if last in PICTURES else "video"
        most = PICTURE_BYTES if last in PICTURES else VIDEO_BYTES
        if member.size > most:
            sample.wrong = f"its member {member.name} has {member.size:,} bytes, and {most:,} at most are read"
            return
        content = tar.extractfile(member)
        if content is not None and member.size:
            sample.media[kind][column] = keep.file(content)
        else:
            sample.wrong = f"its member {member.name} is empty. Write it again"
    elif last in SOUNDS:
        sample.row["audio"] = member.name  # `records` refuses rows with this key
    elif last == ".json" or last in TEXTS:
        if member.size > LINE_BYTES:
            sample.wrong = f"its member {member.name} has more than {LINE_BYTES:,} bytes. Split the row"
            return
        content = tar.extractfile(member)
        _add_text(sample, member.name, column, content.read() if content is not None else b"")
    else:
        sample.row[column] = f"({member.size:,} bytes)"


def _add_text(sample: _Sample, name: str, column: str, content: bytes) -> None:
    is_json = column.lower().endswith("json")
    try:
        text = content.decode("utf-8-sig")
        if not is_json:
            sample.row[column] = text.strip("\r\n")
            return
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        sample.wrong = (
            f"its member {name} is not {'JSON' if column.lower().endswith('json') else 'text'}: {error}. Fix it"
        )
        return
    if column.lower() != "json":
        sample.row[column.rpartition(".")[0]] = value
    elif isinstance(value, dict):
        sample.row |= value
    elif isinstance(value, list):
        sample.row["conversations"] = value
    else:
        sample.wrong = f"its member {name} holds neither an object nor a list of turns"


def _row(sample: _Sample) -> dict[str, Any] | BrokenLine:
    row: dict[str, Any] = {"id": sample.key} | sample.row
    if sample.wrong:
        return BrokenLine(reason=sample.wrong, row=row)
    for kind, media in sample.media.items():
        if not media:
            continue
        base = sample.key.rpartition("/")[2]
        files = {f"{base}.{ending}": path for ending, path in sorted(media.items(), key=lambda item: _natural(item[0]))}
        used: set[str] = set()
        row = {key: value if key in NESTED_KEYS else _named(value, key, files, used) for key, value in row.items()}
        if used and (left := files.keys() - used):
            return BrokenLine(
                reason=f"its .json names {min(used)} and not {min(left)}. Name all members, or none of them", row=row
            )
        if used:
            continue
        key = next((key for key in MEDIA_KEYS[kind] if row.get(key) not in (None, "", [])), kind)
        named = row.get(key)
        if named is not None and (count := len(named) if isinstance(named, list) else 1) != len(files):
            reason = f'{count} in "{key}" of its .json, and {len(files)} such members beside it. Make them agree'
            return BrokenLine(reason=reason, row=row)
        row[key] = next(iter(files.values())) if len(files) == 1 else list(files.values())
    return row


def _named(value: Any, key: str, files: dict[str, str], used: set[str]) -> Any:
    """Replace names of members in a value of the row's JSON by the paths of their files."""
    if isinstance(value, str):
        name = value.rpartition("/")[2]
        if key in NAMING_KEYS and name in files and "://" not in value:
            used.add(name)
            return files[name]
        return value
    if isinstance(value, list):
        return [_named(item, key, files, used) for item in value]
    if isinstance(value, dict):
        return {inner: _named(item, inner, files, used) for inner, item in value.items()}
    return value


def _natural(ending: str) -> tuple[int, list[Any]]:
    """Sort key that puts `jpg` first, and `2.jpg` before `10.jpg`."""
    middle = ending.rpartition(".")[0]
    parts = re.split(r"(\d+)", middle)
    return bool(middle), [int(part) if i % 2 else part for i, part in enumerate(parts)]


def _check_end(file: str, tar: tarfile.TarFile) -> None:
    """Refuse a tar without an end, or with data after its end: rows would be dropped silently."""
    stream: Any = tar.fileobj
    while rest := stream.read(1 << 20):
        if rest.strip(b"\0"):
            raise ConfigError(
                f"{file}: has data after its end, for example another tar (cat). Pass the tars as separate files."
            )
    if file.lower().endswith(".tar"):
        with open(file, "rb") as raw:
            raw.seek(-min(BLOCK, os.path.getsize(file)), os.SEEK_END)
            if raw.read(BLOCK).strip(b"\0"):
                raise ConfigError(f"{file}: is cut short: a tar ends in empty blocks. Download or write it again.")
