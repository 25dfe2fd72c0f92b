"""Where answers come from: a model, or a file of answers. Reads small files only, and imports no torch.

Neighbours: `vlft.evaluation.ask` opens models, `vlft.evaluation.answers_file` keeps what they say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlft.checkpoint import family_of, find_adapter_or_model, find_base, quantisation_to_answer, resolve_complete
from vlft.data.sample import Sample
from vlft.errors import BadRow, ConfigError
from vlft.evaluation.answers_file import Line
from vlft.evaluation.rows import Place
from vlft.families import Family
from vlft.setup.asked import Asked
from vlft.text import counted, short

ENDINGS = (".jsonl", ".ndjson")
#: Files of a model folder that decide its answers; weights are compared by size and time.
_SMALL, _WEIGHTS = ("*.json", "*.jinja", "merges.txt", "vocab.txt"), "*.safetensors"
#: Files of a run folder that its answers do not depend on.
_IDLE = frozenset(("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"))
#: A text with one of these is written differently for each family.
_BOXES = ("<|box_start|>", "<|quad_start|>", "bbox_2d", "point_2d", "<bbox>", "<ref-object>")
_EXAMPLE = '{"index": 0, "answer": "..."}'


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model to ask.

    Attributes:
        name: as the user wrote it.
        family: of the model.
        base_model: `--base_model`, if it is an adapter.
        print: hash of its files and of its base's.
    """

    name: str
    family: Family
    base_model: str | None
    print: str


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """A file of answers.

    Attributes:
        name: as the user wrote it.
        lines: (number in the file, object), in order.
    """

    name: str
    lines: tuple[tuple[int, Mapping[str, Any]], ...]


Source = ModelSource | FileSource


def is_file(name: str) -> bool:
    """Whether a word of the command line names a file of answers."""
    return name.lower().endswith(ENDINGS) and not Path(name).expanduser().is_dir()


def sources_of(names: Sequence[str], base_model: str | None) -> tuple[Source, ...]:
    """Find the models and files of answers.

    Args:
        names: run folders, checkpoints, adapters, models or files of answers.
        base_model: `--base_model`, for adapters.

    Raises:
        CheckpointError: a model is missing or incomplete.
        ConfigError: a file cannot be read, a name is there twice, or `base_model` has no effect.
    """
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{name}: is named twice. A model is compared with others: name each once.")
    found = tuple(_file_source(name) if is_file(name) else _model_source(name, base_model) for name in names)
    if base_model is not None and not any(isinstance(one, ModelSource) and one.base_model for one in found):
        raise ConfigError(f"--base_model {base_model}: none of {', '.join(names)} is an adapter. Drop it.")
    return found


def _model_source(name: str, base_model: str | None) -> ModelSource:
    located = find_adapter_or_model(name) if Path(name).expanduser().is_dir() else None
    folders = []
    if located is not None and located.kind == "adapter":
        _, folder = find_base(name, located, base_model)
        folders.append(located.folder)
    else:
        folder, base_model = resolve_complete(name, None), None
    quantisation_to_answer(name, None if located is None else located.record, folder)
    return ModelSource(name=name, family=family_of(folder), base_model=base_model, print=_print_of([*folders, folder]))


def _print_of(folders: Sequence[Path]) -> str:
    found: list[tuple[Any, ...]] = []
    for folder in folders:
        for path in sorted(path for pattern in _SMALL for path in folder.glob(pattern) if path.name not in _IDLE):
            found.append((path.name, hashlib.sha256(path.read_bytes()).hexdigest()))
        for path in sorted(folder.glob(_WEIGHTS)):
            stat = path.stat()
            found.append((path.name, stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:32]


def _file_source(name: str) -> FileSource:
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
        except ValueError as error:
            raise ConfigError(f"{name}:{number}: not JSON ({error}). Write a line such as {_EXAMPLE}.") from error
        if not isinstance(raw, dict) or not isinstance(raw.get("answer"), str):
            raise ConfigError(f'{name}:{number}: has no text under "answer". Write a line such as {_EXAMPLE}.')
        if raw.get("index") is None and raw.get("id") is None:
            raise ConfigError(f'{name}:{number}: has neither "index" nor "id". Write a line such as {_EXAMPLE}.')
        lines.append((number, raw))
    if not lines:
        raise ConfigError(f"{name}: holds no answer. Write a line such as {_EXAMPLE} for each row.")
    return FileSource(name=name, lines=tuple(lines))


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
    rows = _Rows(source.name, samples)
    refused = {(row.file, row.index) for row in known}
    found: dict[Place, Line] = {}
    seen: dict[Place, int] = {}
    for number, raw in source.lines:
        sample = rows.of(number, raw)
        if sample is None:
            if whole and not rows.is_refused(raw, refused):
                raise ConfigError(
                    f"{source.name}:{number}: {rows.named(raw)} is none of the {counted(len(samples), 'row')}. Were "
                    "the answers given to other data?"
                )
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

    def __init__(self, name: str, samples: Sequence[Sample]) -> None:
        self.name = name
        self.files = list(dict.fromkeys(sample.file for sample in samples))
        self.by_place = {(sample.file, sample.index): sample for sample in samples}
        self.by_id: dict[tuple[str, str], list[Sample]] = {}
        for sample in samples:
            if sample.id is not None:
                self.by_id.setdefault((sample.file, sample.id), []).append(sample)

    def of(self, number: int, raw: Mapping[str, Any]) -> Sample | None:
        """Return the row that a line answers; None if there is none."""
        files = self._files(raw)
        if raw.get("index") is not None:
            if len(files) > 1:
                raise ConfigError(
                    f'{self.name}:{number}: has no "file", but there are {len(self.files)} data files. Add it, or '
                    "evaluate one data file at a time."
                )
            return self.by_place.get((files[0], raw["index"])) if files else None
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
        return [file for file in self.files if Path(file).name == Path(str(named)).name]

    def is_refused(self, raw: Mapping[str, Any], refused: set[Place]) -> bool:
        """Whether a line answers a row that was refused."""
        return any(place[1] == raw.get("index") for place in refused)

    def named(self, raw: Mapping[str, Any]) -> str:
        """How a line names its row."""
        return f"index {raw['index']}" if raw.get("index") is not None else f"id {raw['id']!r}"


def _line(where: str, raw: Mapping[str, Any], asked: Asked) -> Line:
    """Return the answer with its row. The file may repeat the question and the right answer, which must agree."""
    row = asked.question
    for key, ours in (("question", asked.text), ("reference", asked.references[0])):
        theirs = raw.get(key)
        same = not isinstance(theirs, str) or theirs.strip() == ours.strip() or _has_box(theirs + ours)
        if not same:
            raise ConfigError(
                f"{where}: the {key} is {short(str(theirs), 80)!r}, that of {row.file}[{row.index}] is "
                f"{short(ours, 80)!r}. Were the answers given to other data?"
            )
    references = asked.references
    if isinstance(raw.get("reference"), str):  # with boxes as that model wrote them
        listed = raw.get("references")
        references = tuple(listed) if isinstance(listed, list) and listed else (raw["reference"],)
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


def _has_box(text: str) -> bool:
    return any(mark in text for mark in _BOXES)
