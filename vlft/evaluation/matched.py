"""Read a file of answers, and match its lines with the rows of the data. Loads no model, and imports no torch.

The file may come from another program, so that each line is checked. What is right is what the data say.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.data.sample import Sample
from vlft.errors import BadRow, ConfigError
from vlft.evaluation.answers_file import Line
from vlft.evaluation.rows import Place
from vlft.setup.asked import Asked
from vlft.text import counted, short

_EXAMPLE = '{"index": 0, "answer": "..."}'
#: A text with one of these is written differently for each family.
_BOXES = ("<|box_start|>", "<|quad_start|>", "bbox_2d", "point_2d", "<bbox>", "<ref-object>")
#: What notations of boxes write around names.
_NOTATION = re.compile(r"<\|\w+\|>|<bbox>|\"?(?:bbox_2d|point_2d|label)\"?\s*:|```(?:json)?")
_NAMED = "<ref-object>"
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """A file of answers.

    Attributes:
        name: as the user wrote it.
        lines: (number in the file, object), in order.
    """

    name: str
    lines: tuple[tuple[int, Mapping[str, Any]], ...]


def read_answers(name: str) -> FileSource:
    """Read a file of answers.

    Raises:
        ConfigError: it cannot be read, or a line is not an answer.
    """
    lines = []
    try:
        content = Path(name).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: cannot be read ({error.strerror}). Name a model, or a file of answers.") from error
    for number, text in enumerate(content.splitlines(), start=1):
        if not text.strip():
            continue
        try:
            raw = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{name}:{number}: not JSON ({error}). Write a line such as {_EXAMPLE}.") from error
        if not isinstance(raw, dict) or not isinstance(raw.get("answer"), str):
            raise ConfigError(f'{name}:{number}: has no text under "answer". Write a line such as {_EXAMPLE}.')
        if raw.get("index") is None and raw.get("id") is None:
            raise ConfigError(f'{name}:{number}: has neither "index" nor "id". Write a line such as {_EXAMPLE}.')
        for key, wanted in _wrong(raw):
            raise ConfigError(f'{name}:{number}: "{key}" is {_shown(raw[key])}, must be {wanted}.')
        lines.append((number, raw))
    if not lines:
        raise ConfigError(f"{name}: holds no answer. Write a line such as {_EXAMPLE} for each row.")
    return FileSource(name=name, lines=tuple(lines))


def _wrong(raw: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield each key whose value has another type than `Line.as_json` writes, and what it must be."""
    index, row_id, scores = raw.get("index"), raw.get("id"), raw.get("scores")
    if index is not None and (not isinstance(index, int) or isinstance(index, bool) or index < 0):
        yield "index", "a number: the row's place in the data file, from 0"
    if row_id is not None and (not isinstance(row_id, str | int | float) or isinstance(row_id, bool)):
        yield "id", "a text or a number"
    for key in ("file", "question", "reference"):
        if raw.get(key) is not None and not isinstance(raw[key], str):
            yield key, "a text"
    listed = raw.get("references")
    if listed is not None and not (isinstance(listed, list) and all(isinstance(text, str) for text in listed)):
        yield "references", "a list of texts"
    if scores is not None and not (isinstance(scores, dict) and all(map(_is_finite, scores.values()))):
        yield "scores", "an object of labels with their log-probabilities, which are finite numbers"


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _shown(value: Any) -> str:
    return short(json.dumps(value, ensure_ascii=False), 80)


def answers_in(
    source: FileSource, samples: Sequence[Sample], asked: Mapping[Place, Asked], *, whole: bool, known: Sequence[BadRow]
) -> dict[Place, Line]:
    """Match the answers of a file with rows.

    Args:
        source: the file.
        samples: the rows.
        asked: the rows as they are asked.
        whole: whether `samples` are all rows of the data, so that every answer must have its row.
        known: refused rows, whose answers are left out.

    Returns:
        row -> its answer, for the rows that have one.

    Raises:
        ConfigError: an answer is of another row, or a row has two.
    """
    rows = _Rows(source.name, samples, known)
    found: dict[Place, Line] = {}
    seen: dict[Place, int] = {}
    for number, raw in source.lines:
        sample = rows.of(number, raw)
        if sample is None:
            if whole and not rows.is_refused(raw):
                raise ConfigError(f"{source.name}:{number}: {rows.why_none(raw)}")
            continue
        place = (sample.file, sample.index)
        if place in seen:
            raise ConfigError(
                f"{source.name}: lines {seen[place]} and {number} both answer {sample.file}[{sample.index}]. Keep one."
            )
        seen[place] = number
        found[place] = _line(f"{source.name}:{number}", raw, asked[place])
    return found


