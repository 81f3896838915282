"""Batches to the device, without the step waiting for the copy."""

from __future__ import annotations

import torch
from torch import Tensor

from speechllm.types import Batch


class Transfer:
    """Called with a batch, gives it on `device`.

    On CUDA it is copied from pinned memory on a stream of its own, while the device still computes
    what was asked of it before: nothing in a step waits for the device, so the host is ahead. It is
    pinned here and not by the loader's thread, beside which worker processes could not be forked;
    torch keeps pinned blocks, so they are allocated once. Elsewhere the batch is what it was.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        if self.stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.stream):
            moved = batch.map(Tensor.pin_memory).to(self.device)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)

        def used(tensor: Tensor) -> Tensor:
            if tensor.is_cuda:  # else its memory would be given to the next copy too soon
                tensor.record_stream(current)
            return tensor

        return moved.map(used)
