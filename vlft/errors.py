"""Errors caused by the user's data, flags or folders. Each message says where, what, both values, and the next step.

The CLI prints a `VlftError` without a traceback and exits with its `exit_code`. Any other exception is a bug in vlft.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass


class VlftError(Exception):
    """An error that the user can fix. They see its message and no traceback.

    Attributes:
        said: another process of the same run already prints the message.
    """

    exit_code = 1
    said = False


class UsageError(VlftError):
    """The command line itself is wrong (unknown flag, a flag with another name here)."""

    exit_code = 2


class ConfigError(VlftError):
    """The settings cannot be carried out."""


class CheckpointError(VlftError):
    """A run folder, checkpoint, adapter or base model is missing, incomplete, or belongs to something else."""


class RunFault(VlftError):
    """A fault that ended a run although its flags are valid: memory, a disk, a process, a loss."""


class Preempted(VlftError):
    """The scheduler asked the run to stop. The run is saved, and the same command resumes it."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again later


class Interrupted(Preempted):
    """The user pressed Ctrl-C. The run is saved, and the same command resumes it."""

    exit_code = 130  # as shells report SIGINT: 128 + 2


@dataclass(frozen=True, kw_only=True, slots=True)
class BadRow:
    """A row that cannot be trained, and the reason.

    Attributes:
        file: data file, spelled as the user named it.
        index: position in that file, from 0.
        id: the row's own `id` as text, or None.
        field: path inside the row, e.g. `conversations[2].value` or `image[0]`.
        reason: what is wrong, with both values, and what to do.
        too_long: the row is over a limit of tokens or patches, and nothing else is wrong with it.
    """

    file: str
    index: int
    id: str | None
    field: str
    reason: str
    too_long: bool = False

    @property
    def where(self) -> str:
        """The row and its field, as messages begin."""
        name = f" (id {self.id})" if self.id is not None else ""
        return _encodable(f"{self.file}[{self.index}].{self.field}{name}")

    def __str__(self) -> str:
        return f"{self.where}: {_encodable(self.reason)}"


def _encodable(text: str) -> str:
    """Escape halves of characters, which JSON may hold and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


class DataError(VlftError):
    """A row (`.row`) that cannot be trained."""

    def __init__(self, row: BadRow) -> None:
        file = shlex.quote(row.file)
        super().__init__(f"{row}\n  See it, with the same flags: vlft preview {file} --index {row.index}")
        self.row = row

    def __reduce__(self):  # exceptions cross from loader workers by pickle, which replays the constructor
        return type(self), (self.row,)


@dataclass(frozen=True, kw_only=True)
class RowRef:
    """The row being read, for error messages about it. The attributes are those of `BadRow`."""

    file: str
    index: int
    id: str | None

    def bad(self, field: str, reason: str) -> DataError:
        """Build the error to raise when a field of the row is wrong."""
        return DataError(BadRow(file=self.file, index=self.index, id=self.id, field=field, reason=reason))
