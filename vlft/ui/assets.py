"""Send Gradio's scripts and styles as files. Through its own layers they take a third of the time of the first screen.

Their names change with their contents, so a browser keeps them: the next start of the page reads them from its cache.
"""

from __future__ import annotations

from pathlib import Path

from vlft.ui.guard import App, Receive, Scope, Send

KINDS = {".js": b"text/javascript; charset=utf-8", ".css": b"text/css; charset=utf-8"}
KEEP = b"private, max-age=2592000, immutable"


class Assets:
    """Wrap an application: it gets every request that is not for one of these files.

    Args:
        app: the application.
        folder: of the files; one that does not exist has none.
        under: their place in addresses.
    """

    def __init__(self, app: App, folder: Path, *, under: str = "/assets/") -> None:
        self.app = app
        found = folder.iterdir() if folder.is_dir() else ()
        self.files = {under + path.name: path for path in found if path.suffix in KINDS}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send a file, or pass the request on."""
        path = self.files.get(scope["path"]) if scope["type"] == "http" and scope["method"] == "GET" else None
        if path is None:
            await self.app(scope, receive, send)
            return
        body = path.read_bytes()
        headers = [
            (b"content-type", KINDS[path.suffix]),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", KEEP),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
