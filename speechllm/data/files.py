"""Where bytes lie: local paths by the operating system, everything else by `remote`."""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from speechllm.data import remote
from speechllm.data.remote import Stat, filesystem
from speechllm.errors import DataError

_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def local_path(url: str) -> str | None:
    """The path of a local file (`file://` taken off), None for anything remote."""
    if url.startswith("file://"):
        return url.removeprefix("file://")
    return None if "://" in url or "::" in url else url


def open_binary(url: str) -> Any:
    """A seekable file for reading bytes; `.gz` and the like are taken as they are."""
    path = local_path(url)
    if path is not None:
        return open(path, "rb")
    if remote.is_http(url):
        return remote.open_http(url)
    fs, inner = filesystem(url)
    with _as_os_errors():
        return fs.open(inner, "rb")


def read_bytes(url: str) -> bytes:
    """A whole file. Raises OSError, or DataError where a remote one does not come."""
    path = local_path(url)
    if path is None:
        return remote.fetch_all(url)
    with open(path, "rb") as file:
        return file.read()


def file_size(url: str) -> int | None:
    """Bytes, or None where a server does not tell. Raises OSError when the file is not there."""
    path = local_path(url)
    return os.stat(path).st_size if path is not None else remote.stat(url).size


def file_stamp(url: str) -> Stat:
    """Size and version of a file: one that is written anew has another stamp. Raises OSError."""
    path = local_path(url)
    if path is None:
        return remote.stat(url)
    about = os.stat(path)
    return Stat(about.st_size, str(about.st_mtime_ns))


@contextmanager
def _as_os_errors() -> Iterator[None]:
    """Each fsspec back end lets exceptions of its own client library through."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


def write_atomically(url: str, data: bytes) -> None:
    """Write a whole file such that a reader sees the old one or the new one, never a part.

    Local files are written aside, synced and renamed; object stores put whole objects anyway.
    Raises DataError where the place cannot be written.
    """
    path = local_path(url)
    try:
        if path is None:
            if remote.is_http(url):
                raise DataError(f"{url}: cannot be written over http")
            fs, inner = filesystem(url)
            with _as_os_errors():
                fs.pipe_file(inner, data)
            return
        aside = f"{path}.tmp-{os.getpid()}"
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        raise DataError(f"{url}: cannot be written ({error})") from error


def expand_braces(pattern: str) -> list[str]:
    """`x-{000..002}.tar` -> x-000.tar, x-001.tar, x-002.tar, as the WebDataset tools read it."""
    pieces = _BRACES.split(pattern)
    choices: list[list[str]] = []
    for i in range(0, len(pieces), 3):
        choices.append([pieces[i]])
        if i + 2 < len(pieces):
            first, last = pieces[i + 1], pieces[i + 2]
            numbers = range(int(first), int(last) + 1)
            choices.append([str(number).zfill(len(first)) for number in numbers])
    return ["".join(choice) for choice in itertools.product(*choices)]


def list_tars(pattern: str) -> list[str]:
    """The tars that a directory, a glob, a `{000..123}` range or a single name stands for.

    Local results are absolute paths. A plain `x.tar` is returned whether or not it is there.
    Raises DataError where an http server would have to be asked what it holds.
    """
    found: list[str] = []
    for one in expand_braces(pattern):
        path = local_path(one)
        if path is not None:
            path = os.path.abspath(os.path.expanduser(path))
            if os.path.isdir(path):
                found += glob.glob(os.path.join(glob.escape(path), "*.tar"))
            elif os.path.exists(path) or (path.endswith(".tar") and not glob.has_magic(path)):
                found.append(path)
            else:
                found += glob.glob(path, recursive=True)
            continue
        if remote.is_http(one):
            found += _http_tars(one)
            continue
        fs, inner = filesystem(one)
        if glob.has_magic(inner):
            found += [fs.unstrip_protocol(name) for name in fs.glob(inner)]
        elif inner.endswith(".tar") or not fs.isdir(inner):
            found.append(one)
        else:
            names = fs.glob(inner.rstrip("/") + "/*.tar")
            found += [fs.unstrip_protocol(name) for name in names]
    return found


def _http_tars(url: str) -> list[str]:
    """http has no directories: shards are named, or a dataset.json names those beside it."""
    if url.endswith(".tar") and not glob.has_magic(url):
        return [url]
    card = f"{url.rstrip('/')}/dataset.json"
    try:
        names = [shard["file"] for shard in json.loads(read_bytes(card))["shards"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{url}: what an http server holds cannot be listed, and no shards are named by {card} "
            f"({error}); name them, e.g. https://HOST/DIR/train-{{000000..000123}}.tar"
        ) from error
    return [f"{url.rstrip('/')}/{name}" for name in names]
