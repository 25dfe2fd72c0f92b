"""Evaluate models: read rows, get answers from models or files, compute figures. Prints nothing itself.

    files --rows.read_rows--> samples --asked--> Asked --ask--> answers --figures--> Evaluation

Everything that can be refused is refused before the first weights are loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft import metrics
from vlft.config.flags import DataFlags
from vlft.config.row_flags import BoxFormat
from vlft.config.thinking import Thinking
from vlft.data.rows.references import is_unread
from vlft.data.sample import Sample
from vlft.errors import BadRow, ConfigError, DataError
from vlft.evaluation.answers_file import AnswersFile, Line
from vlft.evaluation.assemble import assembled, with_labels
from vlft.evaluation.figures import check_applies, scores_of
from vlft.evaluation.labels import labelled
from vlft.evaluation.labels import places as places_of_labels
from vlft.evaluation.matched import FileSource, answers_in
from vlft.evaluation.result import Evaluation
from vlft.evaluation.rows import Place, measured, place_of, read_rows, refuse_bad
from vlft.evaluation.sources import ModelSource, Source, sources_of
from vlft.families import DEFAULT
from vlft.setup.asked import Asked, asked
from vlft.setup.labels import read_labels
from vlft.text import counted

if TYPE_CHECKING:
    from vlft.evaluation.ask import Opened, Said

BATCH, MAX_NEW_TOKENS = 8, 512


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to evaluate, and how.

    Attributes:
        models: run folders, checkpoints, adapters, models or files of answers; the others are compared with the first.
        files: data files.
        data: how their rows are read.
        metrics: names, or FILE.py:FUNCTION.
        box_format: unit of the boxes in the rows; None: that of each run's rows.
        batch: most rows that are answered together. Answers do not depend on it.
        max_new_tokens: most tokens of an answer.
        limit: most rows, from the first on; None: all.
        out: answers file of the first model; None: in the folder `eval`.
        thinking: whether models think before they answer.
        base_model: folder or hub id of an adapter's base, if it has moved.
        labels: a text file with a label on each line: they are scored by their log-probability instead of generating
            answers; None: answers are generated.
        device: where to run models; None: the GPU if there is one.
    """

    models: tuple[str, ...]
    files: tuple[str, ...]
    data: DataFlags = field(default_factory=DataFlags)
    metrics: tuple[str, ...] = metrics.DEFAULT
    box_format: BoxFormat | None = None
    batch: int = BATCH
    max_new_tokens: int = MAX_NEW_TOKENS
    limit: int | None = None
    out: Path | None = None
    thinking: Thinking = "auto"
    base_model: str | None = None
    labels: Path | None = None
    device: str | None = None

    @property
    def outs(self) -> tuple[Path, ...]:
        """The answers file of each model: `answers.jsonl`, `answers.2.jsonl`, ..."""
        first = self.out or Path("eval") / f"{_word(self.models[0])}-{_word(self.files[0])}.jsonl"
        return (first, *(first.with_suffix(f".{i}{first.suffix}") for i in range(2, len(self.models) + 1)))


def _word(path: str) -> str:
    """Return the last names of a path as a part of a file name: `output/run/checkpoint-30` -> `run-checkpoint-30`."""
    parts = [part for part in Path(path).expanduser().absolute().parts if part != "/"]
    last = Path(parts[-1])
    name = last.stem if last.suffix in (".json", ".jsonl", ".csv", ".parquet", ".tar") else last.name
    if name.startswith("checkpoint-") and len(parts) > 1:
        name = f"{parts[-2]}-{name}"
    return re.sub(r"[^\w.-]+", "-", name)


@dataclass(kw_only=True)
class _Model:
    """A model or a file of answers while it is evaluated.

    Attributes:
        source: where its answers come from.
        store: keeps the answers of a model; None for a file of answers.
        lines: row -> its answer, as far as they are known.
        opened: the settings of a model that must answer; None before, and where all answers are known.
        lengths: row -> its tokens, of a model that must answer.
        asked: row -> what is asked.
    """

    source: Source
    store: AnswersFile | None
    lines: dict[Place, Line]
    opened: Opened | None = None
    lengths: dict[Place, int] = field(default_factory=dict)
    asked: dict[Place, Asked] = field(default_factory=dict)


