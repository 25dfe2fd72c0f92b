"""Ends a run that gets nowhere, and says which process stopped where; another night of a stalled job helps nobody.

A thread of each process looks at where its process last was. All processes pass the same places, so the one that has
passed fewest is the one the others wait for.
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

LOOK = 5.0  # seconds between looks; more often for a short limit
LAST_WORDS = 3.0  # seconds that the others have to add their part, before the first one ends
LAST_CALL = 30.0  # seconds after which it ends without a report
SHOWN_ROWS = 8
SHOWN_CALLS = 12


class Store(Protocol):
    """What ranks can read of each other; torch.distributed's stores are such."""

    def set(self, key: str, value: str) -> object: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, amount: int) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a process is.

    Attributes:
        passed: places before this one.
        where: in words.
        rows: that it works on, as file[index].
        for_s: seconds it has been there.
    """

    passed: int
    where: str
    rows: tuple[str, ...] = ()
    for_s: float = 0.0

    def __str__(self) -> str:
        rows = ", ".join(self.rows[:SHOWN_ROWS]) + (", ..." if len(self.rows) > SHOWN_ROWS else "")
        return f"{self.where}, for {self.for_s:,.0f} s" + (f", rows {rows}" if rows else "")


class Watchdog:
    """See the module.

    Args:
        limit: seconds at one place after which the process is ended; 0 for never.
        rank, world: of this process.
        store: by which ranks see each other; None for one process.
        advice: what the user can do, the last line of the report.
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
        # Place, since when, and how many times the limit it may take: one value, for another thread reads it.
        self._here = Place(passed=0, where="starting"), time.monotonic(), 1.0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def at(self, where: str, rows: Sequence[str] = (), *, patience: float = 1.0) -> None:
        """This process comes to a place; all processes come to the same ones, in the same order.

        Args:
            patience: times the limit that it may stay.
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
            self._thread.join(LOOK)  # it may wait for a store that is gone

    def _watch(self) -> None:
        while not self._done.wait(min(LOOK, self.limit / 4)):
            place, patience = self._now()
            if place.for_s > self.limit * patience:
                last = threading.Timer(LAST_CALL, self.end)  # should the store hang as well
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
                self.store = None  # its process is gone; this one is still watched

    def _report(self, here: Place, limit: float) -> None:
        self._publish(here)
        places = self._places(here)
        fewest = min(place.passed for place in places.values() if place is not None)
        behind = {rank for rank, place in places.items() if place is not None and place.passed == fewest}
        if self.store is None or self.store.add("vlft/stalled", 1) == 1:
            lines = [f"stalled: no step went on for {limit:,.0f} s (--stall_timeout)."]
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
        """Of every rank, as it last said."""
        found: dict[int, Place | None] = {self.rank: here}
        for rank in range(self.world):
            if rank != self.rank and self.store is not None:
                known = self.store.check([_key(rank)])
                found[rank] = _place(self.store.get(_key(rank))) if known else None
        return found


def shared_store() -> Store | None:
    """The store by which the processes of this run found each other, for another thread; None for one process."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    # Not public, but in place from torch 2.11 to 2.15, and there is no other way to it.
    from torch.distributed.distributed_c10d import _get_default_store

    return _get_default_store().clone()  # a connection of its own: the first may be waiting


def _stack() -> str:
    """The innermost calls of the main thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)[-SHOWN_CALLS:]).rstrip()


def _key(rank: int) -> str:
    return f"vlft/place/{rank}"


def _place(text: bytes) -> Place:
    raw = json.loads(text)
    return Place(**{**raw, "rows": tuple(raw["rows"])})
