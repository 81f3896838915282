"""Files that are not on this machine: versions, byte ranges, and attempts that are repeated.

http and https are spoken here, because only so a server without byte ranges is found out before it
sends a whole shard; every other protocol is fsspec's.
"""

from __future__ import annotations

import http.client
import io
import random
import string
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import mktime_tz, parsedate_tz
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit, urlunsplit

from fsspec.core import url_to_fs

from speechllm.errors import DataError

ATTEMPTS = 5
TIMEOUT = 60.0  # seconds without a byte, after which an attempt has failed
PAUSE = 0.5  # seconds after the first attempt, doubled after each further one
LONGEST_PAUSE = 60.0  # however long a server asks for
_PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
_VERSIONS = ("ETag", "etag", "blob_id", "LastModified", "last_modified", "mtime", "created")
_BUFFER = 1 << 20

T = TypeVar("T")


class Stat(NamedTuple):
    """size: bytes, None where a server does not tell. version: "" where it does not tell."""

    size: int | None
    version: str


class _PassingError(Exception):
    """What may be gone at the next attempt. pause: seconds that the server asks for before it."""

    def __init__(self, said: str, pause: float = 0.0) -> None:
        super().__init__(said)
        self.pause = pause


def stat(url: str) -> Stat:
    """Size and version. Raises OSError (FileNotFoundError, ...) or DataError."""
    return _repeated(url, lambda: _http_stat(url) if is_http(url) else _fsspec_stat(url))


def fetch(url: str, offset: int, size: int, expected: Stat) -> bytes:
    """Exactly these bytes of a file that is still what `expected` says.

    Raises:
        OSError: the file is gone, or may not be read.
        DataError: it changed, its server serves no byte ranges, or every attempt failed.
    """
    if size == 0:
        return b""

    def attempt() -> bytes:
        if is_http(url):
            data = _http_range(url, offset, size, expected)
        else:
            with _fsspec_errors():
                fs, path = filesystem(url)
                data = fs.cat_file(path, start=offset, end=offset + size)
        if len(data) != size:
            raise _PassingError(f"{len(data)} of {size} bytes at {offset}")
        return data

    return _repeated(url, attempt)


