"""Run one command to its end and note how it ended. `vlft.ui.jobs` starts this module as a process of its own.

    python -m vlft.ui.keep FOLDER

It reads the words from `job.json` in the folder, and outlives the page that started it. While it runs it holds the lock
of the folder, so that a job whose machine went down is not taken for a running one. Only the user can enter the folder;
what the command writes elsewhere has the user's own permissions.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlft.files import Lock, write_json

JOB, PROCESS, ENDED, LOCK = "job.json", "process.json", "ended.json", ".lock"
OUT, ERR = "stdout", "stderr"


def keep(folder: Path) -> int:
    """Run the command of a job folder; return its exit status, negative for a signal.

    Raises:
        BlockingIOError: another process keeps this job.
        OSError: the folder cannot be written.
    """
    # A signal for the command is sent to it alone. This process must see how it ends.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)  # a handler, not SIG_IGN: that would be inherited by the command
    lock = Lock(folder / LOCK)
    lock.take(wait=True)  # the page may be looking whether it is held
    with lock:
        job: Mapping[str, Any] = json.loads((folder / JOB).read_text(encoding="utf-8"))
        with (folder / OUT).open("wb") as out, (folder / ERR).open("wb") as err:
            try:
                # What a verb without a document prints is all for people: one file keeps it in order.
                told = out if job["document"] else err
                process = subprocess.Popen(job["argv"], stdin=subprocess.DEVNULL, stdout=told, stderr=err)
            except OSError as error:
                err.write(f"error: the command could not be started: {error}\n".encode())
                write_json(folder / ENDED, {"status": 127, "time": time.time()})
                return 127
            write_json(folder / PROCESS, {"pid": process.pid, "time": time.time()})
            status = process.wait()
        write_json(folder / ENDED, {"status": status, "time": time.time()})
    return status


if __name__ == "__main__":
    keep(Path(sys.argv[1]))
