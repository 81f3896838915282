"""How much memory tensors take at their highest, measured."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch
from torch.profiler import ProfilerActivity, profile


def peak_growth(action: Callable[[], object], device: torch.device) -> int:
    """Bytes of tensor storage by which `action` goes above what there is when it starts.

    On CUDA the allocator's own statistic (`torch.cuda.max_memory_allocated`). A CPU has none: there
    the profiler reports each allocation and release of torch's allocator, kernels' buffers
    included, and their running sum is followed. Not seen are what libraries allocate by themselves
    (oneDNN's scratch pads), the heap's fragmentation and weights mapped from a file.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        action()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    assert profiler.profiler is not None
    results = profiler.profiler.kineto_results
    assert results is not None
    memory = [event for event in results.events() if event.name() == "[memory]"]
    memory.sort(key=lambda event: event.start_ns())
    return max(0, *accumulate(event.nbytes() for event in memory)) if memory else 0
