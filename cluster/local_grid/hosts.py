"""Hosts: made in namespaces of their own, joined by a bridge on the master, and ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from identity import end, remember, running
from layout import MASTER, SCRIPTS, Cluster, GridError
from requirements import NAMESPACES


def alive(cluster: Cluster, name: str) -> int | None:
    """Process 1 of the host, as the machine numbers it."""
    return running(cluster.host(name) / "process.json")


def start_host(cluster: Cluster, name: str, needed: list[Path], guard: int) -> None:
    """guard: a pidfd of a process with whose end the host ends, or -1.

    Raises GridError with the host's log where it does not come up.
    """
    folder = cluster.host(name)
    (folder / "scratch").mkdir(parents=True, exist_ok=True)
    (folder / "scratch").chmod(0o1777)
    log = folder / "log"
    with log.open("ab") as sink:
        outer = subprocess.Popen(
            [
                *("unshare", *NAMESPACES, "--kill-child"),
                *(sys.executable, str(SCRIPTS / "host_init.py")),
                *(str(cluster.directory), name, str(guard), *map(str, needed)),
            ],
            pass_fds=[guard] if guard >= 0 else [],
            stdin=subprocess.PIPE,
            stdout=sink,
            stderr=subprocess.STDOUT,
            cwd="/",
            start_new_session=True,
        )
    remember(_child_of(outer, log), folder / "process.json")
    _connect(cluster, name)
    assert outer.stdin is not None
    try:
        outer.stdin.write(b"\n")
        outer.stdin.close()
    except BrokenPipeError:
        raise GridError(f"{name} did not start: {log.read_text()}") from None


def _child_of(outer: subprocess.Popen[bytes], log: Path) -> int:
    """Process 1 of the new namespaces: the only child of `unshare`."""
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and outer.poll() is None:
        if pids := children.read_text().split():
            return int(pids[0])
        time.sleep(0.01)
    raise GridError(f"No namespaces: {log.read_text()}")


def _connect(cluster: Cluster, name: str) -> None:
    """Give the host its address, and a cable to the bridge in the master's namespace."""
    device = "br0" if name == MASTER else "eth0"
    if name == MASTER:
        _ip(cluster, MASTER, ["link add br0 type bridge"])
    else:
        pid = alive(cluster, name)
        cable = f"cable{pid}"  # the kernel removes a dead host's cable only after a while
        plug = [f"link add {cable} type veth peer name eth0 netns {pid}"]
        _ip(cluster, MASTER, [*plug, f"link set {cable} master br0 up"])
    address = f"addr add {cluster.address(name)}/24 dev {device}"
    _ip(cluster, name, ["link set lo up", address, f"link set {device} up"])


def _ip(cluster: Cluster, name: str, lines: list[str]) -> None:
    done = subprocess.run(
        ["nsenter", "--target", str(alive(cluster, name)), "--net", "ip", "-batch", "-"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        log = (cluster.host(name) / "log").read_text()
        raise GridError(f"The network of {name} cannot be made: {done.stderr.strip()}\n{log}")


def kill_host(cluster: Cluster, name: str) -> None:
    """As if the power failed: nothing on the host gets a chance to say goodbye."""
    if not end(cluster.host(name) / "process.json", signal.SIGKILL, patience=20):
        raise GridError(f"{name} (process {alive(cluster, name)}) does not end")


def stop_hosts(cluster: Cluster) -> None:
    """End every host, the master last; what they would save now is about to be removed."""
    for name in reversed(cluster.names):
        kill_host(cluster, name)
