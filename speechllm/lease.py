"""A lease that says which of two processes may write to a run directory.

A batch system may start a job anew before it has ended the old one (`qmod -rj` of Grid Engine).
Whoever starts a run under such a system writes a token of its own into a lease file, and gives both
to the trainer: SPEECHLLM_LEASE, SPEECHLLM_LEASE_TOKEN. A trainer whose token no longer stands
there must not write any more. Runs without a lease are kept apart by `speechllm.run_lock`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from speechllm.errors import ConfigError, LostLease


@dataclass(frozen=True)
class Lease:
    path: Path
    token: str

    def check(self) -> None:
        """Raise LostLease unless the file's first line is our token."""
        try:
            found = self.path.read_text(encoding="utf-8").partition("\n")[0].strip()
        except FileNotFoundError:
            found = ""
        if found != self.token:
            raise LostLease(
                f"{self.path}: another run of this job has taken over (the lease says {found!r}, "
                f"this run is {self.token!r}). It goes on from the newest checkpoint; nothing more "
                "is written here."
            )


def lease_of_environment() -> Lease | None:
    """None without SPEECHLLM_LEASE. Raises ConfigError where its token is missing."""
    path = os.environ.get("SPEECHLLM_LEASE")
    if not path:
        return None
    token = os.environ.get("SPEECHLLM_LEASE_TOKEN", "").strip()
    if not token:
        raise ConfigError("SPEECHLLM_LEASE is set without SPEECHLLM_LEASE_TOKEN; set both or none")
    return Lease(Path(path), token)
