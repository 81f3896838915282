"""Can this machine hold the cluster? Asked before anything is made."""

from __future__ import annotations

import os
import shutil
import subprocess

from layout import DEBIAN, SCRIPTS, SHARE

NAMESPACES = ["--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc"]
TOOLS = ("unshare", "nsenter", "setpriv", "env", "ip")
FILES = (
    *(DEBIAN / name for name in ("sge_qmaster", "sge_execd", "sge_shepherd", "qconf", "qsub")),
    SHARE / "default-configuration",
    SHARE / "util" / "resources" / "centry",
)
# In a network namespace of its own, so nothing is left behind.
TRY_NETWORK = "ip link add br0 type bridge && ip link add v0 type veth peer name v1"


def obstacle() -> str | None:
    """Why the cluster cannot run here, and what to do about it; None where it can."""
    if os.geteuid() != 0:
        return (
            "The local grid needs root: it makes namespaces, and its daemons change user. "
            f"Try: sudo {SCRIPTS / 'up'}"
        )
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    missing += [str(path) for path in FILES if not path.exists()]
    if missing:
        return (
            f"The local grid needs Debian's Grid Engine packages (missing: {missing[0]}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + f"). Install them: {SCRIPTS / 'install'}"
        )
    for what, command in (
        ("namespaces", ["true"]),
        ("a bridge and virtual network cables", ["sh", "-c", TRY_NETWORK]),
    ):
        trial = subprocess.run(
            ["unshare", *NAMESPACES, *command], capture_output=True, text=True, check=False
        )
        if trial.returncode != 0:
            reason = trial.stderr.strip().splitlines() or [f"exit status {trial.returncode}"]
            return (
                f"This machine does not let root make {what} ({reason[-1]}). In a container, "
                "start it with the right to (docker run --privileged), or use a virtual machine."
            )
    return None
