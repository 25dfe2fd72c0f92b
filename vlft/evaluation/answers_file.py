"""Keep a model's answers: a journal while it answers, and at the end one file with a line for each row.

    answers.jsonl.part     while the model answers: the key, then a line for each answer, in the order of the answers
    answers.jsonl          all answers, in the order of the rows
    answers.jsonl.key      what they depend on (model, data, flags), and a digest of answers.jsonl

An evaluation that was stopped continues from the journal. A finished one only reads its file. Answers of another key
are never mixed or overwritten.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from vlft.errors import ConfigError
from vlft.evaluation.rows import Place
from vlft.files import appearing, lock_handle, write_json
from vlft.text import short

PART, KEY = ".part", ".key"
MODEL = "model"  # name in the key


@dataclass(frozen=True, kw_only=True)
class Line:
    """An answer as a line of a file.

    Attributes:
        file: data file of the row.
        index: of the row in it, from 0.
        id: the row's own id, or None.
        question: text of the last user turn.
        answer: whole text of the answer, with thoughts.
        references: right answers, the row's own first; empty in files of others.
        cut: whether the answer reached the limit of tokens.
        scores: label -> log-probability; only with `--labels`.
    """

    file: str
    index: int
    id: str | None
    question: str
    answer: str
    references: tuple[str, ...]
    cut: bool = False
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def place(self) -> Place:
        """The row."""
        return self.file, self.index

    def as_json(self) -> dict[str, Any]:
        """Return the object of the line; `references`, `cut` and `scores` only where they say something."""
        found: dict[str, Any] = {
            "file": self.file,
            "index": self.index,
            "id": self.id,
            "question": self.question,
            "answer": self.answer,
            "reference": self.references[0],
        }
        found |= {"references": list(self.references)} if len(self.references) > 1 else {}
        found |= {"cut": True} if self.cut else {}
        return found | ({"scores": dict(self.scores)} if self.scores else {})

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Line:
        """Read the object of a line that vlft wrote.

        Raises:
            KeyError: a key is missing.
        """
        return cls(
            file=raw["file"],
            index=raw["index"],
            id=raw["id"],
            question=raw["question"],
            answer=raw["answer"],
            references=tuple(raw.get("references") or (raw["reference"],)),
            cut=bool(raw.get("cut")),
            scores=raw.get("scores") or {},
        )


class AnswersFile:
    """The answers of one model at one place.

    Args:
        out: path of the finished file.
        key: everything that the answers depend on, as JSON values by the name that messages use.
        files: data files, as the user names them now. Kept answers may have them under other spellings.
    """

    def __init__(self, out: Path, key: Mapping[str, Any], *, files: Sequence[str] = ()) -> None:
        self.out = out
        self.key = json.loads(json.dumps(key))
        self.files = {os.path.realpath(file): file for file in files}
        self._part: IO[bytes] | None = None

    def kept(self) -> dict[Place, Line]:
        """Return the answers that are there.

        Raises:
            ConfigError: they depend on something else, the file was changed, or cannot be read.
        """
        try:
            found = {line.place: line for line in map(self._renamed, [*self._finished(), *self._journal()])}
        except OSError as error:
            raise ConfigError(f"{error.filename or self.out}: cannot be read ({error.strerror}).") from error
        return found

    def _renamed(self, line: Line) -> Line:
        """Return a line with the data file as it is named now: `./d/x.json` for `d/x.json`, also of another folder."""
        if line.file in self.files.values():
            return line
        parts = tuple(part for part in Path(os.path.normpath(line.file)).parts if part != os.pardir)
        same = [name for path, name in self.files.items() if Path(path).parts[-len(parts) :] == parts]
        now = self.files.get(os.path.realpath(line.file)) or (same[0] if len(same) == 1 else line.file)
        return replace(line, file=now)

    def _finished(self) -> list[Line]:
        if not self.out.exists():
            return []
        about_it = _beside(self.out, KEY)
        about = _object(about_it)
        if about is None:
            raise ConfigError(
                f"{self.out}: is there, and {about_it.name}, which says what the answers depend on, is not. "
                "Choose another --out, or move the file."
            )
        self._compare(about.get("key"), self.out)
        content = self.out.read_bytes()
        if hashlib.sha256(content).hexdigest() not in about.get("sha256", ()):
            raise ConfigError(
                f"{self.out}: was changed after vlft wrote it. To evaluate it as it is, pass it as MODEL; else move "
                "it, or choose another --out."
            )
        return [Line.of(json.loads(text)) for text in content.splitlines()]

    def _journal(self) -> Iterator[Line]:
        path = _beside(self.out, PART)
        head = _first(path)
        if head is None:
            return
        self._compare(head.get("key"), path)
        for raw in list(_whole_lines(path))[1:]:
            yield Line.of(raw)

    def _compare(self, there: Any, path: Path) -> None:
        there = there if isinstance(there, dict) else {}
        differing = [name for name in {**there, **self.key} if there.get(name) != self.key.get(name)]
        if not differing:
            return
        name = differing[0]
        old, new = _shown(there.get(name)), _shown(self.key.get(name))
        what = f"{name} is {old} there and {new} here" if old != new else f"{name} has changed since"
        raise ConfigError(
            f"{path}: holds answers that depend on something else: {what}. Choose another --out, or delete {path}."
        )

    def add(self, line: Line) -> None:
        """Append an answer to the journal, so that it survives if this process is killed.

        Raises:
            ConfigError: the journal cannot be written, or another process writes it.
        """
        with self._writing():
            part = self._part or self._opened()
            part.write(_text(line.as_json()))
            part.flush()

    def _opened(self) -> IO[bytes]:
        path = _beside(self.out, PART)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._part = part = open(path, "ab")  # noqa: SIM115 - open until `finish` or `close`
        if lock_handle(part.fileno(), shared=False) is False:
            raise ConfigError(f"{path}: another process writes it. Wait for it, or choose another --out.")
        whole = sum(len(text) for text in _raw_lines(path))
        part.truncate(whole)  # a kill may leave half a line
        if not whole:
            part.write(_text({"key": self.key}))
            part.flush()
        return part

    def finish(self, lines: Sequence[Line]) -> None:
        """Write the answers to their file, and remove the journal.

        Args:
            lines: all answers, in the order of the rows.

        Raises:
            ConfigError: a file cannot be written.
        """
        content = b"".join(_text(line.as_json()) for line in lines)
        # Both digests, because the process may be killed between the two files.
        digests = [hashlib.sha256(content).hexdigest()]
        digests += [hashlib.sha256(self.out.read_bytes()).hexdigest()] if self.out.exists() else []
        with self._writing():
            write_json(_beside(self.out, KEY), {"key": self.key, "sha256": digests}, durable=True)
            with appearing(self.out, durable=True) as file:
                file.write(content)
            self.close()
            _beside(self.out, PART).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the journal. It stays."""
        if self._part is not None:
            self._part.close()
            self._part = None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{error.filename or self.out}: cannot be written ({error.strerror}).") from error


