"""Let nobody but the user reach the page: a token, a cookie, and checks of where a request comes from.

The page runs commands as the user, so a request counts only if it carries the secret of this start of `vlft ui`. An
ASGI layer around the whole application: independent of what the application does.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

#: The page loads nothing from other hosts. Gradio's own scripts need inline code and `eval`.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; frame-ancestors 'self'; object-src 'none'; base-uri 'self'; form-action 'self'; "
    "worker-src 'self' blob:"
)
HEADERS = (
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
)
#: Routes of Gradio that fetch other addresses.
NEVER = ("/gradio_api/proxy=", "/proxy=", "/gradio_api/file=http", "/file=http", "/gradio_api/deep_link")


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The secrets of one start.

    Attributes:
        token: in the printed address.
        once: a token that counts once, for the browser that is opened here: others may list its command line.
        cookie: what a browser gets for a token. It is another secret, so that it is in no history.
    """

    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    once: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    cookie: str = field(default_factory=lambda: secrets.token_urlsafe(24))


class Guard:
    """Wrap an application.

    Args:
        app: is called for requests that are the user's.
        port: where the page is served.
        keys: the secrets.
        door: HTML that is sent with the cookie, and leads to the page. A redirect would not do: a browser that follows
            the address from another page sends no strict cookie with it.
        closed: HTML for a request without the secrets.
    """

    def __init__(self, app: App, *, port: int, keys: Keys, door: str, closed: str) -> None:
        self.app, self.keys, self.door, self.closed = app, keys, door, closed
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}
        self.spent = False
        self.name = f"vlft_ui_{port}"  # cookies do not know ports

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        status = self.judge(scope)
        if status == 403 and scope["type"] == "http" and scope["path"] == "/manifest.json":
            # Browsers ask for it without the cookie, and report a refusal as an error.
            await _answer(send, 200, "{}", kind="application/manifest+json")
            return
        if status == 200:
            await self.app(scope, receive, _adding(send))
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008})
        elif status == 303:
            await _answer(
                send, 200, self.door, cookie=f"{self.name}={self.keys.cookie}; HttpOnly; SameSite=Strict; Path=/"
            )
        else:
            await _answer(send, status, self.closed)

    def judge(self, scope: Scope) -> int:
        """Return 200 for a request of the user, 303 for one with the token, else the status that refuses it."""
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name.decode("latin-1").lower(), []).append(value.decode("latin-1"))
        hosts = headers.get("host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return 421  # another name for this machine: a page of another site may have made its name point here
        for origin in headers.get("origin", []):
            if urlsplit(origin).netloc.lower() != hosts[0].lower() or not origin.startswith("http://"):
                return 403
        if _same(self._cookie(headers.get("cookie", [])), self.keys.cookie):
            path = scope["path"].lower()
            return 403 if path.startswith(NEVER) else 200
        asked = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        if scope["type"] == "http" and scope["method"] == "GET" and scope["path"] == "/" and len(asked) == 1:
            if _same(asked[0], self.keys.once) and not self.spent:
                self.spent = True
                return 303
            return 303 if _same(asked[0], self.keys.token) else 403
        return 403

    def _cookie(self, lines: list[str]) -> str:
        for line in lines:
            try:
                found = SimpleCookie(line).get(self.name)
            except CookieError:
                continue
            if found is not None:
                return found.value
        return ""


def _same(given: str, secret: str) -> bool:
    return hmac.compare_digest(given.encode("utf-8", "replace"), secret.encode())


def _adding(send: Send) -> Send:
    """Return a `send` that adds our headers to the application's answer."""

    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            there = {name.lower() for name, _ in message.get("headers", ())}
            own = [(name, value) for name, value in HEADERS if name not in there]
            if b"content-security-policy" not in there:
                own.append((b"content-security-policy", POLICY.encode("ascii")))
            message = {**message, "headers": [*message.get("headers", ()), *own]}
        await send(message)

    return sending


async def _answer(
    send: Send, status: int, text: str, *, kind: str = "text/html; charset=utf-8", cookie: str | None = None
) -> None:
    headers = [(b"content-type", kind.encode("ascii")), *HEADERS]
    headers.append((b"content-security-policy", b"default-src 'none'; style-src 'unsafe-inline'"))
    if cookie is not None:
        headers.append((b"set-cookie", cookie.encode("ascii")))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
