"""Numbers and paths as corpora write them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, TypeGuard

from speechllm.data.files import local_path
from speechllm.errors import DataError
from speechllm.log import logger

# Of seconds; more cannot be counted in samples.
_LARGEST = 1e12


def directory_of(path: str) -> str:
    """Where the file lies, as an absolute path or a url."""
    local = local_path(path)
    if local is not None:
        return os.path.dirname(os.path.abspath(local))
    return path.rsplit("/", 1)[0]


def beside(path: str, name: str) -> str:
    """`name` in the directory `path`, which may be a url."""
    return f"{path.rstrip('/')}/{name}" if local_path(path) is None else os.path.join(path, name)


def require_directory(path: str, what: str) -> None:
    """Raises DataError where there is no local directory of that name."""
    if not os.path.isdir(path):
        raise DataError(f"{path}: no such directory; {what}")


def walk(directory: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder from this one down with its files, sorted; then what lies behind links, because
    parts of a corpus are often linked from other disks. A folder comes once, links may go round."""
    seen: set[str] = set()
    waiting = [directory]
    while waiting:
        for folder, below, files in os.walk(waiting.pop(0), onerror=_say_unreadable):
            real = os.path.realpath(folder)
            if real in seen:
                below.clear()
                continue
            seen.add(real)
            below.sort()
            paths = [os.path.join(folder, name) for name in below]
            waiting += filter(os.path.islink, paths)
            yield folder, sorted(files)


def _say_unreadable(error: OSError) -> None:
    logger.warning("%s: left out, it cannot be read (%s)", error.filename, error.strerror)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether it can be seconds: neither NaN nor beyond all audio."""
    counts = isinstance(value, int | float) and not isinstance(value, bool)
    return counts and -_LARGEST <= value <= _LARGEST


def seconds(value: Any, name: str, where: str) -> float | None:
    """A number, or text that is one; None stays None. Raises DataError for anything else."""
    if value is None or value == "":
        return None
    number = value
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            number = None
    if not is_number(number):
        raise DataError(f"{where}: `{name}` must be a number of seconds, not {value!r}")
    if number < 0:
        raise DataError(f"{where}: `{name}` is negative ({value})")
    return float(number)


def channel(value: Any, name: str, where: str) -> int | None:
    """0, 1, ..., also as text; None stays None. Raises DataError for anything else."""
    if value is None or value == "":
        return None
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise DataError(f"{where}: `{name}` must be 0, 1, ..., not {value!r}")
    return number
