"""Convert published data sets to a data file and a folder of pictures. Pictures keep their bytes.

`stories` converts rows of StoryReasoning, `parquet` reads rows, and `folder` writes the result atomically.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from vlft.convert.folder import appearing_folder, finished, write_record
from vlft.convert.parquet import BadShard, Shard, find_shards, read_rows
from vlft.convert.stories import COLUMNS, SPLITS, BadStory, Story, story_of
from vlft.data.media.pictures import Unreadable, read_pixels
from vlft.data.rows.records import parse_record
from vlft.errors import ConfigError, DataError
from vlft.families import DEFAULT

__all__ = ["Imported", "Skipped", "import_stories"]

FORMAT = 1
THREADS = 4  # threads that decode pictures to check them; Pillow releases the GIL


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """Rows that were left out, and why.

    Attributes:
        file: the parquet file.
        row: index of the row in the file, from 0. None: the whole file, or the rest of it, was left out.
        rows: how many rows were left out. None: unknown.
        id: the id of the story, if it is known.
        reason: what is wrong and what to do.
    """

    file: str
    row: int | None
    rows: int | None
    id: str | None
    reason: str

    def __str__(self) -> str:
        where = "" if self.row is None else f", row {self.row}"
        name = f" (story {self.id})" if self.id is not None else ""
        lost = "" if self.row is not None else f" [{'all its' if self.rows is None else f'{self.rows:,}'} rows]"
        return f"{self.file}{where}{name}: {self.reason}{lost}"


@dataclass(frozen=True, kw_only=True)
class Imported:
    """The result of an import.

    Attributes:
        out: the folder.
        rows: split -> rows read.
        stories: split -> stories written.
        pictures: split -> pictures written.
        skipped: the rows that were read but not written.
        remarks: messages about files that were not read or are missing.
        before: whether an earlier call had already imported everything.
    """

    out: str
    rows: dict[str, int]
    stories: dict[str, int]
    pictures: dict[str, int]
    skipped: tuple[Skipped, ...]
    remarks: tuple[str, ...]
    before: bool = False

    def file(self, split: str) -> str:
        """Return the path of the data file of a split."""
        return os.path.join(self.out, f"{split}.jsonl")


def import_stories(
    source: str, out: str, *, limit: int | None = None, on_bad_row: str = "error", say: Callable[[str], None] = print
) -> Imported:
    """Convert the parquet files of StoryReasoning to `out/train.jsonl`, `out/test.jsonl` and `out/images/`.

    Rows are read a few at a time. Each picture is written with its bytes unchanged, and decoded once to check it.

    Args:
        source: folder with `train*.parquet` and `test*.parquet`, at any depth.
        out: a new or empty folder. It is written atomically: after an error, nothing is there.
        limit: number of rows of each split, from the first. None: all.
        on_bad_row: `error` stops at the first row or file that cannot be imported; `skip` leaves it out and lists it.
        say: function that shows a line to the user.

    Raises:
        ConfigError: a row or file cannot be imported, `source` does not exist, or `out` holds something else or cannot
            be written.
    """
    shards, remarks = find_shards(Path(source), splits=SPLITS, columns=COLUMNS)
    made_of = {
        "format": FORMAT,
        "set": "story-reasoning",
        "files": [[str(shard.path.relative_to(source)), shard.size] for shard in shards],
        "limit": limit,
        "on_bad_row": on_bad_row,
    }
    if (before := finished(Path(out), made_of)) is not None:
        skipped = tuple(Skipped(**row) for row in before["skipped"])
        counts = {key: before[key] for key in ("rows", "stories", "pictures")}
        return Imported(out=out, **counts, skipped=skipped, remarks=tuple(before["remarks"]), before=True)
    for line in remarks:
        say(f"warning: {line}")
    with appearing_folder(Path(out), say) as folder, ThreadPoolExecutor(THREADS) as pool:
        work = _Import(folder=folder, limit=limit, skip=on_bad_row == "skip", pool=pool)
        total = sum(min(_rows(shards, split), _rows(shards, split) if limit is None else limit) for split in SPLITS)
        # Shown only on a terminal, after a few seconds.
        with tqdm(total=total, desc="importing stories", unit="story", disable=None, delay=2) as bar:
            for split in dict.fromkeys(shard.split for shard in shards):
                work.split([shard for shard in shards if shard.split == split], split, bar)
        found = Imported(
            out=out,
            rows=work.rows,
            stories=work.stories,
            pictures=work.pictures,
            skipped=tuple(work.skipped),
            remarks=tuple(remarks),
        )
        if not sum(found.stories.values()):
            raise ConfigError(
                f"{source}: no story can be imported ({len(found.skipped)} faults, e.g. {found.skipped[0]})"
            )
        record = asdict(found)
        write_record(folder, {"made_of": made_of, **{k: v for k, v in record.items() if k not in ("out", "before")}})
    return found


def _rows(shards: list[Shard], split: str) -> int:
    return sum(shard.rows for shard in shards if shard.split == split and shard.fault is None)


class _Import:
    """An import in progress: its counts, and the folder that it fills."""

    def __init__(self, *, folder: Path, limit: int | None, skip: bool, pool: Executor) -> None:
        self.folder, self.limit, self.skip, self.pool = folder, limit, skip, pool
        self.rows: dict[str, int] = {}
        self.stories: dict[str, int] = {}
        self.pictures: dict[str, int] = {}
        self.skipped: list[Skipped] = []

    def split(self, shards: list[Shard], split: str, bar: Any) -> None:
        """Write the data file and the pictures of a split."""
        self.rows[split] = self.stories[split] = self.pictures[split] = 0
        with open(self.folder / f"{split}.jsonl", "w", encoding="utf-8") as lines:
            for shard in shards:
                if self.limit is not None and self.rows[split] >= self.limit:
                    return
                self._shard(shard, split, lines, bar)

    def _shard(self, shard: Shard, split: str, lines: IO[str], bar: Any) -> None:
        file = str(shard.path)
        if shard.fault is not None:
            self.rows[split] += shard.rows
            self._leave_out(Skipped(file=file, row=None, rows=shard.rows or None, id=None, reason=shard.fault))
            return
        place = 0
        try:
            for place, row in enumerate(read_rows(shard, COLUMNS), start=1):
                if self.limit is not None and self.rows[split] >= self.limit:
                    return
                self.rows[split] += 1
                self._row(row, split, lines, file=file, place=place - 1)
                bar.update()
        except BadShard as error:
            lost = shard.rows - place
            self.rows[split] += lost
            reason = f"from row {place} on {error}"
            self._leave_out(Skipped(file=file, row=None, rows=lost, id=None, reason=reason))

    def _row(self, row: dict[str, Any], split: str, lines: IO[str], *, file: str, place: int) -> None:
        # Named by the row's index in its split, which does not depend on skipped rows; ids may be any text.
        folder = Path("images", split, f"{self.rows[split] - 1:05d}")
        try:
            story = story_of(row)
            record = self._written(story, folder)
        except BadStory as error:
            shutil.rmtree(self.folder / folder, ignore_errors=True)
            name = row["story_id"] if isinstance(row["story_id"], str) else None
            self._leave_out(Skipped(file=file, row=place, rows=1, id=name, reason=str(error)))
            return
        lines.write(json.dumps(record, ensure_ascii=False) + "\n")
        self.stories[split] += 1
        self.pictures[split] += len(story.pictures)

    def _written(self, story: Story, folder: Path) -> dict[str, Any]:
        """Write the pictures of a story and return its row. Pictures are numbered from 1, as in the tags of the set."""
        paths = [str(folder / f"image{i}{ending}") for i, ending in enumerate(story.endings, start=1)]
        record = story.record(paths)
        try:  # refuse a tag or a control token in the text now, not when training starts
            parse_record(record, file="", index=0, image_folder=str(self.folder), family=DEFAULT)
        except DataError as error:
            raise BadStory(f"{error.row.field}: {error.row.reason}") from error
        (self.folder / folder).mkdir(parents=True)
        for path, data in zip(paths, story.pictures, strict=True):
            (self.folder / path).write_bytes(data)
        for i, fault in enumerate(self.pool.map(_fault, [str(self.folder / path) for path in paths])):
            if fault is not None:
                raise BadStory(f"images[{i}]: {fault}")
        return record

    def _leave_out(self, what: Skipped) -> None:
        if not self.skip:
            raise ConfigError(f"{what}\n  Or leave out all such rows and list them: --on_bad_row skip")
        self.skipped.append(what)


def _fault(path: str) -> str | None:
    """Return why a picture cannot be decoded; None if it can."""
    try:
        read_pixels(path)
    except Unreadable as error:
        return str(error).removeprefix(f"{path}: ")
    return None
