"""Process 1 of one host: `host_init.py DIRECTORY NAME GUARD NEEDED...`, started by hosts.py in new
namespaces. Its end, however it comes about, ends everything on the host.

GUARD: -1, or the number of an inherited pidfd of a process with whose end the host ends too.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from pathlib import Path
from threading import Thread

from layout import DEBIAN, INSIDE, MASTER, need_cluster
from mounts import arrange


def _end_with(process: int) -> None:
    poll = select.poll()
    poll.register(process, select.POLLIN)
    poll.poll()
    os._exit(1)


def main() -> int:
    directory, name, guard, *needed = sys.argv[1:]
    if int(guard) >= 0:
        Thread(target=_end_with, args=(int(guard),), daemon=True).start()
    cluster = need_cluster(Path(directory))
    socket.sethostname(name)
    arrange(cluster, name, [Path(path) for path in needed])
    if not sys.stdin.buffer.readline():  # the line comes when the network stands
        return 1
    daemon = subprocess.Popen(
        [DEBIAN / ("sge_qmaster" if name == MASTER else "sge_execd")],
        env={**cluster.environment, "SGE_ND": "1", INSIDE: name},
        stdin=subprocess.DEVNULL,
        cwd="/",
    )

    while True:  # also collect what dead parents leave behind
        pid, status = os.wait()
        if pid == daemon.pid:
            print(f"{name}: the daemon ended with {os.waitstatus_to_exitcode(status)}", flush=True)
            return 0


if __name__ == "__main__":
    raise SystemExit(main())
