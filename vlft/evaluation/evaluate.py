"""Evaluate models: read rows, get answers from models or files, compute figures. Prints nothing itself.

    files --rows.read_rows--> samples --asked--> Asked --ask--> answers --figures--> Evaluation

Everything that can be refused is refused before the first weights are loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vlft import metrics
from vlft.data.rows.references import is_unread
from vlft.data.sample import Sample
from vlft.errors import ConfigError
from vlft.evaluation.assemble import assembled, with_labels
from vlft.evaluation.figures import check_applies, scores_of
from vlft.evaluation.labels import labelled
from vlft.evaluation.labels import places as places_of_labels
from vlft.evaluation.matched import FileSource
from vlft.evaluation.models import Model, answer, askable, from_file, model_of
from vlft.evaluation.result import Evaluation
from vlft.evaluation.rows import place_of, read_rows, refuse_bad
from vlft.evaluation.run_rows import trained_notes
from vlft.evaluation.settings import Settings
from vlft.evaluation.sources import ModelSource, sources_of
from vlft.families import DEFAULT
from vlft.setup.labels import read_labels
from vlft.text import counted

__all__ = ["Settings", "evaluate"]


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
    family = families[0] if families else DEFAULT
    read = read_rows(settings.files, settings.data, family, limit=settings.limit, chosen=settings.rows)
    total = len(read.samples) + len(read.bad)
    refuse_bad(read.bad, total, settings.data)
    models: list[Model] = []
    for one in sources:
        before = [model.store.out for model in models if model.store is not None] if models else None
        models.append(model_of(one, read.prints, settings, labels, before=before))
    samples, bad = askable(models, read.samples, read.bad, settings, say)
    refuse_bad(bad, total, settings.data)
    for model in models:
        samples, bad = from_file(model, samples, bad, settings)
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
            bad += answer(model, [place for place in places if place not in gone], settings, labels, say)
    notes = (*_notes(read.samples), *trained_notes(settings.models, places))
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
