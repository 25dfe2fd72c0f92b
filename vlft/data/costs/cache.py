"""Cache of per-row results of `scan`, such as costs, saved between runs (`vlft.data.costs.store`).

A row's result is reused if its conversation and the settings are the same, and every file that it names has the same
size and modification time. All other rows, and refused rows, are scanned again. Depends on `scan`, not on flags or on
where lines are printed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from vlft import __version__
from vlft.data.costs.store import FORMAT, Store
from vlft.data.dataset import SCAN_CHUNK, MediaProbe, scan
from vlft.data.encode import Encoder
from vlft.data.files.index import RowIndex
from vlft.data.identity import Marks
from vlft.data.sample import Cost, Overrides, Sample, Text
from vlft.errors import BadRow
from vlft.files import cache_folder

# The number of tokens or patches of a row may depend on the versions of these packages.
PACKAGES = ("transformers", "tokenizers", "jinja2", "pillow", "qwen-vl-utils", "decord", "av")
STAMPS = 200_000  # files whose size and modification time a process remembers

T = TypeVar("T")


def cost_folder(environ: Mapping[str, str]) -> Path | None:
    """Return the folder of the cost cache: `VLFT_COST_CACHE`, or `vlft/costs` in the user's cache folder.

    Returns:
        None if `VLFT_COST_CACHE` is 0 or empty, or the user has no home folder: nothing is cached then.
    """
    return cache_folder(environ, variable="VLFT_COST_CACHE", name="costs")


def scan_costs(
    samples: RowIndex,
    encoder: Encoder,
    *,
    workers: int,
    folder: Path | None,
    note: Callable[[str], None],
    marks: Marks | None = None,
) -> Generator[Cost | BadRow, None, None]:
    """Measure the cost of each row from the headers of its files, or take it from the cache.

    Args:
        samples: rows; indexing one may raise `DataError`.
        encoder: measures the rows.
        workers: worker processes, as in `scan`.
        folder: folder of the cache; None caches nothing.
        note: receives a line for the user if the cache cannot be read or written.
        marks: collects the digests of all rows that can be read; None: they are not computed.

    Raises:
        ConfigError: the errors of `scan`.
    """
    what = "costs of rows"
    return scan_kept(
        samples, encoder.measure, encoder, Costing, workers=workers, folder=folder, note=note, what=what, marks=marks
    )


class Costing:
    """Converts a `Cost` to and from the JSON value in the cache."""

    name = "cost"

    @classmethod
    def dump(cls, cost: Cost) -> list[Any]:
        rare: list[Any] = [cost.changed, cost.answer, cost.thinking, [cls.dump(part) for part in cost.parts]]
        rare += [list(cost.branches)] if cost.branches else []
        counts = [cost.tokens, cost.supervised, cost.patches, cost.images, cost.videos]
        return [*counts, *(rare if rare != ["", None, None, []] else [])]

    @classmethod
    def load(cls, value: Any) -> Cost:
        """Convert a value back; raises `TypeError` or `ValueError` if it is not a cost."""
        tokens, supervised, patches, images, videos, *rare = value
        changed, answer, thinking, parts, *branches = rare or ("", None, None, ())
        return Cost(
            tokens=int(tokens),
            supervised=int(supervised),
            patches=int(patches),
            images=int(images),
            videos=int(videos),
            changed=str(changed),
            answer=None if answer is None else int(answer),
            thinking=None if thinking is None else bool(thinking),
            parts=tuple(map(cls.load, parts)),
            branches=tuple(int(tokens) for some in branches for tokens in some),
        )


def scan_kept(
    samples: RowIndex,
    look: Callable[[Sample], T],
    encoder: Encoder | MediaProbe,
    form: Any,
    *,
    workers: int,
    folder: Path | None,
    note: Callable[[str], None],
    what: str,
    chunk: int = SCAN_CHUNK,
    marks: Marks | None = None,
) -> Generator[T | BadRow, None, None]:
    """Apply a function to each row as `scan` does, except for rows whose result is in the cache.

    Args:
        samples: rows; indexing one may raise `DataError`.
        look: function of a row, called in the worker processes.
        encoder: object whose settings determine the result.
        form: converts results: `name`, `dump` and `load`, as `Costing` has them.
        workers: worker processes, as in `scan`.
        folder: folder of the cache; None caches nothing.
        note: receives a line for the user if the cache cannot be read or written.
        what: name of the cached results, for these lines.
        chunk: rows that a worker returns at once.
        marks: collects the digests of all rows that can be read; None: they are not computed.

    Yields:
        one result per sample, or its `BadRow` if the row is refused.

    Raises:
        ConfigError: the errors of `scan`.
    """
    settings = None if folder is None else _settings_print(encoder, form.name)
    if folder is None or settings is None:
        yield from _scan(samples, look, marks, workers=workers, chunk=chunk)
        return
    stores = {file.name: Store(folder / _name(file.name, settings), note=note, what=what) for file in samples.files}
    results = _scan(samples, _Remembering(look, stores, form), marks, workers=workers, chunk=chunk)
    whole = False
    try:
        for place, result in enumerate(results):
            if isinstance(result, BadRow):
                yield result
                continue
            store = stores[samples.files[samples.file_of[place]].name]
            if result.fresh:
                store.put(result.key, form.dump(result.value))
            else:
                store.use()
            yield result.value
        whole = True
    finally:
        for store in stores.values():
            store.close(whole=whole)


def _scan(
    samples: RowIndex, look: Callable[[Sample], T], marks: Marks | None, *, workers: int, chunk: int
) -> Generator[T | BadRow, None, None]:
    """Do what `scan` does, and hand the digest of each row to `marks`."""
    if marks is None:
        yield from scan(samples, look, workers=workers, chunk=chunk)
        return
    for place, result in enumerate(scan(samples, _Marking(look, marks), workers=workers, chunk=chunk)):
        if isinstance(result, BadRow):
            yield result
        else:
            value, mark = result
            marks.take(place, mark)
            yield value


@dataclass(frozen=True, slots=True)
class _Marking(Generic[T]):
    look: Callable[[Sample], T]
    marks: Marks

    def __call__(self, sample: Sample) -> tuple[T, bytes]:
        return self.look(sample), self.marks.mark(sample)


@dataclass(frozen=True, slots=True)
class _Result(Generic[T]):
    key: bytes
    value: T
    fresh: bool


class _Remembering(Generic[T]):
    """Calls a function of a row, unless a store has the result."""

    def __init__(self, look: Callable[[Sample], T], stores: Mapping[str, Store], form: Any) -> None:
        self.look = look
        self.stores = stores
        self.form = form
        self._stamps: dict[str, tuple[int, int]] = {}

    def __call__(self, sample: Sample) -> _Result[T]:
        key = key_of(sample, self._stamp)
        known = self.stores[sample.file].get(key)
        if known is not None:
            try:
                return _Result(key, self.form.load(known), False)
            except (TypeError, ValueError, KeyError):
                pass  # not written by vlft
        return _Result(key, self.look(sample), True)

    def _stamp(self, path: str) -> tuple[int, int]:
        """Return size in bytes and modification time in nanoseconds."""
        if path not in self._stamps:
            if len(self._stamps) >= STAMPS:
                self._stamps.clear()
            try:
                stat = os.stat(path)
                self._stamps[path] = (stat.st_size, stat.st_mtime_ns)
            except (OSError, ValueError):
                self._stamps[path] = (-1, -1)
        return self._stamps[path]


def key_of(sample: Sample, stamp: Callable[[str], tuple[int, int]]) -> bytes:
    """Hash everything in a row that determines its cost, its conversation and its files, to 16 bytes.

    Args:
        stamp: returns size and modification time of a file. They are read before the row is measured: if a file changes
            in the meantime, the next run sees other values.
    """

    def plain(part: Any) -> Any:
        if isinstance(part, Text):
            return part.text if part.trained else ["masked", part.text]
        own = () if part.overrides == Overrides() else astuple(part.overrides)
        return [type(part).__name__, *own, *((os.path.abspath(path), *stamp(path)) for _, path in part.files)]

    turns, rejected = (
        [[turn.role, [plain(part) for part in turn.parts]] for turn in some] for some in (sample.turns, sample.rejected)
    )
    row = [turns, None if sample.objects is None else asdict(sample.objects), sample.warnings]
    row += [{"rejected": rejected}] if rejected else []
    return hashlib.blake2b(json.dumps(row).encode(), digest_size=16).digest()


def _settings_print(encoder: Encoder | MediaProbe, form: str) -> str | None:
    """Hash all settings that determine a result; None if the tokenizer has no fingerprint."""
    recipe = encoder.recipe
    family = encoder.family.model_type if isinstance(encoder, Encoder) else None
    if family is not None and recipe.tokenizer is None:
        return None
    packages = [_version(package) for package in PACKAGES]
    if type(encoder) not in (Encoder, MediaProbe):
        own = {one.name: getattr(encoder, one.name) for one in fields(encoder)[len(fields(Encoder)) :]}
        form = f"{form} of {type(encoder).__name__} {own}"  # it measures the same rows otherwise
    what = {"format": FORMAT, "form": form, "vlft": __version__, "packages": packages, "family": family}
    return hashlib.sha256(json.dumps(what | {"recipe": recipe.print}, sort_keys=True).encode()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _name(file: str, settings: str) -> str:
    real = os.path.realpath(file)
    return hashlib.sha256(f"{settings} {real}".encode(errors="surrogateescape")).hexdigest() + ".sqlite"
