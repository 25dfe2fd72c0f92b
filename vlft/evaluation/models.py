"""The models of an evaluation: their kept answers, the rows that they can be asked about, and their new answers.

`vlft.evaluation.evaluate` calls these functions in order for all models, `vlft.evaluation.ask` loads a model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlft.data.sample import Sample
from vlft.errors import BadRow, DataError
from vlft.evaluation.answers_file import MODEL, AnswersFile, Line, named_beside
from vlft.evaluation.matched import FileSource, answers_in
from vlft.evaluation.rows import Place, measured, place_of
from vlft.evaluation.settings import Settings, word_of
from vlft.evaluation.sources import ModelSource, Source
from vlft.setup.asked import Asked, asked
from vlft.text import counted

if TYPE_CHECKING:
    from vlft.evaluation.ask import Opened, Said


@dataclass(kw_only=True)
class Model:
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


def model_of(
    source: Source,
    prints: Mapping[str, str],
    settings: Settings,
    labels: Sequence[str],
    *,
    before: Sequence[Path] | None,
) -> Model:
    """Find the answers of a model that are kept.

    Args:
        source: the model, or a file of answers.
        prints: data file -> sha256 of its rows.
        settings: what is evaluated.
        labels: of `--labels`; empty without.
        before: answers files of the models before it; None: it is the first model.

    Raises:
        ConfigError: answers that depend on something else are in their place.
    """
    if isinstance(source, FileSource):
        return Model(source=source, store=None, lines={})
    data, out = settings.data, settings.first_out
    folder = Path(source.name).expanduser()
    model = os.path.realpath(folder) if folder.is_dir() else source.name
    if before is not None:
        out = named_beside(out, word_of(source.name), model, before)
    key = {
        MODEL: model,
        "the model's files": source.print,
        **{f"sha256 of {os.path.realpath(name)}": digest for name, digest in prints.items()},
        "--image_folder": None if data.image_folder is None else os.path.realpath(data.image_folder),
        "--columns": data.columns,
        "--missing_tags": data.missing_tags,
        "--box_format": settings.box_format,
        "--thinking": settings.thinking,
        **({"--labels": list(labels)} if labels else {"--max_new_tokens": settings.max_new_tokens}),
    }
    store = AnswersFile(out, key, files=settings.files)
    return Model(source=source, store=store, lines=store.kept())


def askable(
    models: Sequence[Model],
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


def _asked(sample: Sample, model: Model, encoder: object) -> Asked:
    line = model.lines.get(place_of(sample))
    if encoder is None and line is not None:  # the line has the texts as the model writes them
        found = asked(sample, None)
        return replace(found, text=line.question, references=line.references)
    return asked(sample, None if model.opened is None else model.opened.encoder)


def from_file(
    model: Model, samples: list[Sample], bad: list[BadRow], settings: Settings
) -> tuple[list[Sample], list[BadRow]]:
    """Match the answers of a file with the rows. Rows without an answer are refused."""
    if not isinstance(model.source, FileSource):
        return samples, bad
    whole = settings.limit is None and settings.rows is None
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


def answer(
    model: Model, places: Sequence[Place], settings: Settings, labels: Sequence[str], say: Callable[[str], None]
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
        how |= {"refuse": bad.append} if settings.data.on_bad_row == "skip" else {}
        if labels:
            each = score(model.opened, name, rows, lengths, labels, **how)
        else:
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