class _Rows:
    """The rows of the data, by the names that a file of answers may use."""

    def __init__(self, name: str, samples: Sequence[Sample], refused: Sequence[BadRow]) -> None:
        self.name = name
        self.count = len(samples)
        self.files = list(dict.fromkeys(row.file for some in (samples, refused) for row in some))
        self.by_place = {(sample.file, sample.index): sample for sample in samples}
        self.by_id: dict[tuple[str, str], list[Sample]] = {}
        for sample in samples:
            if sample.id is not None:
                self.by_id.setdefault((sample.file, sample.id), []).append(sample)
        self.refused = {(row.file, row.index) for row in refused}
        self.refused_ids = {(row.file, str(row.id)) for row in refused if row.id is not None}

    def of(self, number: int, raw: Mapping[str, Any]) -> Sample | None:
        """Return the row that a line answers; None if there is none.

        Raises:
            ConfigError: the line may be about several rows, or its index and its id are of two rows.
        """
        files = self._files(raw)
        if raw.get("index") is not None:
            if len(files) > 1:
                raise ConfigError(
                    f'{self.name}:{number}: has no "file", but there are {len(self.files)} data files. Add it, or '
                    "evaluate one data file at a time."
                )
            found = self.by_place.get((files[0], raw["index"])) if files else None
            if found is not None and None not in (found.id, raw.get("id")) and found.id != str(raw["id"]):
                raise ConfigError(
                    f"{self.name}:{number}: has the index {raw['index']} and the id {raw['id']!r}, but "
                    f"{found.file}[{found.index}] has the id {found.id!r}. Were the answers given to other data? Else "
                    "drop one of the two."
                )
            return found
        some = [sample for file in files for sample in self.by_id.get((file, str(raw["id"])), ())]
        if len(some) > 1:
            raise ConfigError(f'{self.name}:{number}: {len(some)} rows have the id {raw["id"]!r}. Add "index".')
        return some[0] if some else None

    def _files(self, raw: Mapping[str, Any]) -> list[str]:
        named = raw.get("file")
        if named is None:
            return self.files
        if named in self.files:
            return [named]
        return [file for file in self.files if Path(file).name == Path(named).name]

    def is_refused(self, raw: Mapping[str, Any]) -> bool:
        """Whether a line answers a row that was refused."""
        if raw.get("index") is not None:
            return any((file, raw["index"]) in self.refused for file in self._files(raw))
        return any((file, str(raw["id"])) in self.refused_ids for file in self._files(raw))

    def why_none(self, raw: Mapping[str, Any]) -> str:
        """Why a line answers none of the rows."""
        if not self._files(raw):
            return (
                f'its "file" is {raw["file"]!r}, and the data {"are" if len(self.files) > 1 else "is"} '
                f"{', '.join(map(repr, self.files))}. Name the data file that was answered, or drop the key."
            )
        named = f"index {raw['index']}" if raw.get("index") is not None else f"id {raw['id']!r}"
        return f"{named} is none of the {counted(self.count, 'row')}. Were the answers given to other data?"


def _line(where: str, raw: Mapping[str, Any], asked: Asked) -> Line:
    """Return the answer with its row. The file may repeat the question and the right answer, which must agree.

    Right answers are those of the data. Only boxes are taken from the line, since each model writes them in its way.
    """
    row = asked.question
    references = asked.references
    with_boxes = any(map(_has_box, references))
    theirs = raw.get("reference")
    for key, said, ours in (("question", raw.get("question"), asked.text), ("reference", theirs, references[0])):
        if said is not None and not _agree_or_same(said, ours):
            raise ConfigError(
                f"{where}: the {key} is {short(said, 80)!r}, that of {row.file}[{row.index}] is {short(ours, 80)!r}. "
                "Were the answers given to other data?"
            )
    if with_boxes and theirs is not None:
        listed = raw.get("references") or [theirs]
        if len(listed) == len(references) and all(map(_agree_or_same, listed, references)):
            references = tuple(listed)
        elif len(listed) == 1:
            references = (theirs, *references[1:])
        else:
            raise ConfigError(
                f'{where}: "references" are not those of {row.file}[{row.index}]. Drop the key: right answers come '
                "from the data."
            )
    return Line(
        file=row.file,
        index=row.index,
        id=row.id,
        question=asked.text,
        answer=raw["answer"],
        references=references,
        cut=bool(raw.get("cut")),
        scores=raw.get("scores") or {},
    )


def _agree_or_same(theirs: str, ours: str) -> bool:
    return theirs.strip() == ours.strip() or _agree(theirs, ours)


def _agree(theirs: str, ours: str) -> bool:
    """Whether two texts, at least one with a box, say the same apart from the boxes and how they are written."""
    if not _has_box(theirs + ours):
        return False
    one, other = _words(theirs), _words(ours)
    if _NAMED not in ours:
        return sorted(one) == sorted(other)
    left = iter(one)  # the names in place of <ref-object> come between our words
    return all(word in left for word in other)


def _words(text: str) -> list[str]:
    return _WORD.findall(_NOTATION.sub(" ", text.replace(_NAMED, " ")))


def _has_box(text: str) -> bool:
    return any(mark in text for mark in _BOXES)
