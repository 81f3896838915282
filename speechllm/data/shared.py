"""Arrays that all processes of a node need: one computes them, all map the same memory.

They lie below the system's temporary directory and can be removed at any time: they are made again.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from speechllm.log import logger

# Below that many, every process has its own: 24 MB.
SHARED_UTTERANCES = 1_000_000
_ENTRIES_KEPT = 8
# numpy cannot map what is empty, and a small array is not worth a mapping.
_MAPPED_BYTES = 1 << 16

Arrays = dict[str, np.ndarray]


def shared_arrays(kind: str, key: str, compute: Callable[[], Mapping[str, np.ndarray]]) -> Arrays:
    """What `compute` gives, read-only, computed by whichever process of this node comes first.

    The others wait for it. Where nothing can be written, every process computes for itself.

    Args:
        kind: says what it is. key: hexadecimal digest of all that the values follow from.
    """
    try:
        root = _root()
        entry = root / f"{kind}-{key[:40]}"
        if entry.is_dir():
            return _load(entry)
        with _lock(root):
            if not entry.is_dir():
                _clear(root)
                _write(root, entry, compute())
            return _load(entry)
    except OSError as error:
        logger.warning("arrays are not shared between the processes of this node: %s", error)
        return dict(compute())


def _root() -> Path:
    """A directory of this user. Raises PermissionError where it is somebody else's."""
    root = Path(tempfile.gettempdir()) / f"speechllm-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.stat().st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user")
    return root


@contextmanager
def _lock(root: Path) -> Iterator[None]:
    """Held until the end of the block or of the process, however that ends."""
    descriptor = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(root: Path, entry: Path, arrays: Mapping[str, np.ndarray]) -> None:
    aside = root / f"unfinished-{os.getpid()}"
    try:
        aside.mkdir()
        for name, array in arrays.items():
            np.save(aside / f"{name}.npy", array, allow_pickle=False)
        aside.rename(entry)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _load(entry: Path) -> Arrays:
    os.utime(entry)
    arrays = {}
    for file in sorted(entry.glob("*.npy")):
        large = file.stat().st_size > _MAPPED_BYTES
        array = np.load(file, mmap_mode="r" if large else None, allow_pickle=False)
        arrays[file.stem] = np.asarray(array)
    return arrays


def _clear(root: Path) -> None:
    """Remove what a killed process left, and the entries that were not used for longest.

    Whoever has mapped their arrays keeps them. Called under the lock.
    """
    entries = [path for path in root.iterdir() if path.is_dir()]
    left = [path for path in entries if path.name.startswith("unfinished-")]
    whole = sorted(set(entries) - set(left), key=lambda path: path.stat().st_mtime)
    for path in left + whole[: max(0, len(whole) - _ENTRIES_KEPT + 1)]:
        shutil.rmtree(path, ignore_errors=True)
