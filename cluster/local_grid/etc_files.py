"""Files of /etc that only the cluster's hosts see: their names, and one user for jobs."""

from __future__ import annotations

import os
import re
from pathlib import Path

from layout import JOB_USER, Cluster

FIRST_UID = 20001


def write_etc(cluster: Cluster) -> None:
    """Host names come from a file alone; the job user is added to this machine's own users."""
    cluster.etc.mkdir()
    uid = _free_number(Path("/etc/passwd"), Path("/etc/group"))
    user = f"{JOB_USER}:x:{uid}:{uid}:jobs of the local grid:{cluster.home}:/bin/bash\n"
    for name, more in (("passwd", user), ("group", f"{JOB_USER}:x:{uid}:\n")):
        own = (Path("/etc") / name).read_text()
        others = [line for line in own.splitlines() if not line.startswith(f"{JOB_USER}:")]
        (cluster.etc / name).write_text("\n".join(others) + "\n" + more)
    addresses = [f"{cluster.address(name)} {name}\n" for name in cluster.names]
    (cluster.etc / "hosts").write_text("127.0.0.1 localhost\n" + "".join(addresses))
    switch = Path("/etc/nsswitch.conf").read_text()
    switch = re.sub(r"^hosts:.*", "hosts: files", switch, flags=re.MULTILINE)
    (cluster.etc / "nsswitch.conf").write_text(switch)
    cluster.home.mkdir(parents=True)
    os.chown(cluster.home, uid, uid)
    # Another user's repository may be asked for its revision.
    (cluster.home / ".gitconfig").write_text("[safe]\n\tdirectory = *\n")


def _free_number(*files: Path) -> int:
    taken = {
        int(number)
        for file in files
        for line in file.read_text().splitlines()
        for number in line.split(":")[2:4]
        if number.isdigit()
    }
    return next(uid for uid in range(FIRST_UID, 2**16) if uid not in taken)
