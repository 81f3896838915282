"""The smallest distributed program: each process adds its number. `doctor` runs it on two hosts."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path


def main(result: str) -> int:
    """Rank 0 writes {"size", "sum", "hosts", "seconds", "device"} to the file `result`.

    sum: of the ranks, so size * (size - 1) / 2. seconds: for joining and one all-reduce.
    """
    began = time.monotonic()
    from speechllm.world import connected

    with connected(timeout=300.0) as world:
        total = world.sum([world.rank])[0]
        hosts = world.gather(socket.gethostname())
    if world.is_main:
        content = {
            "size": world.size,
            "sum": total,
            "hosts": hosts,
            "seconds": round(time.monotonic() - began, 2),
            "device": world.device.type,
        }
        aside = Path(f"{result}.new")
        aside.write_text(json.dumps(content) + "\n", encoding="utf-8")
        aside.replace(result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
