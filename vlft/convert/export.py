"""Write rows for other trainers: `OUT/data.parquet` and `OUT/export.json`, atomically. `export_rows` makes each row.

Rows are read, measured and written one at a time, so memory does not grow with the data set.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlft.config.flags import DataFlags, ModelFlags
from vlft.convert.export_rows import FORMS, Exportable, Kind, Pictures, picture_of
from vlft.convert.export_schema import schema_of
from vlft.convert.folder import appearing_folder
from vlft.data.encode import UNTRAINED
from vlft.data.files.index import RowIndex, each
from vlft.data.media.pictures import Unreadable
from vlft.data.media.read import MediaError
from vlft.data.sample import EncodedTokens, Image, Sample, Video
from vlft.errors import BadRow, ConfigError, DataError
from vlft.files import write_json
from vlft.screen import count
from vlft.setup import Base, open_base, open_rows

DATA, RECORD = "data.parquet", "export.json"
CALIBRATION_ROWS = 256  # as llm-compressor's examples
BYTES = 64 * 2**20  # of the rows that are held before they are written

#: Modules of a Qwen-VL that llm-compressor must not quantise. Its own examples write `re:visual.*`, which protects
#: nothing where transformers 5 names the tower `model.visual` (0.14: patterns match from the start of a name).
IGNORE = ("re:.*lm_head", "re:.*visual.*")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export.

    Attributes:
        kind: for which trainer.
        out: the folder.
        read: rows read.
        rows: rows written.
        skipped: the other rows, each with its reason.
        pictures: pictures written.
        max_prompt_length: tokens of the longest prompt, with its pictures, as vlft counts them for training.
        max_response_length: tokens of the longest answer, with the token that ends it.
        image_min_pixels: limit of the pixels of a picture.
        image_max_pixels: likewise.
    """

    kind: Kind
    out: str
    read: int
    rows: int
    skipped: tuple[BadRow, ...]
    pictures: int
    max_prompt_length: int
    max_response_length: int
    image_min_pixels: int
    image_max_pixels: int

    def next_lines(self) -> list[str]:
        """What to do with the file: settings of the trainer that agree with what was exported."""
        data = shlex.quote(str(Path(self.out) / DATA))
        pixels = f"min_pixels {self.image_min_pixels}, max_pixels {self.image_max_pixels}"
        if self.kind == "verl":
            return [
                f"verl: data.train_files={data} data.image_key=images data.prompt_key=prompt "
                f"data.max_prompt_length={self.max_prompt_length} data.max_response_length={self.max_response_length} "
                "data.filter_overlong_prompts=False data.truncation=error",
                f"pixels: each picture carries {pixels}, which verl passes to qwen-vl-utils",
            ]
        if self.kind == "trl":
            return [
                f'TRL: load_dataset("parquet", data_files="{Path(self.out) / DATA}", split="train")',
                f"length: the longest prompt has {self.max_prompt_length:,} tokens, the longest answer "
                f"{self.max_response_length:,}; set max_length=None, because cutting a row cuts its pictures",
                f"pixels: load the processor from a run folder, or with {pixels}",
            ]
        return [
            f"llm-compressor: {data} has `messages`, for the processor's chat template, and `images`",
            f"ignore: {list(IGNORE)}, which keeps the vision tower and the head in 16 bits",
            f"pixels: load the processor from a run folder, or with {pixels}",
        ]


