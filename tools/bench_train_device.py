"""What the machine says: peaks and history of memory, power, time in communication. What concerns
GPUs has never been run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

POWER_EVERY = 0.1  # seconds
HISTORY = 200_000  # allocations and releases


@contextmanager
def power(device: torch.device) -> Iterator[list[float]]:
    """Watts of the GPU during the block, sampled by NVML; empty on a CPU, and without pynvml."""
    watts: list[float] = []
    if device.type != "cuda":
        yield watts
        return
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(POWER_EVERY):
            try:
                watts.append(torch.cuda.power_draw(device) / 1000)
            except ModuleNotFoundError:  # pynvml
                return

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield watts
    finally:
        ended.set()
        thread.join()


def memory_snapshot(action: Callable[[], object], file: str) -> None:
    """Write what the allocator did meanwhile, for https://pytorch.org/memory_viz."""
    torch.cuda.memory._record_memory_history(max_entries=HISTORY)
    try:
        action()
        torch.cuda.synchronize()
        torch.cuda.memory._dump_snapshot(file)
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)


def communication_seconds(profiler: Any) -> float:
    """Of a profiled step: NCCL's kernels, or on a CPU gloo's work."""
    spent = 0.0
    for event in profiler.key_averages():
        if event.key.startswith("gloo:"):
            spent += event.cpu_time_total / 1e6
        elif event.key.startswith("ncclDevKernel"):
            spent += event.device_time_total / 1e6
    return spent


def peak_resident() -> int:
    """Bytes of this process at their highest (`VmHWM`), other than getrusage's not its parent's."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return 1024 * int(line.split()[1])
    raise AssertionError("no VmHWM in /proc/self/status")
