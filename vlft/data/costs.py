"""Costs of rows, kept on disk between runs, so that starting again opens no picture whose file is as it was.

One entry for each data file and set of settings, in numpy's .npz. A row is taken from it where its conversation is the
same and every file it names has the size and the time of change it had when it was measured; all others, and rows that
were refused, are measured again. An entry is written aside and moved into place, so runs that start together never see
half of one; the last to finish leaves its own. Knows `scan`, but neither flags nor where lines are printed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import struct
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

import numpy as np

from vlft import __version__
from vlft.data.caches import appearing, cache_folder
from vlft.data.dataset import scan
from vlft.data.encode import Encoder
from vlft.data.sample import Cost, Image, Overrides, Sample, Text, Video
from vlft.errors import BadRow

FORMAT = 1  # raise it whenever a row may cost something else than before, or the arrays change
KEPT_ENTRIES = 200
KEPT_BYTES = 2 << 30
# They decide how many tokens or patches a file becomes.
PACKAGES = ("transformers", "tokenizers", "jinja2", "pillow", "qwen-vl-utils", "decord", "av")
# What numpy and zipfile are known to raise on files that are cut or overwritten.
BROKEN_ENTRY = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RuntimeError,
    MemoryError,
    OverflowError,
    struct.error,
    zipfile.BadZipFile,
)

_Stamp = tuple[int, int]  # size in bytes, time of change in nanoseconds
_Known = dict[bytes, tuple[Cost, tuple[_Stamp, ...]]]  # row -> what it cost, and its files then


def cost_folder(environ: Mapping[str, str]) -> Path | None:
    """Where costs are kept: `VLFT_COST_CACHE`, or `vlft/costs` in the user's cache folder.

    Returns:
        None where `VLFT_COST_CACHE` is 0 or empty, or nobody knows the user's home: nothing is kept.
    """
    return cache_folder(environ, variable="VLFT_COST_CACHE", name="costs")


def scan_cached(
    samples: Sequence[Sample], encoder: Encoder, *, workers: int, folder: Path, note: Callable[[str], None]
) -> Iterator[Cost | BadRow]:
    """As `dataset.scan` without decoding, but only of rows that the cache does not know.

    Args:
        samples, encoder, workers: as for `scan`.
        folder: of the cache; made where it is missing.
        note: takes a line for the user: an entry that could not be read, or none that could be written.

    Yields:
        one `Cost` or `BadRow` a sample. What was measured is written when the last one is taken.

    Raises:
        ConfigError: as `scan`.
    """
    settings = _settings_print(encoder)
    if settings is None:
        yield from scan(samples, encoder, workers=workers)
        return
    rows = [_digest(sample) for sample in samples]
    stamps = _stamps(samples)
    entries = {file: folder / _name(file, settings) for file in dict.fromkeys(sample.file for sample in samples)}
    known = {file: _read(path, file, note) for file, path in entries.items()}
    costs = [_unchanged(known[s.file].get(row), stamp) for s, row, stamp in zip(samples, rows, stamps, strict=True)]
    fresh = scan([s for s, cost in zip(samples, costs, strict=True) if cost is None], encoder, workers=workers)
    kept: dict[str, _Known] = {file: {} for file in entries}
    measured = set()
    for sample, row, stamp, cost in zip(samples, rows, stamps, costs, strict=True):
        result = next(fresh) if cost is None else cost
        if isinstance(result, Cost):
            kept[sample.file][row] = (result, stamp)
            if cost is None:
                measured.add(sample.file)
        yield result
    try:
        for file, path in entries.items():
            if file in measured or kept[file].keys() != known[file].keys():
                _write(path, kept[file])
            else:
                with contextlib.suppress(FileNotFoundError):  # there was none, and there is nothing to keep
                    os.utime(path)
        _prune(folder)
    except OSError as error:
        note(f"{folder}: costs of rows cannot be kept for the next run ({error}). Set VLFT_COST_CACHE to a folder")


def _unchanged(entry: tuple[Cost, tuple[_Stamp, ...]] | None, stamps: tuple[_Stamp, ...]) -> Cost | None:
    return entry[0] if entry is not None and entry[1] == stamps else None


def _settings_print(encoder: Encoder) -> str | None:
    """A print of all that decides what a row costs; None where the tokenizer cannot be printed."""
    processor, tokenizer = encoder.processor, encoder.processor.tokenizer
    if not tokenizer.is_fast:
        return None
    tokenizer("", add_special_tokens=False)  # sheds the padding and truncation it may have been saved with
    what = {
        "vlft": __version__,
        "packages": [_version(package) for package in PACKAGES],
        "family": encoder.family.model_type,
        "media": asdict(encoder.media),
        "max_length": encoder.max_length,
        "fit": None if encoder.fit is None else asdict(encoder.fit),
        "chat_template": processor.chat_template or tokenizer.chat_template,
        "special_tokens": tokenizer.special_tokens_map,
        "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _name(file: str, settings: str) -> str:
    return hashlib.sha256(f"{settings} {os.path.realpath(file)}".encode(errors="surrogateescape")).hexdigest() + ".npz"


def _digest(sample: Sample) -> bytes:
    """16 bytes that stand for the conversation and the paths in it."""
    turns = [[turn.role, [_plain(part) for part in turn.parts]] for turn in sample.turns]
    return hashlib.blake2b(json.dumps(turns).encode(), digest_size=16).digest()


def _plain(part: Any) -> Any:
    if isinstance(part, Text):
        return part.text
    own = () if part.overrides == Overrides() else astuple(part.overrides)
    return [type(part).__name__, *own, *(os.path.abspath(path) for path in _paths(part))]


def _paths(part: Image | Video) -> tuple[str, ...]:
    return tuple(path for _, path in part.files)


def _stamps(samples: Sequence[Sample]) -> list[tuple[_Stamp, ...]]:
    """Size and time of every media file of each row, taken before any is measured: one that changes meanwhile is
    entered with the stamp it had, and measured again by the next run."""
    seen: dict[str, _Stamp] = {}

    def stamp(path: str) -> _Stamp:
        if path not in seen:
            try:
                stat = os.stat(path)
                seen[path] = (stat.st_size, stat.st_mtime_ns)
            except (OSError, ValueError):
                seen[path] = (-1, -1)
        return seen[path]

    return [tuple(stamp(path) for part in sample.media for path in _paths(part)) for sample in samples]


def _read(path: Path, file: str, note: Callable[[str], None]) -> _Known:
    """The entry of a data file; empty, with a word to the user, where it is not whole."""
    try:
        with np.load(path, allow_pickle=False) as entry:
            found = int(entry["format"])
            if found != FORMAT:
                raise ValueError(f"its format is {found}, this vlft writes {FORMAT}")
            rows, costs, counts, stamps = (entry[name] for name in ("rows", "costs", "counts", "stamps"))
            changes = json.loads(entry["changes"].tobytes())
        shapes = (rows.shape, costs.shape, counts.shape, stamps.shape)
        if shapes != ((len(rows), 16), (len(rows), 3), (len(rows),), (int(counts.sum()), 2)):
            raise ValueError(f"its arrays have shapes {shapes}")
    except FileNotFoundError:
        return {}
    except BROKEN_ENTRY as error:
        note(f"{file}: costs of its rows are measured again, since {path} cannot be used ({error})")
        return {}
    pairs = iter(map(tuple, stamps.tolist()))
    return {
        row.tobytes(): (
            Cost(tokens=tokens, supervised=supervised, patches=patches, changed=changes.get(str(i), "")),
            tuple(next(pairs) for _ in range(count)),
        )
        for i, (row, (tokens, supervised, patches), count) in enumerate(
            zip(rows, costs.tolist(), counts.tolist(), strict=True)
        )
    }


def _write(path: Path, known: _Known) -> None:
    costs = [(cost.tokens, cost.supervised, cost.patches) for cost, _ in known.values()]
    changes = {i: cost.changed for i, (cost, _) in enumerate(known.values()) if cost.changed}  # of few rows
    arrays = {
        "format": np.array(FORMAT),
        "changes": np.frombuffer(json.dumps(changes).encode(), dtype=np.uint8),
        "rows": np.frombuffer(b"".join(known), dtype=np.uint8).reshape(-1, 16),
        "costs": np.array(costs, dtype=np.int64).reshape(-1, 3),
        "counts": np.array([len(stamps) for _, stamps in known.values()], dtype=np.int64),
        "stamps": np.array([pair for _, stamps in known.values() for pair in stamps], dtype=np.int64).reshape(-1, 2),
    }
    with appearing(path) as out:
        np.savez(out, **arrays)  # type: ignore[arg-type]


def _prune(folder: Path) -> None:
    """Drop the entries longest unused, and what killed runs left half-written."""
    entries, size = [], 0
    for item in os.scandir(folder) if folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # another run prunes, too
            stat = item.stat()
            if item.name.endswith(".npz"):
                entries.append((stat.st_mtime_ns, stat.st_size, item.path))
            elif item.name.endswith(".tmp") and time.time() - stat.st_mtime > 86400:
                os.unlink(item.path)
    for place, (_, bytes_, path) in enumerate(sorted(entries, reverse=True)):
        size += bytes_
        if place and (place >= KEPT_ENTRIES or size > KEPT_BYTES):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
