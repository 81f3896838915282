"""The file system as one host of the cluster sees it. Runs in the host's own mount namespace, so
the machine's own view stays as it is."""

from __future__ import annotations

import ctypes
import os
import stat
from pathlib import Path

from layout import Cluster

_LIBC = ctypes.CDLL(None, use_errno=True)
_BIND, _RECURSIVE, _PRIVATE, _DETACH = 4096, 16384, 1 << 18, 2  # <sys/mount.h>


def _mount(source: str, target: Path, kind: str, flags: int, options: str = "") -> None:
    arguments = [part.encode() for part in (source, str(target), kind)]
    if _LIBC.mount(*arguments, ctypes.c_ulong(flags), options.encode()) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"mount {source} on {target}: {os.strerror(number)}")


def bind(source: Path, target: Path) -> None:
    _mount(str(source), target, "", _BIND | _RECURSIVE)


def arrange(cluster: Cluster, name: str, needed: list[Path]) -> None:
    """The host's names and users, its own scratch and shared memory, and `needed` within reach."""
    _mount("", Path("/"), "", _PRIVATE | _RECURSIVE)
    for path in needed:
        make_reachable(path, cluster.host(name) / "stash")
    for stand_in in cluster.etc.iterdir():
        bind(stand_in, Path("/etc") / stand_in.name)
    bind(cluster.host(name) / "scratch", cluster.scratch)
    _mount("tmpfs", Path("/dev/shm"), "tmpfs", 0, "size=1g,mode=1777")


def make_reachable(path: Path, stash: Path) -> None:
    """Let every user walk to `path`, as to a python below a closed /root.

    A folder on the way that others may not enter is covered by an open one that shows the same
    entries; each entry keeps its own rights. Files made directly in the covering folder are not
    kept.
    """
    for folder in reversed(path.parents):
        if folder.is_dir() and not folder.stat().st_mode & stat.S_IXOTH:
            _cover(folder, stash)


def _cover(folder: Path, stash: Path) -> None:
    stash.mkdir(exist_ok=True)
    bind(folder, stash)
    _mount("tmpfs", folder, "tmpfs", 0, "size=1m,mode=755")
    for entry in stash.iterdir():
        twin = folder / entry.name
        if entry.is_symlink():
            twin.symlink_to(os.readlink(entry))
        elif entry.is_dir():
            twin.mkdir()
            bind(entry, twin)
        elif entry.is_file():
            twin.touch()
            bind(entry, twin)
    if _LIBC.umount2(str(stash).encode(), _DETACH) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"umount {stash}: {os.strerror(number)}")
