"""Memory of batches, and how tensors get from a worker process to the one that trains.

torch makes a file of shared memory for each tensor of a batch, asks for each over a socket, and
gives the pages back after each batch: for an utterance of 13 s together a quarter of the time in
which it is decoded. Here small tensors go by value, and large ones lie in segments of memory that
serve one batch after another.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import reduce_tensor

_SMALL = 1 << 18  # bytes
_UNIT = 1 << 20  # sizes of segments are multiples, so that one serves batches of about its size


@dataclass(frozen=True, eq=False)
class _Segment:
    """bytes: uint8, shared. The last one says whether a batch lies here that somebody holds: set by
    the worker, cleared by whoever held it last."""

    bytes: torch.Tensor
    taken: np.ndarray

    def __len__(self) -> int:
        return len(self.bytes) - 1


class BatchMemory:
    """Where a reader puts the large tensors of its batches.

    As it is made: wherever torch puts them. Once a worker process sends from it: in shared memory,
    which is used again when nobody holds the tensor any more, here or where it was sent.
    """

    def __init__(self) -> None:
        self._segments: list[_Segment] = []
        self._is_sent = False

    @property
    def num_segments(self) -> int:
        """Of shared memory."""
        return len(self._segments)

    def send(self) -> None:
        """Have this process, a worker that has one such memory, send its tensors cheaply."""
        self._is_sent = True
        ForkingPickler.register(torch.Tensor, self._reduce)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor of whatever was there before."""
        count = math.prod(shape) * dtype.itemsize
        if not self._is_sent or count == 0:
            return torch.empty(tuple(shape), dtype=dtype)
        return self._take(count).bytes[:count].view(dtype).view(tuple(shape))

    def _take(self, count: int) -> _Segment:
        """The smallest free segment of so many bytes. Else a new one, in place of one too small."""
        free = sorted((one for one in self._segments if not one.taken), key=len)
        segment = next((one for one in free if len(one) >= count), None)
        if segment is None:
            if free:
                self._segments.remove(free[0])
            storage = torch.UntypedStorage._new_shared(-(-(count + 1) // _UNIT) * _UNIT)
            memory = torch.empty(0, dtype=torch.uint8).set_(storage)
            segment = _Segment(memory, memory[-1:].numpy())
            self._segments.append(segment)
        segment.taken[0] = 1
        return segment

    def _reduce(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        start = tensor.untyped_storage().data_ptr()
        # A copy: a thread of the queue's asks, beside the one that adds.
        for segment in list(self._segments):
            if segment.bytes.data_ptr() == start:
                assert tensor.is_contiguous()
                assert tensor.storage_offset() == 0
                return _borrow, (*reduce_tensor(segment.bytes), tensor.dtype, tensor.shape)
        if tensor.nbytes <= _SMALL and tensor.dtype != torch.bfloat16:
            return torch.from_numpy, (tensor.numpy(),)
        return reduce_tensor(tensor)


def _borrow(
    rebuild: Callable[..., torch.Tensor], about: tuple[Any, ...], dtype: torch.dtype, shape: Any
) -> torch.Tensor:
    """The tensor in a worker's segment, which gets free when the last view of it has gone."""
    segment = rebuild(*about)
    held = segment[: math.prod(shape) * dtype.itemsize].numpy()
    weakref.finalize(held, segment[-1:].zero_).atexit = False
    return torch.from_numpy(held).view(dtype).view(shape)