def named_beside(first: Path, word: str, model: str, taken: Sequence[Path]) -> Path:
    """Return the answers file of a further model: `answers.WORD.jsonl`, or `answers.WORD-2.jsonl` where another model
    of that name has the first.

    Args:
        first: answers file of the first model.
        word: name of the model as a part of a file name.
        model: the model, as `AnswersFile.key` has it under `MODEL`.
        taken: answers files of models before it.
    """
    number = 1
    while True:
        path = first.with_suffix(f".{word}{'' if number == 1 else f'-{number}'}{first.suffix}")
        about = _object(_beside(path, KEY)) or _first(_beside(path, PART))
        free = not path.exists() if about is None else (about.get("key") or {}).get(MODEL) == model
        if free and path not in taken:
            return path
        number += 1


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(out.name + ending)


def _text(document: Any) -> bytes:
    """Return a line. Halves of characters, which JSON may hold and UTF-8 cannot, become `\\udxxx`."""
    return (json.dumps(document, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


def _shown(value: Any) -> str:
    return short(json.dumps(value, ensure_ascii=False), 120)


def _object(path: Path) -> dict[str, Any] | None:
    """Return the content of a JSON file; None if it is missing or broken."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a journal up to the first that is not whole."""
    with open(path, "rb") as file:
        for text in file:
            try:
                whole = text.endswith(b"\n") and isinstance(json.loads(text), dict)
            except ValueError:
                whole = False
            if not whole:
                return
            yield text


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    for text in _raw_lines(path):
        yield json.loads(text)


def _first(path: Path) -> dict[str, Any] | None:
    try:
        return next(_whole_lines(path), None)
    except FileNotFoundError:
        return None
