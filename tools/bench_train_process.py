"""Processes that each hold one way to train and measure when they are asked to, so that ways can
take turns and have a peak of memory of their own. Questions and answers are lines of JSON."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

SUBJECT = str(Path(__file__).with_name("bench_train_subject.py"))
PATIENCE = 1.0  # seconds between looks at a process that has not reported yet


class Failed(Exception):
    """A process has ended before its time; its own words are on stderr."""


class Process:
    """A `bench_train_subject.Subject` in `world` processes."""

    def __init__(
        self, config: str, overrides: Sequence[str], *, steps: int, world: int, threads: int
    ) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="bench-train-")
        address = os.path.join(self._directory.name, "socket")
        server = socket.socket(socket.AF_UNIX)
        server.bind(address)
        server.listen(1)
        server.settimeout(PATIENCE)
        launcher = [sys.executable]
        if world > 1:
            launcher += ["-m", "torch.distributed.run", "--nproc-per-node", str(world)]
            launcher += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [*launcher, SUBJECT, address, str(steps), config, *overrides],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
        )
        self._stream: TextIO | None = None
        self._server = server

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The answer of rank 0. Raises Failed."""
        stream = self._connected()
        try:
            stream.write(json.dumps({"what": what, **arguments}) + "\n")
            stream.flush()
            line = stream.readline()
        except (BrokenPipeError, ConnectionResetError):
            line = ""
        if not line:
            raise Failed(f"{what}: the process ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End it, whatever it is at."""
        if self._stream is not None:
            self._stream.close()
        else:
            self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._server.close()
        self._directory.cleanup()

    def _connected(self) -> TextIO:
        while self._stream is None:
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                if self._process.poll() is not None:
                    code = self._process.returncode
                    raise Failed(f"the process ended with {code} before it began") from None
                continue
            with connection:  # lives on in the file
                connection.settimeout(None)
                self._stream = connection.makefile("rw", encoding="utf-8")
        return self._stream
