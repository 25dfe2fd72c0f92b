"""Fetch pictures and videos by http(s) into a folder, before costs are measured. Decodes no picture.

Measuring and training then read local files, and a later run needs no network. Called only with
`--allow_remote_media`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urljoin, urlsplit

from vlft import __version__
from vlft.errors import ConfigError
from vlft.files import appearing

if TYPE_CHECKING:
    from requests import Response, Session

FETCHERS = 16  # downloads at a time
FILE_BYTES = 4 << 30  # limit for one file; an hour of video in good quality
SILENCE = 30.0  # seconds without a byte
FILE_SECONDS = 900.0  # limit for one whole file, so that a slow server cannot block a run
REDIRECTS = 5  # limit for one address
TRIES = 3
PAUSE = 1.0  # seconds; doubled after each try
CHUNK = 1 << 16
# Types of error pages. Not text/plain: old servers send it for any file with an ending unknown to them.
PAGES = ("text/html", "text/xml", "application/xhtml+xml", "application/xml", "application/json")
SCHEMES = ("http", "https")
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
# Errors of the folder, not of the address.
_UNWRITABLE = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOTDIR EEXIST"
UNWRITABLE = tuple(getattr(errno, name) for name in _UNWRITABLE.split())


class RemoteMedia:
    """The addresses that rows name, each with the file that it is saved in.

    Attributes:
        folder: where the files are saved.
        urls: file -> address, for all addresses that `file_of` was called with.
        failed: file -> why it could not be fetched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.urls: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def file_of(self, url: str) -> str:
        """Return the file for an address. Its name depends on the address only, so that later runs find it."""
        digest = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:40]
        ending = re.search(r"\.[A-Za-z0-9]{1,5}$", url.partition("?")[0].partition("#")[0])
        path = str(self.folder / digest[:2] / f"{digest}{ending[0].lower() if ending else ''}")
        self.urls[path] = url
        return path


class _Failed(Exception):
    """A fetch that failed. The message says why.

    Attributes:
        again: whether another try may succeed.
    """

    def __init__(self, why: str, *, again: bool = False) -> None:
        super().__init__(why)
        self.again = again


def fetch(wanted: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Fetch addresses into their files, several at a time. A file that already exists is not fetched again.

    Args:
        wanted: file -> address.

    Yields:
        For each file, in order: (file, None) if it exists now, else (file, reason). The reason names the address and
        says what to do.

    Raises:
        ConfigError: the folder cannot be written, or the disk is full.
    """
    stop = threading.Event()
    session = _session()
    pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")
    under_way: deque[tuple[str, Future[str | None]]] = deque()
    try:
        for path, url in wanted.items():
            under_way.append((path, pool.submit(_fetch, session, path, url, stop)))
            if len(under_way) >= 4 * FETCHERS:
                first, done = under_way.popleft()
                yield first, done.result()
        while under_way:
            first, done = under_way.popleft()
            yield first, done.result()
        pool.shutdown()  # no thread may run when loader processes are forked
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        session.close()


def _session() -> Session:
    """A session that reuses connections and sends no user data: no cookies, no passwords from ~/.netrc."""
    from http.cookiejar import DefaultCookiePolicy

    import requests
    from requests.adapters import HTTPAdapter

    session = requests.Session()
    session.headers.update({"User-Agent": f"vlft/{__version__}", "Accept": "*/*", "Accept-Encoding": "identity"})
    session.cookies.set_policy(DefaultCookiePolicy(allowed_domains=[]))
    session.auth = lambda request: request
    for scheme in SCHEMES:
        session.mount(f"{scheme}://", HTTPAdapter(pool_maxsize=FETCHERS))
    return session


def _fetch(session: Session, path: str, url: str, stop: threading.Event) -> str | None:
    """Fetch one file. Returns None if it exists now, else the reason."""
    from urllib3.exceptions import HTTPError

    if os.path.isfile(path):
        return None
    pause = PAUSE
    for left in reversed(range(TRIES)):
        again = left > 0
        try:
            _fetch_once(session, path, url, stop)
            return None
        except _Failed as error:
            why, again = str(error), again and error.again
        except (OSError, ValueError, HTTPError) as error:
            if isinstance(error, OSError) and error.errno in UNWRITABLE:
                folder = os.path.dirname(path)
                raise ConfigError(
                    f"{folder}: files fetched by --allow_remote_media cannot be saved there ({error.strerror}). Free "
                    "some space, or set VLFT_MEDIA_CACHE to another folder"
                ) from error
            why = _root(error)
        if not again or stop.wait(pause):
            break
        pause *= 2
    return f"{url} cannot be fetched ({why}). Fix the address, or download the file and use its path"


def _root(error: BaseException) -> str:
    """The message of the system, e.g. `Connection refused`, which requests wraps in errors about pools."""
    from urllib3.exceptions import HTTPError

    while isinstance(inner := error.__cause__ or error.__context__, OSError | HTTPError):
        error = inner
    return str(error) or type(error).__name__


def _fetch_once(session: Session, path: str, url: str, stop: threading.Event) -> None:
    began = time.monotonic()
    with _answer(session, url) as answer:
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind in PAGES:
            raise _Failed(f"the server returned {kind}, not a picture or video")
        length = answer.headers.get("Content-Length", "")
        promised = int(length) if length.isdecimal() else None
        _refuse_large(promised or 0)
        answer.raw.enforce_content_length = False  # checked below, with both numbers in the message
        with appearing(path) as out:
            size = 0
            while chunk := answer.raw.read1(CHUNK):  # bytes received so far; `iter_content` waits for a full chunk
                size += len(chunk)
                _refuse_large(size)
                if stop.is_set():
                    raise _Failed("the run ended")
                if time.monotonic() - began > FILE_SECONDS:
                    raise _Failed(f"it took more than {FILE_SECONDS:g} s: {size:,} bytes received")
                out.write(chunk)
            if promised is not None and size < promised:
                raise _Failed(f"{size:,} of {promised:,} bytes received", again=True)
            if not size:
                raise _Failed("it is empty")


def _answer(session: Session, url: str) -> Response:
    """The response after redirects, with its content unread. requests itself would read each redirect's content."""
    for _ in range(REDIRECTS + 1):
        answer = session.get(url, timeout=SILENCE, stream=True, allow_redirects=False)
        target = session.get_redirect_target(answer)
        if target is None:
            if answer.status_code >= 300:
                answer.close()
                raise _Failed(f"{answer.status_code} {answer.reason}", again=answer.status_code in TRANSIENT)
            return answer
        answer.close()
        url = urljoin(answer.url, target)
        if urlsplit(url).scheme not in SCHEMES:
            raise _Failed(f"it redirects to {url}, and only http and https are followed")
    raise _Failed(f"it redirects more than {REDIRECTS} times")


def _refuse_large(size: int) -> None:
    if size > FILE_BYTES:
        raise _Failed(f"it has {size:,} bytes or more; the limit is {FILE_BYTES:,}")
