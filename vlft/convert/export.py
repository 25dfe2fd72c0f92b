"""Write rows for other trainers: `OUT/data.parquet` and `OUT/export.json`, atomically. `export_rows` makes each row.

Rows are read, measured and written one at a time, so memory does not grow with the data set.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from vlft.config.flags import DataFlags, ModelFlags
from vlft.config.thinking import takes_thoughts_apart
from vlft.convert.export_rows import FORMS, Exportable, Kind, Pictures, own_limits, picture_of, verl_tag_in
from vlft.convert.export_schema import schema_of
from vlft.convert.exported import DATA, RECORD, Exported
from vlft.convert.folder import appearing_folder
from vlft.data.encode import UNTRAINED
from vlft.data.files.index import RowIndex, each
from vlft.data.media.pictures import Unreadable
from vlft.data.media.read import MediaError
from vlft.data.render import thinking_of
from vlft.data.rows.parts import trained_answers, up_to
from vlft.data.sample import EncodedTokens, Image, Sample, Video
from vlft.errors import BadRow, ConfigError, DataError
from vlft.files import write_json
from vlft.screen import count
from vlft.setup import Base, open_base, open_rows, trainable_rows
from vlft.setup.held_out import hold_out
from vlft.text import counted

WARNED = 5  # kinds of warnings that are listed
WORKERS = 4  # processes that measure rows to hold some out
CALIBRATION_ROWS = 256  # as llm-compressor's examples
BYTES = 64 * 2**20  # of the rows that are held before they are written


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
        model: flags of the model. Its base decides tokens and pixels.
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
    if kind == "verl" and data.pairs:
        raise ConfigError("--method dpo: verl's rows have one answer, not pairs. Export pairs with: vlft export trl")
    base = open_base(data, model, given=given, plain=True)
    work = _Export(kind=kind, base=base, data=data, pictures=pictures)
    index = _chosen(work.open(paths, seed=seed), CALIBRATION_ROWS if kind == "calibration" else None, limit, seed)
    arguments = base.recipe.template_arguments(True)
    schema = schema_of(kind, pairs=data.pairs, arguments=arguments, apart=work.apart)
    with appearing_folder(target, say) as folder:
        _write(folder / DATA, work.rows(index), schema)
        if not work.rows_written:
            raise ConfigError(
                f"{', '.join(paths)}: no row can be exported ({len(work.bad)} were refused, e.g. {work.bad[0]})"
            )
        found = work.result(out)
        write_json(folder / RECORD, asdict(found) | {"vlft_pictures": pictures})
    return found


def _chosen(index: RowIndex, default: int | None, limit: int | None, seed: int) -> RowIndex:
    most = limit if limit is not None else default
    if most is None or most >= len(index):
        return index
    return index.take(np.sort(np.random.default_rng(seed).permutation(len(index))[:most]))


class _Export:
    """An export in progress: rows, and what was counted."""

    def __init__(self, *, kind: Kind, base: Base, data: DataFlags, pictures: Pictures) -> None:
        self.kind, self.base, self.data, self.pictures = kind, base, data, pictures
        processor = base.processor
        self.apart = takes_thoughts_apart(processor.chat_template or processor.tokenizer.chat_template)
        self.bad: list[BadRow] = []
        self.notes: list[str] = []
        self.arguments: Counter[str] = Counter()
        self.warned: dict[str, list[str]] = {}  # remark -> where, once for each row
        self.read = self.rows_written = self.samples_written = self.pictures_written = self.held_out = 0
        self.longest_prompt = self.longest_answer = self.resized = 0

    def open(self, paths: Sequence[str], *, seed: int) -> RowIndex:
        """Find the rows; with `--eval_split` those that a run trains."""
        if self.data.eval_split is None:
            return open_rows(paths, self.data, self.base.family)
        measured = trainable_rows(paths, self.data, self.base, workers=WORKERS)
        kept, held = hold_out(measured, self.data.eval_split, seed=seed)
        self.bad += measured.rows.bad
        self.read += len(self.bad)
        self.held_out = len(held.starts)
        self.notes += [
            f"{counted(self.held_out, 'row')} of --eval_split {self.data.eval_split:g} held out, as in training, and "
            "not exported",
            *kept.notes,
        ]
        index: Any = kept.rows.samples  # a RowIndex
        whole = index.take(kept.starts)
        return whole.split(np.full(len(whole), -1, dtype=np.int32))

    def rows(self, index: RowIndex) -> Iterator[dict[str, Any]]:
        """Yield the rows of the file. A row of the data is refused as a whole."""
        self.read += len(index)
        for one in count(each(index), total=len(index), what=f"exporting rows for {self.kind}"):
            try:
                if isinstance(one, BadRow):
                    raise DataError(one)
                made = self._made(one)
            except DataError as error:
                self._refuse(error.row)
                continue
            self.rows_written += 1
            for remark, field in {remark: field for field, remark in reversed(one.warnings)}.items():
                self.warned.setdefault(remark, []).append(f"{one.file}[{one.index}].{field}")
            for row in made:
                self.samples_written += 1
                self.pictures_written += len(row.pictures)
                if row.arguments:
                    self.arguments[json.dumps(row.arguments)] += 1
                yield FORMS[self.kind](row)

    def _made(self, sample: Sample) -> list[Exportable]:
        """Return what a row becomes: for a trainer a sample for each trained answer, for calibration one."""
        for part in sample.media:
            if isinstance(part, Video):
                why = f"an export for {self.kind} holds pictures, and this is a video. Leave such rows out"
                raise _refused(sample, part.field, why)
        if self.kind == "trl" and len(sample.rejected) > 1:
            raise _refused(
                sample, "rejected", f"TRL's pairs have one rejected answer, this row has {len(sample.rejected)}"
            )
        if self.kind == "verl" and sample.media and (found := verl_tag_in(sample)) is not None:
            field, tag = found
            raise _refused(
                sample,
                field,
                f"the text has {tag}, which verl reads as a mark of media in rows with pictures. Reword it",
            )
        encoder = self.base.encoder
        samples = encoder.samples(sample)
        written: list[Sample] = []
        lengths: list[tuple[int, int]] = []
        for trained in map(encoder.as_trained, samples if self.kind != "calibration" else samples[-1:]):
            lengths += _lengths(encoder.tokens(trained))
            whole = encoder.as_written(trained)
            answers = trained_answers(whole)
            apart = self.kind != "calibration" and whole.answer is None and len(answers) > 1
            written += [up_to(whole, answer) for answer in answers] if apart else [whole]
        read: dict[Image, dict[str, Any]] = {}  # samples of a row share its pictures
        made = [self._exportable(one, read) for one in written]
        self.longest_prompt = max(self.longest_prompt, *(prompt for prompt, _ in lengths))
        self.longest_answer = max(self.longest_answer, *(answer for _, answer in lengths))
        if self.kind != "verl" and self.pictures == "original":
            self.resized += sum(own_limits(image, self.base.recipe) for image in read)
        return made

    def _exportable(self, sample: Sample, read: dict[Image, dict[str, Any]]) -> Exportable:
        recipe = self.base.recipe
        pictures = []
        for part in sample.media:
            if isinstance(part, Image):
                try:
                    if part not in read:
                        read[part] = picture_of(part, recipe, self.pictures, limits=self.kind == "verl")
                    pictures.append(read[part])
                except (Unreadable, MediaError) as error:
                    raise _refused(sample, part.field, str(error)) from error
        arguments = recipe.template_arguments(thinking_of(sample, recipe))
        return Exportable(sample=sample, pictures=tuple(pictures), arguments=arguments, apart=self.apart)

    def _refuse(self, row: BadRow) -> None:
        left_out = row.too_long and self.data.over_length == "skip"
        if self.data.on_bad_row == "error" and not left_out:
            raise ConfigError(f"{row}\n  Fix the row, or leave out such rows and count them: --on_bad_row skip")
        self.bad.append(row)

    def result(self, out: str) -> Exported:
        recipe, notes = self.base.recipe, list(self.notes)
        if self.resized:
            notes.append(
                f"{counted(self.resized, 'picture')} with limits of their row, which {self.kind} does not take: "
                "written as the pixels that vlft trains"
            )
        kinds = list(self.warned.items())
        notes += [f"{counted(len(places), 'row')}: {places[0]} {remark}" for remark, places in kinds[:WARNED]]
        if len(kinds) > WARNED:
            notes.append(f"{counted(len(kinds) - WARNED, 'further kind')} of warning: vlft check-data lists them")
        if self.kind == "calibration" and self.data.pairs:
            notes.append("of preference rows, the chosen answer was written")
        return Exported(
            kind=self.kind,
            out=out,
            read=self.read,
            rows=self.rows_written,
            samples=self.samples_written,
            skipped=tuple(self.bad),
            pictures=self.pictures_written,
            max_prompt_length=self.longest_prompt,
            max_response_length=self.longest_answer,
            image_min_pixels=recipe.image_min_pixels,
            image_max_pixels=recipe.image_max_pixels,
            held_out=self.held_out,
            max_completion_length=self.data.max_completion_length if self.data.method == "grpo" else 0,
            arguments=dict(self.arguments),
            notes=tuple(notes),
        )


def _lengths(tokens: EncodedTokens) -> list[tuple[int, int]]:
    """Tokens of the prompt to each trained answer, and of that answer; of a pair, of its longer answer."""
    if tokens.branches:
        return [(tokens.branches[0], max(tokens.branches[1:]))]
    trained_K = np.flatnonzero(tokens.labels_T != UNTRAINED)
    first_N = np.flatnonzero(np.diff(trained_K, prepend=-2) > 1)  # of runs without a gap
    last_N = np.append(first_N[1:], len(trained_K)) - 1
    return [
        (int(start), int(end) + 1 - int(start))
        for start, end in zip(trained_K[first_N], trained_K[last_N], strict=True)
    ]


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
