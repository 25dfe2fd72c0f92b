"""Files and folders are written atomically, and locks: the state after an error, after a kill, and with children."""

from __future__ import annotations

import errno
import os
import re
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vlft
from vlft.errors import CheckpointError
from vlft.files import Lock, appearing, appearing_path, put_in_place, sync_tree, workshop, write_json, write_text
from vlft.train.lock import LOCK, hold


@contextmanager
def process(work: Callable[[], None]) -> Iterator[int]:
    """Fork a process that does `work` and then waits to be killed."""
    ready, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(said, b"x")
            time.sleep(60)
        finally:
            os._exit(1)
    assert os.read(ready, 1) == b"x"
    try:
        yield child
    finally:
        for end in (ready, said):
            os.close(end)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _fail_while_writing(path: Path) -> None:
    before = path.read_text()
    with appearing(path) as out:
        out.write(b"half")
        out.flush()
        assert path.read_text() == before
        raise ValueError("half way")


def _fail_in(folder: Path, interrupted: Callable[[], None]) -> None:
    with workshop(folder, interrupted=interrupted):
        assert not list(folder.iterdir())
        (folder / "half").write_text("")
        raise ValueError("half way")


def test_a_file_is_written_atomically(tmp_path):
    path = tmp_path / "new" / "a.json"
    write_text(path, "first \ud800")
    with pytest.raises(ValueError, match="half way"):
        _fail_while_writing(path)
    assert path.read_text() == "first \\ud800"
    with appearing_path(path) as spare:
        assert spare.suffix == ".json"
        spare.write_text("second")
        assert path.read_text() == "first \\ud800"
    assert path.read_text() == "second"
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_what_a_resume_relies_on_is_synced_and_a_cache_is_not(tmp_path, monkeypatch):
    synced: list[str] = []

    def fsync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "cache.json", {})
    assert synced == []
    write_json(tmp_path / "vlft.json", {}, durable=True)
    content, names = synced
    assert content.endswith(".tmp.json")  # before it has its name
    assert names == str(tmp_path)
    synced.clear()
    sync_tree(tmp_path)
    assert sorted(synced) == sorted([str(tmp_path), str(tmp_path / "cache.json"), str(tmp_path / "vlft.json")])


def test_a_lock_keeps_others_out_until_its_process_is_killed(tmp_path):
    for path in (tmp_path / "file", tmp_path):
        with process(Lock(path).take):
            with pytest.raises(BlockingIOError, match="another process holds it"):
                Lock(path).take()
            if path.is_dir():
                with pytest.raises(BlockingIOError), workshop(path):
                    pytest.fail("entered a folder that another process works in")
        with Lock(path), pytest.raises(BlockingIOError):
            Lock(path).take()
        Lock(path).take()  # is free again


def test_children_do_not_hold_the_lock_of_their_parent(tmp_path):
    """Loader workers outlive a killed trainer for seconds."""
    lock = Lock(tmp_path)
    lock.take()
    with process(lambda: None):
        lock.release()
        with Lock(tmp_path):
            pass


def test_waiting_for_a_lock(tmp_path):
    def held_for_a_moment() -> None:
        lock = Lock(tmp_path / "lock")
        lock.take()
        signal.signal(signal.SIGALRM, lambda *_: lock.release())
        signal.setitimer(signal.ITIMER_REAL, 0.3)

    with process(held_for_a_moment):
        began = time.monotonic()
        lock = Lock(tmp_path / "lock")
        lock.take(wait=True)
        assert time.monotonic() - began > 0.1
        lock.release()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_run_is_refused_where_the_file_system_has_no_locks(tmp_path, monkeypatch, number):
    """Lustre and some NFS are mounted like this. A file as a lock would stay after a kill."""

    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with pytest.raises(
        CheckpointError, match=r"cannot be locked .* Choose a folder on a file system that supports flock"
    ):
        hold(tmp_path / "run")


def test_two_runs_in_one_folder(tmp_path):
    held = hold(tmp_path)
    with pytest.raises(CheckpointError, match="another run is training there right now"):
        hold(tmp_path)
    held.release()
    hold(tmp_path).release()
    assert (tmp_path / LOCK).is_file()


def test_a_workshop_is_empty_and_leaves_nothing(tmp_path):
    folder, target = tmp_path / "aside", tmp_path / "out"
    (folder / "left").mkdir(parents=True)
    (folder / "left.txt").write_text("of a killed process")
    told: list[str] = []
    with pytest.raises(ValueError, match="half way"):
        _fail_in(folder, lambda: told.append("left"))
    assert told == ["left"]
    assert not folder.exists()
    with workshop(folder, interrupted=lambda: told.append("again")):
        (folder / "last").write_text("whole")
        put_in_place(folder, target, last="last")
    assert told == ["left"]
    assert (target / "last").read_text() == "whole"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_locks_and_spare_names_are_made_in_one_place():
    names = re.compile(r"\b(os\.umask|mkstemp|fcntl|flock\(|NamedTemporaryFile|fsync\()")
    places = {file for file in Path(vlft.__path__[0]).rglob("*.py") if names.search(file.read_text(encoding="utf-8"))}
    assert places == {Path(vlft.__path__[0]) / "files.py"}
