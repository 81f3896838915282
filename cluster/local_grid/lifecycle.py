"""Up and down. Going up twice changes nothing, except that dead hosts come back."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from etc_files import write_etc
from hosts import alive, start_host, stop_hosts
from layout import MASTER, REPOSITORY, Cluster, GridError, load_cluster
from master import configure, make_spool, wait_for_hosts, wait_for_master


def needed_paths(more: list[Path]) -> list[Path]:
    """What jobs must be able to read: the repository and the pythons that may run in them."""
    pythons = [Path(sys.executable), REPOSITORY / ".venv" / "bin" / "python"]
    homes = [path.resolve().parents[1] for path in pythons if path.exists()]
    return [REPOSITORY, Path(sys.prefix), *homes, *(path.absolute() for path in more)]


def bring_up(wanted: Cluster, more: list[Path], guard: int = -1) -> list[str]:
    """The names of the hosts that were started.

    more: what jobs must be able to read besides the repository. guard: see `start_host`.
    """
    cluster = load_cluster(wanted.directory)
    if cluster is not None and cluster != wanted and alive(cluster, MASTER):
        raise GridError(f"A cluster of another size is up ({cluster}); take it down first.")
    if cluster is None or not alive(cluster, MASTER):
        take_down(wanted.directory)
        try:
            _begin(wanted, needed_paths(more), guard)
        except BaseException:
            take_down(wanted.directory)
            raise
        started = [MASTER]
    else:
        started = []
    for name in wanted.exec_hosts:
        if not alive(wanted, name):
            start_host(wanted, name, needed_paths(more), guard)
            started.append(name)
    wait_for_hosts(wanted)
    return started


def _begin(cluster: Cluster, needed: list[Path], guard: int) -> None:
    """A master with all its objects; nothing is left of it where that fails."""
    cluster.directory.mkdir(mode=0o755)  # fails where somebody made one meanwhile
    cluster.directory.chmod(0o755)
    cluster.save()
    for folder in (cluster.shared, cluster.scratch):
        folder.mkdir()
        folder.chmod(0o1777)
    write_etc(cluster)
    make_spool(cluster)
    start_host(cluster, MASTER, needed, guard)
    wait_for_master(cluster)
    configure(cluster)


def take_down(directory: Path) -> bool:
    """End what `bring_up` started and remove its directory; False where there was nothing."""
    cluster = load_cluster(directory)
    if cluster is None:
        if directory.is_dir() and os.listdir(directory):
            raise GridError(f"{directory} is not a cluster's directory; it stays as it is.")
        if directory.is_dir():
            directory.rmdir()
        return False
    stop_hosts(cluster)
    shutil.rmtree(directory)
    return True
