"""Pictures and videos by http(s), fetched into a folder before anything is measured. Knows neither rows nor pixels.

Costs and training then see local files, and a later run needs no network. Only what `--allow_remote_media` lets in
comes here.
"""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import re
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from vlft import __version__
from vlft.errors import ConfigError
from vlft.files import appearing

FETCHERS = 16  # at a time
FILE_BYTES = 4 << 30  # of one file; an hour of video in good quality
SILENCE = 30.0  # seconds without a byte
FILE_SECONDS = 900.0  # for one file in all, so that a server that drips cannot hold up a run
TRIES = 3
PAUSE = 1.0  # seconds, twice as many after each try
CHUNK = 1 << 16
# Of pages that say what is wrong. Not text/plain: old servers say so of any file whose ending they do not know.
PAGES = ("text/html", "text/xml", "application/xhtml+xml", "application/xml", "application/json")
SCHEMES = ("http", "https")
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
# The folder's fault and not the address's.
UNWRITABLE = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENOTDIR,
    errno.EEXIST,
)


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
    """Why an address gives nothing that can be used."""


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urllib.parse.urlsplit(newurl).scheme not in SCHEMES:  # urllib itself would follow to ftp
            raise _Failed(f"it redirects to {newurl}, and only http and https are followed")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


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
    pool = ThreadPoolExecutor(FETCHERS, thread_name_prefix="fetch")
    under_way: deque[tuple[str, Future[str | None]]] = deque()
    try:
        for path, url in wanted.items():
            under_way.append((path, pool.submit(_fetch, path, url, stop)))
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


def _fetch(path: str, url: str, stop: threading.Event) -> str | None:
    """None once the file is there, or why it is not."""
    if os.path.isfile(path):
        return None
    pause = PAUSE
    for left in reversed(range(TRIES)):
        again = left > 0
        try:
            _fetch_once(path, url, stop)
            return None
        except urllib.error.HTTPError as error:
            error.close()
            why, again = f"{error.code} {error.reason}", again and error.code in TRANSIENT
        except _Failed as error:
            why, again = str(error), False
        except (OSError, ValueError, urllib.error.URLError) as error:
            if isinstance(error, OSError) and error.errno in UNWRITABLE:
                folder = os.path.dirname(path)
                raise ConfigError(
                    f"{folder}: what --allow_remote_media fetches cannot be kept there ({error.strerror}). Make room, "
                    "or set VLFT_MEDIA_CACHE to another folder"
                ) from error
            why = str(getattr(error, "reason", error)) or type(error).__name__
        except http.client.HTTPException as error:
            why = f"{type(error).__name__} {error}".strip()
        if not again or stop.wait(pause):
            break
        pause *= 2
    return f"{url} cannot be fetched ({why}). Mend the address, or download the file and name its path"


def _fetch_once(path: str, url: str, stop: threading.Event) -> None:
    plain = urllib.parse.quote(url, safe="%/:=&?~#+!$,;'@()*[]")
    began = time.monotonic()
    with _opener().open(plain, timeout=SILENCE) as answer:
        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind in PAGES:
            raise _Failed(f"it answers with {kind}, not with a picture or video")
        length = answer.headers.get("Content-Length", "")
        promised = int(length) if length.isdecimal() else None
        with appearing(path) as out:
            size = 0
            _refuse_large(promised or 0)
            while chunk := answer.read1(CHUNK):
                size += len(chunk)
                _refuse_large(size)
                if stop.is_set():
                    raise _Failed("the run ended meanwhile")
                if time.monotonic() - began > FILE_SECONDS:
                    raise _Failed(f"it took more than {FILE_SECONDS:g} s: {size:,} bytes came")
                out.write(chunk)
            if promised is not None and size < promised:
                raise ConnectionError(f"{size:,} of {promised:,} bytes came")
            if not size:
                raise _Failed("it is empty")


def _refuse_large(size: int) -> None:
    if size > FILE_BYTES:
        raise _Failed(f"it has {size:,} bytes or more, and {FILE_BYTES:,} at most are fetched")


def _opener() -> urllib.request.OpenerDirector:
    """For http and https only: urllib's own opener reads files and ftp too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        _Redirects,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    opener.addheaders = [("User-Agent", f"vlft/{__version__}"), ("Accept", "*/*")]
    return opener
