"""The commands `up`, `down`, `run`, `status` and `kill-host`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from enter import command_on, default_user
from hosts import alive, kill_host
from layout import (
    INSIDE,
    JOB_USER,
    MASTER,
    SCRIPTS,
    Cluster,
    GridError,
    default_directory,
    need_cluster,
)
from lifecycle import bring_up, take_down
from master import on_master
from requirements import obstacle


def _guarded(command: Callable[[], int]) -> int:
    """2 with a readable reason where the person at the keyboard has to do something."""
    try:
        code = command()
        sys.stdout.flush()
        return code
    except GridError as error:
        print(error, file=sys.stderr)
        return 2
    except BrokenPipeError:  # `status | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _need_root() -> None:
    if os.geteuid() != 0:
        raise GridError(f"This needs root. Try: sudo {' '.join(sys.argv)}")


def _handle_of(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise GridError(f"--with-process {pid}: no such process") from None


def up() -> int:
    parser = argparse.ArgumentParser(
        description="Start a real Grid Engine cluster on this machine."
    )
    parser.add_argument("--hosts", type=int, default=3, metavar="N", help="execution hosts (3)")
    parser.add_argument("--slots", type=int, default=2, metavar="N", help="job slots a host (2)")
    parser.add_argument("--gpus", type=int, default=2, metavar="N", help="counted GPUs a host (2)")
    parser.add_argument(
        "--expose",
        type=Path,
        action="append",
        default=[],
        metavar="PATH",
        help="a folder that jobs must be able to reach, besides the repository and its python",
    )
    parser.add_argument(
        "--with-process", type=int, metavar="PID", help="the hosts end when this process ends"
    )
    parser.add_argument("--check", action="store_true", help="only say whether it can run here")
    given = parser.parse_args()

    def command() -> int:
        if reason := obstacle():
            raise GridError(reason)
        if given.check:
            return 0
        began = time.monotonic()
        wanted = Cluster(default_directory(), given.hosts, given.slots, given.gpus)
        guard = -1 if given.with_process is None else _handle_of(given.with_process)
        started = bring_up(wanted, given.expose, guard)
        if not started:
            print("already up")
            return 0
        print(f"{', '.join(started)} up in {time.monotonic() - began:.1f} s in {wanted.directory}")
        print(f"A shell on the master:  {SCRIPTS / 'run'} {MASTER} bash")
        return 0

    return _guarded(command)


def down() -> int:
    argparse.ArgumentParser(description="End the cluster and remove its directory.").parse_args()

    def command() -> int:
        _need_root()
        print("down" if take_down(default_directory()) else "nothing was up")
        return 0

    return _guarded(command)


def run() -> int:
    parser = argparse.ArgumentParser(
        description="Run a command on a host of the cluster, in the same folder.",
        usage="run HOST [-u USER] COMMAND...",
        epilog=f"HOST: {MASTER}, node1, node2, ... USER: {JOB_USER} is an ordinary user for jobs; "
        "default: you.",
    )
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="HOST [-u USER] COMMAND...")
    host, *words = parser.parse_args().words or [""]
    user = default_user()
    if words[:1] == ["-u"]:
        user = words[1] if len(words) > 1 else ""
        words = words[2:]
    if not words:
        parser.error("expected HOST [-u USER] COMMAND...")

    def command() -> int:
        if INSIDE in os.environ:  # Grid Engine's clients work on every host
            os.execvp(words[0], words)
        _need_root()
        cluster = need_cluster(default_directory())
        full = command_on(cluster, host, words, user=user, folder=Path.cwd())
        os.execvp(full[0], full)

    return _guarded(command)


def kill() -> int:
    parser = argparse.ArgumentParser(description="Let a host die as if its power failed.")
    parser.add_argument("host")
    given = parser.parse_args()

    def command() -> int:
        _need_root()
        cluster = need_cluster(default_directory())
        if given.host not in cluster.names:
            raise GridError(f"No host {given.host}; there are: {', '.join(cluster.names)}")
        kill_host(cluster, given.host)
        print(f"{given.host} is dead; `up` starts it again")
        return 0

    return _guarded(command)


def status() -> int:
    argparse.ArgumentParser(description="Show the hosts and what they run.").parse_args()

    def command() -> int:
        _need_root()
        cluster = need_cluster(default_directory())
        for name in cluster.names:
            pid = alive(cluster, name)
            print(f"{name:<8} {cluster.address(name):<12} " + (f"process {pid}" if pid else "down"))
        if alive(cluster, MASTER):
            print(on_master(cluster, "qstat", "-f", "-u", "*"), end="")
        return 0

    return _guarded(command)
