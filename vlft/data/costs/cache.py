"""What was found out about rows is found out once: results of `scan`, kept between runs (`vlft.data.costs.store`).

A row is taken from there where its conversation and the settings are the same, and every file it names has the size and
the time of change it had then; all others, and rows that were refused, are looked at again. Knows `scan`, but neither
flags nor where lines are printed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from vlft import __version__
from vlft.data.costs.store import FORMAT, Store
from vlft.data.dataset import SCAN_CHUNK, MediaProbe, scan
from vlft.data.encode import Encoder
from vlft.data.files.index import RowIndex
from vlft.data.sample import Cost, Overrides, Sample, Text
from vlft.errors import BadRow
from vlft.files import cache_folder

# They decide how many tokens or patches a file becomes.
PACKAGES = ("transformers", "tokenizers", "jinja2", "pillow", "qwen-vl-utils", "decord", "av")
STAMPS = 200_000  # of files, remembered by a process

T = TypeVar("T")


def cost_folder(environ: Mapping[str, str]) -> Path | None:
    """Where costs are kept: `VLFT_COST_CACHE`, or `vlft/costs` in the user's cache folder.

    Returns:
        None where `VLFT_COST_CACHE` is 0 or empty, or nobody knows the user's home: nothing is kept.
    """
    return cache_folder(environ, variable="VLFT_COST_CACHE", name="costs")


def scan_costs(
    samples: RowIndex, encoder: Encoder, *, workers: int, folder: Path | None, note: Callable[[str], None]
) -> Generator[Cost | BadRow, None, None]:
    """What each row costs by the headers of its files, measured only where it is not known.

    Args:
        samples, encoder, workers: as for `scan`.
        folder: of what is kept; None keeps nothing.
        note: takes a line for the user: what could not be read, or not be kept.

    Raises:
        ConfigError: as `scan`.
    """
    return scan_kept(
        samples, encoder.measure, encoder, Costing, workers=workers, folder=folder, note=note, what="costs of rows"
    )


class Costing:
    """How a `Cost` is kept."""

    name = "cost"

    @staticmethod
    def dump(cost: Cost) -> list[Any]:
        return [cost.tokens, cost.supervised, cost.patches, *([cost.changed] if cost.changed else [])]

    @staticmethod
    def load(value: Any) -> Cost:
        """Raises `TypeError` or `ValueError` for anything else."""
        tokens, supervised, patches, *changed = value
        (text,) = changed or [""]
        return Cost(tokens=int(tokens), supervised=int(supervised), patches=int(patches), changed=str(text))


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
) -> Generator[T | BadRow, None, None]:
    """As `scan`, but only at rows of which the result is not known.

    Args:
        samples, look, workers, chunk: as for `scan`.
        encoder: whose settings decide on the result.
        form: `name`, `dump` and `load` of a result.
        folder: of what is kept; None keeps nothing.
        note: takes a line for the user.
        what: is kept, for notes.

    Yields:
        one result or `BadRow` a sample.

    Raises:
        ConfigError: as `scan`.
    """
    settings = None if folder is None else _settings_print(encoder, form.name)
    if folder is None or settings is None:
        yield from scan(samples, look, workers=workers, chunk=chunk)
        return
    stores = {file.name: Store(folder / _name(file.name, settings), note=note, what=what) for file in samples.files}
    results = scan(samples, _Remembering(look, stores, form), workers=workers, chunk=chunk)
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


@dataclass(frozen=True, slots=True)
class _Result(Generic[T]):
    key: bytes
    value: T
    fresh: bool


class _Remembering(Generic[T]):
    """A look at a row that is spared where a store knows what it gives."""

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
                pass  # written by other hands
        return _Result(key, self.look(sample), True)

    def _stamp(self, path: str) -> tuple[int, int]:
        """Size in bytes and time of change in nanoseconds."""
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
    """16 bytes that stand for all of a row that decides what it costs: the conversation, and the files in it.

    Args:
        stamp: size and time of change of a file. They are taken before the row is looked at: a file that changes
            meanwhile has other ones by the next run.
    """

    def plain(part: Any) -> Any:
        if isinstance(part, Text):
            return part.text if part.trained else ["masked", part.text]
        own = () if part.overrides == Overrides() else astuple(part.overrides)
        return [type(part).__name__, *own, *((os.path.abspath(path), *stamp(path)) for _, path in part.files)]

    turns = [[turn.role, [plain(part) for part in turn.parts]] for turn in sample.turns]
    row = [turns, None if sample.objects is None else asdict(sample.objects), sample.warnings]
    return hashlib.blake2b(json.dumps(row).encode(), digest_size=16).digest()


def _settings_print(encoder: Encoder | MediaProbe, form: str) -> str | None:
    """A print of all that decides on a result; None where the tokenizer cannot be printed."""
    recipe = encoder.recipe
    family = encoder.family.model_type if isinstance(encoder, Encoder) else None
    if family is not None and recipe.tokenizer is None:
        return None
    packages = [_version(package) for package in PACKAGES]
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