def evaluate(settings: Settings, *, say: Callable[[str], None] = lambda line: None) -> Evaluation:
    """Evaluate a model on rows, and compare others with it.

    Answers are kept (`vlft.evaluation.answers_file`): the same call again continues where it stopped.

    Args:
        settings: what to evaluate.
        say: called with each line for the user.

    Raises:
        ConfigError: a metric cannot be computed, a row is refused, or answers cannot be kept.
        CheckpointError: a model cannot be opened or loaded.
        DataError: a picture or video cannot be decoded.
    """
    chosen = metrics.find(settings.metrics)
    labels = _labels(settings)
    sources = sources_of(settings.models, settings.base_model)
    if settings.out is not None and all(isinstance(one, FileSource) for one in sources):
        raise ConfigError(f"--out {settings.out} has no effect: {settings.models[0]} has the answers already. Drop it.")
    families = [one.family for one in sources if isinstance(one, ModelSource)]
    read = read_rows(settings.files, settings.data, families[0] if families else DEFAULT, limit=settings.limit)
    total = len(read.samples) + len(read.bad)
    refuse_bad(read.bad, total, settings.data)
    models = [_model(one, out, read.prints, settings, labels) for one, out in zip(sources, settings.outs, strict=True)]
    samples, bad = _askable(models, read.samples, read.bad, settings, say)
    refuse_bad(bad, total, settings.data)
    for model in models:
        samples, bad = _from_file(model, samples, bad, settings)
    refuse_bad(bad, total, settings.data)
    places = [place_of(sample) for sample in samples]
    rows = [[model.asked[place] for place in places] for model in models]
    right = None
    if labels:
        names = [f"{file}[{index}]" for file, index in places]
        right = places_of_labels(names, [row.case("").references[0] for row in rows[0]], labels)
    check_applies(
        [metric for metric, word in zip(chosen, dict.fromkeys(settings.metrics), strict=True) if ":" not in word],
        rows[0],
    )
    for model in models:
        if model.opened is not None:
            gone = {place_of(row) for row in bad}  # a damaged picture that an earlier model met
            bad += _answer(model, [place for place in places if place not in gone], settings, labels, say)
    notes = _notes(read.samples)
    kept = [row for row, place in enumerate(places) if all(place in model.lines for model in models)]
    refuse_bad(bad, total, settings.data)
    rows = [[each[row] for row in kept] for each in rows]
    right = None if right is None else [right[row] for row in kept]
    lines = [[model.lines[places[row]] for row in kept] for model in models]
    chosen_labels = None if right is None else labelled(right, [[line.scores for line in own] for own in lines], labels)
    if chosen_labels is not None:
        lines, others = with_labels(settings.models, lines, chosen_labels)
        notes += others
    scores = {
        metric.name: [
            scores_of(metric, asked_rows, [line.answer for line in own])
            for asked_rows, own in zip(rows, lines, strict=True)
        ]
        for metric in chosen
    }
    outs = tuple(str(model.source.name if model.store is None else model.store.out) for model in models)
    return assembled(
        settings.models,
        settings.files,
        outs,
        scores,
        chosen_labels,
        rows=rows[0],
        lines=lines,
        skipped=len(bad),
        notes=notes,
    )


def _notes(samples: Sequence[Sample]) -> tuple[str, ...]:
    """What the user should know about the rows."""
    unread = [sample for sample in samples if any(is_unread(*warning) for warning in sample.warnings)]
    if not unread:
        return ()
    first = unread[0]
    field, remark = next(warning for warning in first.warnings if is_unread(*warning))
    return (
        f"{counted(len(unread), 'row')} with {field!r} in a form that is not read, so only the row's own answer is "
        f"right, such as {first.file}[{first.index}]: {remark}",
    )


def _labels(settings: Settings) -> tuple[str, ...]:
    if settings.labels is None:
        return ()
    return read_labels(settings.labels)


def _model(source: Source, out: Path, prints: Mapping[str, str], settings: Settings, labels: Sequence[str]) -> _Model:
    if isinstance(source, FileSource):
        return _Model(source=source, store=None, lines={})
    data = settings.data
    key = {
        "model": source.name,
        "the model's files": source.print,
        **{f"sha256 of {name}": digest for name, digest in prints.items()},
        "--image_folder": None if data.image_folder is None else os.path.abspath(data.image_folder),
        "--columns": data.columns,
        "--missing_tags": data.missing_tags,
        "--box_format": settings.box_format,
        "--thinking": settings.thinking,
        **({"--labels": list(labels)} if labels else {"--max_new_tokens": settings.max_new_tokens}),
    }
    store = AnswersFile(out, key)
    return _Model(source=source, store=store, lines=store.kept())