def fetch_all(url: str) -> bytes:
    """A whole file. Raises OSError or DataError, as `fetch`."""

    def attempt() -> bytes:
        if is_http(url):
            with _http_open(url, {}) as response, _http_errors(url):
                data: bytes = response.read()
                return data
        with _fsspec_errors():
            fs, path = filesystem(url)
            whole: bytes = fs.cat_file(path)
            return whole

    return _repeated(url, attempt)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a url and the path in it, of this process and thread.

    Raises DataError for an unknown protocol or one whose package is not installed.
    """
    try:
        return url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise DataError(f"{url}: cannot be reached ({error})") from error


def is_http(url: str) -> bool:
    return url.startswith(("http://", "https://"))


class HttpFile(io.RawIOBase):
    """A seekable file of byte ranges. Raises OSError or DataError, as `stat` and `fetch`."""

    def __init__(self, url: str) -> None:
        self._url, self._stat, self._at = url, stat(url), 0
        if self._stat.size is None:
            raise DataError(f"{url}: the server does not tell the file's size")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._stat.size or 0}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), (self._stat.size or 0) - self._at))
        buffer[:size] = fetch(self._url, self._at, size, self._stat)
        self._at += size
        return size


def open_http(url: str) -> io.BufferedReader:
    return io.BufferedReader(HttpFile(url), _BUFFER)


def _repeated(url: str, attempt: Callable[[], T]) -> T:
    for number in range(1, ATTEMPTS + 1):
        try:
            return attempt()
        except _PassingError as error:
            reason, asked = str(error), error.pause
        if number < ATTEMPTS:  # not all processes of a job at the same moment
            own = PAUSE * 2 ** (number - 1) * random.Random().uniform(0.5, 1.5)
            time.sleep(own + min(asked, LONGEST_PAUSE))
    raise DataError(f"{url}: {ATTEMPTS} attempts failed, the last with: {reason}")


def _http_stat(url: str) -> Stat:
    """By a GET of one byte, which presigned urls allow too, unlike a HEAD."""
    with _http_open(url, {"Range": "bytes=0-0"}) as response:
        if response.status == 206:
            size = _total(response)
        elif response.status == 416:  # of an empty file no byte can be had
            size = _total(response) or 0
        else:
            length = response.headers.get("Content-Length", "")
            size = int(length) if length.isdigit() else None
        return Stat(size, _version(response))


def _http_range(url: str, offset: int, size: int, expected: Stat) -> bytes:
    with (
        _http_open(url, {"Range": f"bytes={offset}-{offset + size - 1}"}) as response,
        _http_errors(url),
    ):
        found = Stat(_total(response), _version(response))
        whole = response.headers.get("Content-Length") == str(expected.size) == str(size)
        if response.status == 200 and not (offset == 0 and whole):
            raise DataError(
                f"{url}: the server serves no byte ranges; put the shards on one that does, on an "
                "object store, or on this machine"
            )
        changed = expected.version not in ("", found.version) or response.status == 416
        if response.status == 206 and None not in (expected.size, found.size):
            changed |= found.size != expected.size
        if changed:
            raise DataError(f"{url}: changed while in use (was {expected}, is {found})")
        data: bytes = response.read(size)
        return data


@contextmanager
def _http_open(url: str, headers: dict[str, str]) -> Iterator[Any]:
    """The response, with status 200, 206 or 416."""
    request = urllib.request.Request(_encoded(url), headers=headers)
    with _http_errors(url):
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code != 416:
                error.close()
                raise
            response = error
    with response:
        yield response


def _encoded(url: str) -> str:
    """With %XX for spaces and letters beyond ASCII, which urllib refuses; what is encoded already
    stays as it is. Raises DataError."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise DataError(f"{url}: cannot be reached ({error})") from error
    if url.isascii() and " " not in url:
        return url
    path, query = (quote(part, safe=string.punctuation) for part in (parts.path, parts.query))
    return urlunsplit(parts._replace(path=path, query=query))


@contextmanager
def _http_errors(url: str) -> Iterator[None]:
    try:
        yield
    except urllib.error.HTTPError as error:
        said = f"{url}: HTTP status {error.code} ({error.reason})"
        if error.code in _PASSING:
            pause = _asked_pause(error.headers.get("Retry-After", ""))
            raise _PassingError(said.removeprefix(f"{url}: "), pause) from error
        if error.code in (404, 410):
            raise FileNotFoundError(said) from error
        if error.code in (401, 403, 407):
            raise PermissionError(said) from error
        raise OSError(said) from error
    except (OSError, http.client.HTTPException) as error:
        raise _PassingError(f"{type(error).__name__}: {error}") from error


def _asked_pause(retry_after: str) -> float:
    """Seconds, given as a number or as a date (RFC 9110, 10.2.3); 0 where neither."""
    if retry_after.isdecimal():
        return float(retry_after)
    date = parsedate_tz(retry_after)
    return 0.0 if date is None else max(0.0, mktime_tz(date) - time.time())


def _total(response: Any) -> int | None:
    """Of `Content-Range: bytes 0-0/1234` the 1234."""
    total = response.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else None


def _version(response: Any) -> str:
    return str(response.headers.get("ETag") or response.headers.get("Last-Modified") or "")


def _fsspec_stat(url: str) -> Stat:
    with _fsspec_errors():
        fs, path = filesystem(url)
        info = fs.info(path)
    size = info.get("size")
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return Stat(None if size is None else int(size), version)


@contextmanager
def _fsspec_errors() -> Iterator[None]:
    """Each fsspec back end lets exceptions of its own client library through."""
    try:
        yield
    except (FileNotFoundError, PermissionError, IsADirectoryError, DataError):
        raise
    except Exception as error:
        raise _PassingError(f"{type(error).__name__}: {error}") from error
