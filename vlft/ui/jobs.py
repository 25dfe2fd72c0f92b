"""Start verbs of vlft as processes of their own, follow them through files, and stop them.

A job is a folder, found again by what it does. So after a reload, in a second tab or after a restart of the page the
same form shows the same job, and a job outlives the page. Nothing of vlft runs in the process of the page.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlft.errors import ConfigError
from vlft.files import cache_folder, write_json
from vlft.ui.keep import ENDED, ERR, JOB, LOCK, OUT, PROCESS
from vlft.ui.words import spoken

NAME = re.compile(r"[a-z-]+-[0-9a-f]{16}")
TAIL = 6000  # bytes of stderr that are read
LAST = 10  # lines that are shown of a command that runs, or ended without an error message
SOON = 30.0  # seconds that the keeper may need to take its lock and to start the verb
STOPPING = 5.0  # seconds that a stop waits for a job that is just being started
AGE = 1.0  # seconds after the end of a job in which its files still count as its own

Word = Literal["running", "done", "failed", "stopped", "lost"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A verb that was started from the page.

    Attributes:
        folder: of the job; its name is the job's.
        words: the command line after `vlft`, as it is shown.
        word: `done`: exit status 0, or 1 with a document. `stopped`: ended by a signal after saving. `lost`: it was
            killed, or the machine went down.
        status: exit status; None if unknown.
        began, ended: seconds since the epoch; `ended` is None while it runs.
        pid: of the verb; None until it has started, and afterwards.
    """

    folder: Path
    words: tuple[str, ...]
    word: Word
    status: int | None
    began: float
    ended: float | None
    pid: int | None

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def seconds(self) -> float:
        """Wall time so far."""
        return (self.ended or time.time()) - self.began

    @functools.cached_property
    def outdated(self) -> str:
        """Return a path of the command line that has changed since the job ended, "" if none has."""
        if self.ended is None:
            return ""
        for flag, word in itertools.pairwise(("", *self.words)):
            if os.path.isabs(word) and flag not in NOT_READ and _modified(word) > self.ended + AGE:
                return word
        return ""

    def document(self) -> Any:
        """Return the JSON document that the verb printed; None if there is none."""
        try:
            return json.loads((self.folder / OUT).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None

    def said(self) -> str:
        """Return the end of what the verb printed for people. Progress lines that overwrite each other become one."""
        try:
            with (self.folder / ERR).open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return ""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
        return "\n".join(line.split("\r")[-1] for line in text.replace("\r\n", "\n").splitlines()).strip()

    def explained(self) -> str:
        """Return `said` with the names of fields in place of flags."""
        return spoken(self.said())

    def ending(self) -> str:
        """Return the error of `explained`; its last lines if there is none."""
        text = self.explained()
        errors = [found.start() for found in re.finditer(r"(?m)^(?:error|stopped): ", text)]
        return text[errors[-1] :] if errors else "\n".join(text.splitlines()[-LAST:])


#: Flags whose folder changes without a change of what the command reads.
NOT_READ = ("--image_folder", "--fix")


class Jobs:
    """The jobs of this user.

    Args:
        root: folder of the job folders; None: in the user's cache folder, or a temporary folder without one.
    """

    def __init__(self, root: str | Path | None = None) -> None:
        found = Path(root) if root else cache_folder(os.environ, variable="VLFT_UI_FOLDER", name="ui")
        self.root = found if found is not None else Path(tempfile.mkdtemp(prefix="vlft-ui-"))
        self._starting = threading.Lock()
        self._latest: dict[str, Path] = {}

    def key(self, verb: str, about: Sequence[str]) -> str:
        """Return the name of the job that does this."""
        told = json.dumps([verb, *about]).encode("utf-8", "backslashreplace")
        return f"{verb}-{hashlib.sha256(told).hexdigest()[:16]}"

    def start(
        self,
        words: Sequence[str],
        *,
        about: Sequence[str] | None = None,
        extra: Mapping[str, str] = {},
        instead: str = "",
    ) -> Job:
        """Start a verb, in place of an earlier job that did the same. A running job with these words is returned.

        Args:
            words: the command line after `vlft`.
            about: what identifies the job; None: the words.
            extra: flag -> name of a file in the job's folder that the verb writes.
            instead: name of a kind of job: the running one of this kind is stopped, because nobody waits for it.

        Raises:
            ConfigError: the same job is running with other words, or its files cannot be written.
        """
        folder = self.root / self.key(words[0], words[1:] if about is None else about)
        with self._starting:
            there = read(folder)
            if there is not None and there.word == "running":
                if there.words == tuple(words):
                    return there
                raise ConfigError("This is running already, with other settings. Wait for it, or stop it.")
            if instead:
                before, self._latest[instead] = self._latest.get(instead), folder
                if before is not None and before != folder and (last := read(before)) is not None:
                    stop(last)
            try:
                self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
                with contextlib.suppress(FileNotFoundError):
                    shutil.rmtree(folder)
                folder.mkdir(mode=0o700)
                asked = [word for flag, file in extra.items() for word in (flag, str(folder / file))]
                document = words[0] != "train"
                argv = _with([*words], [*asked, *(["--json"] if document else [])])
                began = time.time()
                job = {"words": [*words], "argv": [sys.executable, "-m", "vlft", *argv], "document": document}
                write_json(folder / JOB, {**job, "time": began})
                subprocess.Popen(
                    [sys.executable, "-m", "vlft.ui.keep", str(folder)],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
            except OSError as error:
                raise ConfigError(
                    f"{error.filename or folder}: cannot be written ({error.strerror}). Free some space, or set "
                    "VLFT_UI_FOLDER to a folder that can be written and start vlft ui again."
                ) from error
        return Job(folder=folder, words=tuple(words), word="running", status=None, began=began, ended=None, pid=None)

    def find(self, verb: str, about: Sequence[str]) -> Job | None:
        """Return the job that does this, if it was ever started."""
        return read(self.root / self.key(verb, about))

    def named(self, name: str) -> Path | None:
        """Return the folder of a job by its name; None for any other name."""
        folder = self.root / name
        return folder if NAME.fullmatch(name) and folder.is_dir() else None


def _with(words: list[str], asked: list[str]) -> list[str]:
    """Add flags to a command line, before `--` if it has one."""
    place = words.index("--") if "--" in words else len(words)
    return [*words[:place], *asked, *words[place:]]


def read(folder: Path) -> Job | None:
    """Return the job of a folder; None if there is none."""
    job = _read(folder / JOB)
    if job is None:
        return None
    ended = _read(folder / ENDED)
    if ended is None and not _kept(folder, job["time"]):
        ended = _read(folder / ENDED) or {"status": None, "time": _changed(folder)}  # it may have ended meanwhile
    process = None if ended is not None else _read(folder / PROCESS)
    return Job(
        folder=folder,
        words=tuple(job["words"]),
        word=_word(None if ended is None else ended["status"], running=ended is None, folder=folder),
        status=None if ended is None else ended["status"],
        began=job["time"],
        ended=None if ended is None else ended["time"],
        pid=None if process is None else process["pid"],
    )


def stop(job: Job) -> None:
    """Ask a job to stop. A run finishes its step and saves first. One that is being started is waited for."""
    end = time.time() + STOPPING
    while job.pid is None and job.word == "running" and time.time() < end:
        time.sleep(0.05)
        job = read(job.folder) or job
    if job.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(job.pid, signal.SIGTERM)


def _word(status: int | None, *, running: bool, folder: Path) -> Word:
    if running:
        return "running"
    if status is None or status == -signal.SIGKILL:
        return "lost"
    if status in (75, 130, -signal.SIGTERM, -signal.SIGINT):
        return "stopped"
    has_document = status == 1 and (folder / OUT).is_file() and (folder / OUT).stat().st_size > 0
    return "done" if status == 0 or has_document else "failed"


def _kept(folder: Path, began: float) -> bool:
    """Whether the keeper of the job runs: it holds the lock, or has not had the time to take it and start the verb."""
    from vlft.files import lock_handle

    with contextlib.suppress(OSError), (folder / LOCK).open("rb") as file:
        if lock_handle(file.fileno(), shared=True) is False:
            return True
    return not (folder / PROCESS).exists() and time.time() - began < SOON


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _modified(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except (OSError, ValueError):
        return 0.0


def _changed(folder: Path) -> float:
    return max((path.stat().st_mtime for path in folder.iterdir()), default=0.0)
