"""Command lines that run something on a host of the cluster."""

from __future__ import annotations

import os
import pwd
from collections.abc import Sequence
from pathlib import Path

from identity import running
from layout import INSIDE, JOB_USER, Cluster, GridError

KEPT = ("TERM", "LANG", "LC_ALL", "COLUMNS", "NO_COLOR")


def process(cluster: Cluster, name: str) -> int:
    """Process 1 of a host. Raises GridError where there is no such host or it is down."""
    if name not in cluster.names:
        raise GridError(f"No host {name}; there are: {', '.join(cluster.names)}")
    pid = running(cluster.host(name) / "process.json")
    if pid is None:
        raise GridError(f"{name} is down; `up` starts it again")
    return pid


def user_facts(cluster: Cluster, user: str) -> tuple[int, int, str]:
    """(uid, gid, home) from the cluster's own list of users."""
    for line in (cluster.etc / "passwd").read_text().splitlines():
        fields = line.split(":")
        if fields[0] == user:
            return int(fields[2]), int(fields[3]), fields[5]
    raise GridError(f"No user {user} on the cluster; {JOB_USER} is there for jobs.")


def default_user() -> str:
    """The person at the keyboard, also behind sudo."""
    return os.environ.get("SUDO_USER") or pwd.getpwuid(os.geteuid()).pw_name


def command_on(
    cluster: Cluster, name: str, command: Sequence[str], *, user: str, folder: Path
) -> list[str]:
    """What root runs to have `command` run on a host, as a user, in a folder."""
    uid, gid, home = user_facts(cluster, user)
    environment = {key: os.environ[key] for key in KEPT if key in os.environ}
    environment |= {"HOME": home, "USER": user, "LOGNAME": user, "SHELL": "/bin/bash", INSIDE: name}
    environment |= cluster.environment
    return [
        *("nsenter", "--target", str(process(cluster, name))),
        *("--mount", "--uts", "--ipc", "--net", "--pid", "--"),
        *("setpriv", "--reuid", str(uid), "--regid", str(gid), "--init-groups"),
        *("env", "--ignore-environment", f"--chdir={folder}"),
        *(f"{key}={value}" for key, value in environment.items()),
        *command,
    ]