def export(
    kind: Kind,
    paths: Sequence[str],
    out: str,
    data: DataFlags,
    model: ModelFlags,
    *,
    given: frozenset[str],
    pictures: Pictures = "original",
    limit: int | None = None,
    seed: int = 42,
    say: Callable[[str], None] = print,
) -> Exported:
    """Write rows for another trainer.

    Args:
        kind: the trainer.
        paths: data files.
        out: a new or empty folder. It appears only when it is complete.
        data: flags of the data. `on_bad_row` decides what happens to a row that cannot be exported.
        model: flags of the model, of which the base decides tokens and pixels.
        given: names of the flags that the user set.
        pictures: the bytes of the files, or the pixels that vlft trains.
        limit: write at most this many rows, spread over the data by `seed`; None: all, of a calibration 256.
        seed: of the choice.
        say: prints a line for the user.

    Raises:
        ConfigError: a row cannot be exported, no row is left, or `out` cannot be written.
        CheckpointError: the base cannot be opened.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{out}: already exists and is not empty. Name a new or empty folder.")
    base = open_base(data, model, given=given, plain=True)
    index = _chosen(
        open_rows(paths, data, base.family), CALIBRATION_ROWS if kind == "calibration" else None, limit, seed
    )
    work = _Export(kind=kind, base=base, pictures=pictures, stop=data.on_bad_row == "error")
    with appearing_folder(target, say) as folder:
        _write(folder / DATA, work.rows(index), schema_of(kind, pairs=data.pairs))
        if not work.rows_written:
            raise ConfigError(
                f"{', '.join(paths)}: no row can be exported ({len(work.bad)} were refused, e.g. {work.bad[0]})"
            )
        found = work.result(out, read=len(index))
        write_json(folder / RECORD, asdict(found) | {"vlft_pictures": pictures})
    return found


def _chosen(index: RowIndex, default: int | None, limit: int | None, seed: int) -> RowIndex:
    most = limit if limit is not None else default
    if most is None or most >= len(index):
        return index
    return index.take(np.sort(np.random.default_rng(seed).permutation(len(index))[:most]))


class _Export:
    """An export in progress: rows, and what was counted."""

    def __init__(self, *, kind: Kind, base: Base, pictures: Pictures, stop: bool) -> None:
        self.kind, self.base, self.pictures, self.stop = kind, base, pictures, stop
        self.bad: list[BadRow] = []
        self.rows_written = self.pictures_written = self.longest_prompt = self.longest_answer = 0

    def rows(self, index: RowIndex) -> Iterator[dict[str, Any]]:
        for one in count(each(index), total=len(index), what=f"exporting rows for {self.kind}"):
            try:
                if isinstance(one, BadRow):
                    raise DataError(one)
                row = self._row(one)
            except DataError as error:
                self._refuse(error.row)
                continue
            self.rows_written += 1
            self.pictures_written += len(row.pictures)
            yield FORMS[self.kind](row)

    def _row(self, sample: Sample) -> Exportable:
        encoder = self.base.encoder
        for part in sample.media:
            if isinstance(part, Video):
                why = f"an export for {self.kind} holds pictures, and this is a video. Leave such rows out"
                raise _refused(sample, part.field, why)
        if self.kind == "trl" and len(sample.rejected) > 1:
            raise _refused(
                sample, "rejected", f"TRL's pairs have one rejected answer, this row has {len(sample.rejected)}"
            )
        trained = encoder.as_trained(sample)
        prompt, answer = _lengths(encoder.tokens(trained))
        written = encoder.as_written(trained)
        pictures = []
        for part in written.media:
            if isinstance(part, Image):
                try:
                    pictures.append(picture_of(part, self.base.recipe, self.pictures))
                except (Unreadable, MediaError) as error:
                    raise _refused(sample, part.field, str(error)) from error
        self.longest_answer = max(self.longest_answer, answer)
        self.longest_prompt = max(self.longest_prompt, prompt)
        return Exportable(sample=written, pictures=tuple(pictures))

    def _refuse(self, row: BadRow) -> None:
        if self.stop:
            raise ConfigError(f"{row}\n  Fix the row, or leave out such rows and count them: --on_bad_row skip")
        self.bad.append(row)

    def result(self, out: str, *, read: int) -> Exported:
        recipe = self.base.recipe
        return Exported(
            kind=self.kind,
            out=out,
            read=read,
            rows=self.rows_written,
            skipped=tuple(self.bad),
            pictures=self.pictures_written,
            max_prompt_length=self.longest_prompt,
            max_response_length=self.longest_answer,
            image_min_pixels=recipe.image_min_pixels,
            image_max_pixels=recipe.image_max_pixels,
        )


def _lengths(tokens: EncodedTokens) -> tuple[int, int]:
    """Tokens of the prompt to the last answer, and of that answer; of a pair, of its longer answer."""
    if tokens.branches:
        return tokens.branches[0], max(tokens.branches[1:])
    trained_K = np.flatnonzero(tokens.labels_T != UNTRAINED)
    start = trained_K[np.flatnonzero(np.diff(trained_K, prepend=-2) > 1)[-1]]  # of the last run without a gap
    return int(start), int(trained_K[-1] + 1 - start)


def _refused(sample: Sample, field: str, reason: str) -> DataError:
    return DataError(BadRow(file=sample.file, index=sample.index, id=sample.id, field=field, reason=reason))


def _write(path: Path, rows: Iterable[dict[str, Any]], schema: Any) -> None:
    """Write a parquet file, a group of rows at a time."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    with ParquetWriter(path, schema) as file:
        held: list[dict[str, Any]] = []
        size = 0

        def flush() -> None:
            if held:
                file.write_table(pyarrow.Table.from_pylist(held, schema=schema))
                held.clear()

        for row in rows:
            held.append(row)
            size += sum(len(picture["bytes"]) for picture in row["images"]) + 4096
            if size >= BYTES:
                flush()
                size = 0
        flush()
