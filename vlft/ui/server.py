"""Serve the page on 127.0.0.1: the guard outside, pages of jobs, and Gradio below them."""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import socket
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vlft.errors import ConfigError
from vlft.pages.web import render
from vlft.ui.assets import Assets
from vlft.ui.desk import Desk
from vlft.ui.guard import Guard, Keys
from vlft.ui.jobs import Jobs
from vlft.ui.later import Later
from vlft.ui.runs import Runs
from vlft.ui.words import spoken_page

ADDRESS = "127.0.0.1"
#: Word in an address -> file of a job that is shown. No other file is ever sent.
PAGES = {"check": "look/report.html", "look": "rows.html"}
#: A page of a job may run nothing, whatever is in it.
SHEET = "sandbox; default-src 'none'; img-src data:; style-src 'unsafe-inline'; frame-ancestors 'self'"
UPLOAD = "200mb"


def listen(port: int, *, given: bool) -> socket.socket:
    """Take a port.

    Args:
        port: the wanted one.
        given: the user named it, so no other one is taken.

    Raises:
        ConfigError: it is taken; the message names the next free one.
    """
    for one in range(port, min(port + 100, 65536)):
        try:
            taken = _bound(one)
        except OSError:
            continue
        if one == port or not given:
            return taken
        taken.close()
        raise ConfigError(f"--port {port}: is taken by another program. The next free one: vlft ui --port {one}")
    raise ConfigError(f"--port {port}: is taken, and so are the next ones. Name another: vlft ui --port N")


def _bound(port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((ADDRESS, port))
        found.listen(128)
    except OSError:
        found.close()
        raise
    return found


def application(desk: Desk, *, port: int) -> Any:
    """Return the application: pages of jobs, and Gradio below them."""
    _settings(desk.jobs.root)
    gc.disable()  # what is imported and built stays: looking for garbage in it takes half a second of the first screen
    try:
        return _application(desk, port)
    finally:
        gc.freeze()
        gc.enable()


def _application(desk: Desk, port: int) -> Any:
    import gradio as gr
    from fastapi import FastAPI, Response

    from vlft.ui.page import build

    start = secrets.token_hex(8)  # no secret: tells a tab whether the server is the one that it was loaded from
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/job/{name}/{page}")
    def sheet(name: str, page: str) -> Response:
        folder = desk.jobs.named(name)
        try:
            html = (folder / PAGES[page]).read_text(encoding="utf-8") if folder is not None else None
        except (KeyError, OSError, ValueError):
            html = None
        if html is None:
            return Response(status_code=404)
        html = spoken_page(html) if page == "check" else html
        return Response(html, media_type="text/html", headers={"content-security-policy": SHEET})

    @app.get("/alive")
    def alive() -> Response:
        return Response(start, media_type="text/plain")

    return gr.mount_gradio_app(
        app,
        build(desk),
        path="/",
        server_name=ADDRESS,
        server_port=port,
        allowed_paths=[],
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        max_file_size=UPLOAD,
        theme=gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        head=render("ui_head.html.j2", title="", start=start),
    )


def _settings(root: Path) -> None:
    """Set what Gradio reads from the environment at import: no analytics, uploads in the user's own folder."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")
    with contextlib.suppress(OSError):  # an upload says it again
        for private in (root, root / "uploads"):
            private.mkdir(parents=True, exist_ok=True, mode=0o700)


def serve(listening: socket.socket, desk: Desk, *, keys: Keys, ready: Callable[[], None]) -> None:
    """Serve the page, guarded, until the user stops it. Gradio is imported while the browser opens the address.

    Args:
        listening: the port.
        desk: an empty one.
        keys: the secrets.
        ready: called when the address can be opened.
    """
    import uvicorn

    port = listening.getsockname()[1]
    files = _folder("gradio") / "templates" / "frontend" / "assets"
    later = Later(lambda: application(desk, port=port), life=lambda app: app.router.lifespan_context(app))

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            later.begin(self.stop)
            ready()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            await super().shutdown(sockets)
            await later.end()

        def stop(self) -> None:
            self.should_exit = True

    pages = {name: render(f"ui_{name}.html.j2", title="") for name in ("door", "closed")}
    config = uvicorn.Config(
        Guard(Assets(later, files), port=port, keys=keys, **pages),
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=1,
        server_header=False,
    )
    Server(config).run(sockets=[listening])


def _folder(package: str) -> Path:
    """Return the folder of a package without importing it."""
    found = find_spec(package)
    return Path(found.origin).parent if found is not None and found.origin is not None else Path(package)


def desk_for(folder: str) -> Desk:
    """Return an empty desk with the jobs of this user."""
    return Desk(jobs=Jobs(), runs=Runs(), folder=folder)
