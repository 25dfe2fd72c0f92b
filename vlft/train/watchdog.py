"""End a run that makes no progress, and report which process stopped where.

A thread of each process checks where its process last was. All processes pass the same places in the same order, so the
process that has passed the fewest places is the one that the others wait for.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch.distributed as dist

from vlft.config.training import TrainFlags

LOOK = 5.0  # seconds between checks; a short limit is checked more often
LAST_WORDS = 3.0  # seconds that the first process waits for the reports of the others before it ends
LAST_CALL = 30.0  # seconds after which the process ends without a report
SHOWN_ROWS = 8
SHOWN_CALLS = 12


class Store(Protocol):
    """Values that ranks share; the stores of torch.distributed have these methods."""

    def set(self, key: str, value: str) -> object: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, amount: int) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process is.

    Attributes:
        passed: number of places before this one.
        where: the place, as text.
        rows: the rows in work, as file[index].
        for_s: seconds since the process came here.
    """

    passed: int
    where: str
    rows: tuple[str, ...] = ()
    for_s: float = 0.0

    def __str__(self) -> str:
        rows = ", ".join(self.rows[:SHOWN_ROWS]) + (", ..." if len(self.rows) > SHOWN_ROWS else "")
        return f"{self.where}, for {self.for_s:,.0f} s" + (f", rows {rows}" if rows else "")


class Watchdog:
    """A context in which a thread ends this process if it stays too long at one place.

    Args:
        limit: seconds at one place after which the process is ended; 0 for never.
        rank: of this process.
        world: number of processes.
        store: through which ranks read each other's places; None for one process.
        advice: returns what the user can do, the last line of the report.
        end: ends this process.
    """

    def __init__(
        self,
        limit: float,
        *,
        rank: int = 0,
        world: int = 1,
        store: Store | None = None,
        advice: Callable[[], str] = str,
        end: Callable[[], Any] = lambda: os._exit(1),
    ) -> None:
        self.limit = limit
        self.rank = rank
        self.world = world
        self.store = store
        self.advice = advice
        self.end = end
        # Place, time of arrival, and patience. One value, because another thread reads it.
        self._here = Place(passed=0, where="starting"), time.monotonic(), 1.0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, where: str, rows: Sequence[str] = (), *, patience: float = 1.0) -> None:
        """This process comes to a place. All processes come to the same places in the same order.

        Args:
            where: the place, as text.
            rows: the rows in work, as file[index].
            patience: factor on the limit for this place.
        """
        passed = self._here[0].passed + 1
        self._here = Place(passed=passed, where=where, rows=tuple(rows)), time.monotonic(), patience

    def __enter__(self) -> Watchdog:
        if self.limit > 0:
            self._here = self._here[0], time.monotonic(), 1.0
            self._thread = threading.Thread(target=self._watch, name="vlft-watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join(LOOK)  # bounded, because the thread may wait for a store that is gone

    def _watch(self) -> None:
        while not self._done.wait(min(LOOK, self.limit / 4)):
            place, patience = self._now()
            if place.for_s > self.limit * patience:
                last = threading.Timer(LAST_CALL, self.end)  # in case the store also hangs
                last.daemon = True
                last.start()
                self._report(place, self.limit * patience)
                last.cancel()
                self.end()
                return
            self._publish(place)

    def _now(self) -> tuple[Place, float]:
        place, since, patience = self._here
        return replace(place, for_s=time.monotonic() - since), patience

    def _publish(self, place: Place) -> None:
        if self.store is not None:
            try:
                self.store.set(_key(self.rank), json.dumps(asdict(place)))
            except RuntimeError:
                self.store = None  # the process that serves it is gone; this process is still watched

    def _report(self, here: Place, limit: float) -> None:
        self._publish(here)
        places = self._places(here)
        fewest = min(place.passed for place in places.values() if place is not None)
        behind = {rank for rank, place in places.items() if place is not None and place.passed == fewest}
        if self.store is None or self.store.add("vlft/stalled", 1) == 1:
            lines = [f"stalled: no progress for {limit:,.0f} s (--stall_timeout)."]
            for rank, place in sorted(places.items()):
                mark = "   <- the others wait for it" if rank in behind and len(behind) < len(places) else ""
                lines.append(
                    f"  rank {rank}: {place if place is not None else 'silent, its process may be gone'}{mark}"
                )
            print("\n".join([*lines, self.advice()]), file=sys.stderr, flush=True)
        if self.rank in behind:
            print(f"where rank {self.rank} is in its code:\n{_stack()}", file=sys.stderr, flush=True)
        if self.world > 1:
            time.sleep(LAST_WORDS)

    def _places(self, here: Place) -> dict[int, Place | None]:
        """Rank -> the place it last published; None if it published none."""
        found: dict[int, Place | None] = {self.rank: here}
        for rank in range(self.world):
            if rank != self.rank and self.store is not None:
                known = self.store.check([_key(rank)])
                found[rank] = _place(self.store.get(_key(rank))) if known else None
        return found


def watchdog_of(args: TrainFlags, advice: Callable[[], str]) -> Watchdog:
    """The watchdog of a run.

    Args:
        args: the training flags.
        advice: what the same command will do next, for the report.
    """
    return Watchdog(
        args.stall_timeout, rank=args.process_index, world=args.world_size, store=shared_store(), advice=advice
    )


def shared_store() -> Store | None:
    """The store of this run's process group, for use in another thread; None for one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    # Not public, but it exists in torch 2.11 to 2.15, and there is no public way to the store.
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store().clone()  # a separate connection, because the first may be blocked


def _stack() -> str:
    """The innermost calls of the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)[-SHOWN_CALLS:]).rstrip()


def _key(rank: int) -> str:
    return f"vlft/place/{rank}"


def _place(text: bytes) -> Place:
    raw = json.loads(text)
    return Place(**{**raw, "rows": tuple(raw["rows"])})
