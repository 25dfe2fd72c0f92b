"""Pictures and videos by http(s), fetched into a folder before anything is measured. Knows neither rows nor pixels.

Costs and training then see local files, and a later run needs no network. Only what `--allow_remote_media` lets in
comes here.
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

FETCHERS = 16  # at a time
FILE_BYTES = 4 << 30  # of one file; an hour of video in good quality
SILENCE = 30.0  # seconds without a byte
FILE_SECONDS = 900.0  # for one file in all, so that a server that drips cannot hold up a run
REDIRECTS = 5  # one after another
TRIES = 3
PAUSE = 1.0  # seconds, twice as many after each try
CHUNK = 1 << 16
# Of pages that say what is wrong. Not text/plain: old servers say so of any file whose ending they do not know.
PAGES = ("text/html", "text/xml", "application/xhtml+xml", "application/xml", "application/json")
SCHEMES = ("http", "https")
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
# The folder's fault and not the address's.
_UNWRITABLE = "ENOSPC EDQUOT EFBIG EROFS EACCES EPERM ENOTDIR EEXIST"
UNWRITABLE = tuple(getattr(errno, name) for name in _UNWRITABLE.split())


class RemoteMedia:
    """Addresses that rows name, and the file that each is, or is to be, kept in.

    Attributes:
        folder: of the files.
        urls: file -> address, of all that were asked for.
        failed: file -> why it could not be fetched.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.urls: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def file_of(self, url: str) -> str:
        """The file an address is kept in; named by the address, so that another run finds it."""
        digest = hashlib.sha256(url.encode(errors="surrogatepass")).hexdigest()[:40]
        ending = re.search(r"\.[A-Za-z0-9]{1,5}$", url.partition("?")[0].partition("#")[0])
        path = str(self.folder / digest[:2] / f"{digest}{ending[0].lower() if ending else ''}")
        self.urls[path] = url
        return path


class _Failed(Exception):
    """Why an address gives nothing that can be used. `again`: another try may help."""

    def __init__(self, why: str, *, again: bool = False) -> None:
        super().__init__(why)
        self.again = again


def fetch(wanted: Mapping[str, str]) -> Iterator[tuple[str, str | None]]:
    """Bring addresses into their files, several at a time; a file that is there is left alone.

    Args:
        wanted: file -> address.

    Yields:
        (file, None) or (file, reason) for each, in order; the reason names the address and says what to do.

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
        pool.shutdown()  # no thread is left when loader processes are forked
    finally:
        stop.set()
        pool.shutdown(wait=False, cancel_futures=True)
        session.close()


def _session() -> Session:
    """Connections that are used again, and nothing of the user's: no cookies, no passwords of ~/.netrc."""
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
    """None once the file is there, or why it is not."""
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
                    f"{folder}: what --allow_remote_media fetches cannot be kept there ({error.strerror}). Make room, "
                    "or set VLFT_MEDIA_CACHE to another folder"
                ) from error
            why = _root(error)
        if not again or stop.wait(pause):
            break
        pause *= 2
    return f"{url} cannot be fetched ({why}). Mend the address, or download the file and name its path"


def _root(error: BaseException) -> str:
    """What the system said, e.g. `Connection refused`; requests wraps it in sentences about pools."""
    from urllib3.exceptions import HTTPError

    while isinstance(inner := error.__cause__ or error.__context__, OSError | HTTPError):
        error = inner
    return str(error) or type(error).__name__


def _fetch_once(session: Session, path: str, url: str, stop: threading.Event) -> None:
    began = time.monotonic()
    with _answer(session, url) as answer:
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind in PAGES:
            raise _Failed(f"it answers with {kind}, not with a picture or video")
        length = answer.headers.get("Content-Length", "")
        promised = int(length) if length.isdecimal() else None
        _refuse_large(promised or 0)
        answer.raw.enforce_content_length = False  # said below, with both numbers
        with appearing(path) as out:
            size = 0
            while chunk := answer.raw.read1(CHUNK):  # what has come: `iter_content` waits for a chunk to be full
                size += len(chunk)
                _refuse_large(size)
                if stop.is_set():
                    raise _Failed("the run ended meanwhile")
                if time.monotonic() - began > FILE_SECONDS:
                    raise _Failed(f"it took more than {FILE_SECONDS:g} s: {size:,} bytes came")
                out.write(chunk)
            if promised is not None and size < promised:
                raise _Failed(f"{size:,} of {promised:,} bytes came", again=True)
            if not size:
                raise _Failed("it is empty")


def _answer(session: Session, url: str) -> Response:
    """The answer after redirects, its content not read. requests itself reads the content of each redirect, whole."""
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
        raise _Failed(f"it has {size:,} bytes or more, and {FILE_BYTES:,} at most are fetched")
