"""Serve an application that is still being loaded: it loads in a thread, and requests wait for it.

The guard is outside, and the server runs already: so a browser opens the address while Gradio is imported.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from vlft.ui.guard import App, Receive, Scope, Send


class Later:
    """An ASGI application in place of one that is loaded.

    Args:
        load: makes the application; runs once, in a thread.
        life: application -> what surrounds the time in which it serves.
    """

    def __init__(self, load: Callable[[], Any], life: Callable[[Any], contextlib.AbstractAsyncContextManager]) -> None:
        self._load, self._life = load, life
        self._ready, self._over = asyncio.Event(), asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._app: App = _failed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on as soon as the application is there."""
        await self._ready.wait()
        await self._app(scope, receive, send)

    def begin(self, stop: Callable[[], None]) -> None:
        """Load the application; `stop` is called if that fails."""
        self._task = asyncio.create_task(self._live())
        self._task.add_done_callback(lambda _: stop())

    async def end(self) -> None:
        """End the application.

        Raises:
            Exception: that of `load`.
        """
        self._over.set()
        if self._task is not None:
            await self._task

    async def _live(self) -> None:
        try:
            app = await asyncio.to_thread(self._load)
            async with self._life(app):
                self._app = app
                self._ready.set()
                await self._over.wait()
        finally:
            self._ready.set()


async def _failed(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 503, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"vlft ui could not start. Its terminal says why."})
