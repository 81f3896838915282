"""The processes of one node: the launcher and, below it, one for each rank."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from speechllm.cluster.rank import read_records
from speechllm.cluster.signals import (
    Forwarder,
    die_with_parent,
    ignore_stop_signals,
    kill_tree,
)
from speechllm.errors import UserError


class Processes:
    """Started by the constructor, which raises UserError where the program cannot be started.

    records: an empty folder of this host, see rank.py. saves: they save at a signal; others just
    end, as they have nothing to save.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        directory: str,
        records: Path,
        saves: bool,
    ) -> None:
        self.records = records
        self.saves = saves
        self._forwarder = Forwarder()
        self._stopped = False

        def before_exec() -> None:
            die_with_parent()
            if saves:
                ignore_stop_signals()

        try:
            self._launcher = subprocess.Popen(
                command, env=dict(environment), cwd=directory, preexec_fn=before_exec
            )
        except OSError as error:
            raise UserError(
                f"{command[0]} cannot be started in {directory} ({error.strerror}); both must "
                "be there on every host, and open to the user of the job"
            ) from error

    def poll(self) -> int | None:
        """The launcher's exit code, or minus a signal; None while it runs."""
        return self._launcher.poll()

    def stop(self, number: signal.Signals) -> None:
        """Ask them to save and end; call again and again, some may not listen yet."""
        if self.saves:
            running = [one.pid for one in read_records(self.records) if one.code is None]
            self._forwarder.forward(number, running)
        elif not self._stopped:
            self._stopped = True
            self._launcher.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Whatever still runs, at once. Safe to call after the end."""
        if self._launcher.poll() is None:
            kill_tree(self._launcher.pid)
            self._launcher.wait()
        for one in read_records(self.records):
            if one.code is None and self._is_ours(one.pid):
                with suppress(ProcessLookupError):  # the kernel ends ranks with their launcher
                    os.kill(one.pid, signal.SIGKILL)

    def codes(self) -> list[int | None]:
        """Exit codes of the ranks, as they left them."""
        return [one.code for one in read_records(self.records)]

    def _is_ours(self, pid: int) -> bool:
        """Not another process that has got the number since."""
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            return False
        return os.fsencode(str(self.records)) in environment