def _askable(
    models: Sequence[_Model],
    samples: Sequence[Sample],
    bad: Sequence[BadRow],
    settings: Settings,
    say: Callable[[str], None],
) -> tuple[list[Sample], list[BadRow]]:
    """Open each model that must answer, and drop the rows that one of them cannot be asked about."""
    left, refused = list(samples), list(bad)
    for model in models:
        source = model.source
        if isinstance(source, ModelSource) and any(place_of(sample) not in model.lines for sample in left):
            from vlft.evaluation.ask import opened

            model.opened = opened(source, thinking=settings.thinking, box_format=settings.box_format)
            found = measured(
                left,
                model.opened.encoder,
                limit=model.opened.limit,
                longest=1 if settings.labels else settings.max_new_tokens,
                say=say,
            )
            model.lengths = {place_of(s): n for s, n in zip(left, found, strict=True) if isinstance(n, int)}
            refused += [one for one in found if isinstance(one, BadRow)]
            left = [sample for sample in left if place_of(sample) in model.lengths]
    for model in models:
        encoder = None if model.opened is None else model.opened.encoder
        for sample in left:
            try:
                model.asked[place_of(sample)] = _asked(sample, model, encoder)
            except DataError as error:
                refused.append(error.row)
        left = [sample for sample in left if place_of(sample) in model.asked]
    return left, refused


def _asked(sample: Sample, model: _Model, encoder: object) -> Asked:
    line = model.lines.get(place_of(sample))
    if encoder is None and line is not None:  # the line has the texts as the model writes them
        found = asked(sample, None)
        return replace(found, text=line.question, references=line.references)
    return asked(sample, None if model.opened is None else model.opened.encoder)


def _from_file(
    model: _Model, samples: list[Sample], bad: list[BadRow], settings: Settings
) -> tuple[list[Sample], list[BadRow]]:
    """Match the answers of a file with the rows. Rows without an answer are refused."""
    if not isinstance(model.source, FileSource):
        return samples, bad
    whole = settings.limit is None
    model.lines = answers_in(model.source, samples, model.asked, whole=whole, known=bad)
    for place, line in model.lines.items():
        model.asked[place] = replace(model.asked[place], references=line.references)
    reason = f"has no answer in {model.source.name}. Add one"
    missing = [
        BadRow(file=one.file, index=one.index, id=one.id, field="row", reason=reason)
        for one in samples
        if place_of(one) not in model.lines
    ]
    return [one for one in samples if place_of(one) in model.lines], [*bad, *missing]


def _answer(
    model: _Model, places: Sequence[Place], settings: Settings, labels: Sequence[str], say: Callable[[str], None]
) -> list[BadRow]:
    """Let a model answer the rows that it has not answered yet, and write its file.

    Returns:
        rows whose media cannot be decoded, if bad rows are skipped.
    """
    from vlft.evaluation.ask import ask, score

    bad: list[BadRow] = []
    if model.opened is None or model.store is None:
        return bad
    missing = [place for place in places if place not in model.lines]
    name = model.source.name
    if done := len(places) - len(missing):
        say(f"{name}: {counted(done, 'row')} of {len(places):,} were answered before (in {model.store.out})")
    rows = [model.asked[place] for place in missing]
    try:
        lengths = [model.lengths[place] for place in missing]
        how: dict[str, Any] = {"batch": settings.batch, "device": settings.device, "say": say}
        if labels:
            each = score(model.opened, name, rows, lengths, labels, **how)
        else:
            how |= {"refuse": bad.append} if settings.data.on_bad_row == "skip" else {}
            each = ask(model.opened, name, rows, lengths, max_new_tokens=settings.max_new_tokens, **how)
        for said in each:
            line = _line(rows[said.place], said)
            model.store.add(line)
            model.lines[line.place] = line
    finally:
        model.store.close()
        model.opened = None  # its processor and adapter are not needed any more
    model.store.finish(_in_order(model.lines, settings.files))
    return bad


def _in_order(lines: Mapping[Place, Line], files: Sequence[str]) -> list[Line]:
    """Sort answers as the rows of the data are: an earlier call without --limit may have left more of them."""
    number = {file: place for place, file in enumerate(files)}
    return sorted(lines.values(), key=lambda line: (number.get(line.file, len(number)), line.file, line.index))


def _line(row: Asked, said: Said) -> Line:
    question = row.question
    return Line(
        file=question.file,
        index=question.index,
        id=question.id,
        question=row.text,
        answer=said.text,
        references=row.references,
        cut=said.cut,
        scores=said.scores,
    )
