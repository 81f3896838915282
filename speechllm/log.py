"""Logging: one logger for the package. Rank 0 speaks, other ranks only warn; a file gets both."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from rich.console import Console
from rich.logging import RichHandler

logger = logging.getLogger("speechllm")


def set_up_logging(rank: int = 0, *, file: Path | None = None, verbose: bool = False) -> None:
    """Send the package's records to the terminal and, where given, append them to `file`."""
    close_logging()
    level = logging.DEBUG if verbose else logging.INFO
    logger.setLevel(level)
    logger.propagate = False
    terminal: logging.Handler
    if sys.stderr.isatty():
        terminal = RichHandler(
            console=Console(stderr=True), show_path=False, log_time_format="%H:%M:%S"
        )
    else:  # a job's log: one line a record, however long
        terminal = logging.StreamHandler()
        terminal.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    terminal.setLevel(level if rank == 0 else logging.WARNING)
    logger.addHandler(terminal)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(file, encoding="utf-8")
        to_file.setLevel(level if rank == 0 else logging.WARNING)
        to_file.setFormatter(
            logging.Formatter(f"%(asctime)s rank {rank} %(levelname)s %(message)s")
        )
        logger.addHandler(to_file)


def terminal() -> Console:
    """Standard output, of which brackets are no markup; wide where it is a file or a pipe."""
    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)


def close_logging() -> None:
    """Detach and close every handler, so that a second run in one process starts clean."""
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
