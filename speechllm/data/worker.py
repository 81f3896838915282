"""What a worker process does first, and what outlives what."""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.utils.data import get_worker_info

from speechllm.types import STOP_SIGNALS

_PARENT_SECONDS = 2.0  # between looks at whether it still lives
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_LARGEST_MMAP_THRESHOLD = 32 << 20  # older glibc refuses more


@contextmanager
def signals_held() -> Iterator[None]:
    """Forked inside, a process has the stop signals blocked from its first instruction."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def begin_worker(worker: int) -> None:
    """For `DataLoader`, whose dataset has a `BatchMemory` named `memory`."""
    gc.enable()  # whatever the training loop, from which it is forked, has done with its own
    _keep_freed_memory()
    _outlive_signals()
    info: Any = get_worker_info()
    info.dataset.memory.send()


def _keep_freed_memory() -> None:
    """glibc gives large blocks back to the system, and each page of the next microbatch is a fault
    again: a fifth of the time in which a microbatch is decoded. Elsewhere than on glibc, nothing.
    """
    allocator = getattr(ctypes.CDLL(None), "mallopt", None)
    if allocator is not None:
        allocator(_TRIM_THRESHOLD, 1 << 30)
        allocator(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)


def _outlive_signals() -> None:
    """Leave stop signals to the parent, which a batch system sends to every process of a job.

    They stay blocked. Only the parent's own SIGTERM ends a worker: multiprocessing sends it at exit
    to workers that still live, and waits for them.
    """
    # The tokenizers library warns when it finds that its thread pool was forked.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_obey_the_parent, args=(os.getppid(),), daemon=True).start()


def _obey_the_parent(parent: int) -> None:
    """Also where the parent was killed: torch's own watch would wait until what is under way has
    been sent, to a pipe that nobody reads any more."""
    while os.getppid() == parent:
        signal_info = signal.sigtimedwait(STOP_SIGNALS, _PARENT_SECONDS)
        if signal_info is None:
            continue
        if signal_info.si_signo == signal.SIGTERM and signal_info.si_pid == parent:
            break
    os._exit(0)
