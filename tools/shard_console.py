"""What the shard tools share on the terminal: exit codes, progress, sizes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from speechllm.errors import UserError
from speechllm.log import terminal


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Call main and exit: 2 with a message where the user's input is wrong, 130 after Ctrl-C."""
    try:
        code = main(sys.argv[1:])
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader (`| head`) has gone; what is still buffered must not complain at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        code = 130
    sys.exit(code)


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, total) that keeps one bar per `what` on stderr.

    Drawn only when called: no thread runs, so that processes may be forked meanwhile.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        bars = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in bars:
                bars[what] = bar.add_task(what, total=total)
            bar.update(bars[what], completed=done, total=total)
            bar.refresh()

        yield update


def show(table: Table) -> None:
    """Print to stdout; brackets in names and messages are no markup."""
    terminal().print(table)


def hours(seconds: float) -> str:
    """Hours, or minutes and seconds where there is less than one."""
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def size(count: float) -> str:
    """Bytes in decimal units, as --shard-size takes them."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
