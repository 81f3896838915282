"""Who we are among the processes of a run, and the few collectives that the other code needs.

The environment of the launcher (torchrun, the deepspeed launcher, cluster scripts) is read here.
Objects travel as JSON: nothing that another process sent is ever unpickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from speechllm.errors import ConfigError
from speechllm.launcher import LauncherWatch


@dataclass(frozen=True)
class World:
    """rank 0 of size 1 where there is no launcher."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The element-wise sum over all ranks, in double precision. One collective, of the hosts:
        it waits for no device."""
        if self.size == 1:
            return [float(value) for value in values]
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Everyone's JSON-able value, by rank, on every rank."""
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        data = data.to(self.device)
        sizes = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([data.numel()], device=self.device))
        longest = max(int(size) for size in sizes)
        padded = torch.zeros(longest, dtype=torch.uint8, device=self.device)
        padded[: data.numel()] = data
        rows = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(rows, padded)
        return [
            json.loads(bytes(row[: int(size)].cpu().tolist()))
            for row, size in zip(rows, sizes, strict=True)
        ]

    def from_main(self, value: Any) -> Any:
        """Rank 0's JSON-able value, on every rank."""
        return self.gather(value if self.is_main else None)[0]

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def read_environment() -> tuple[int, int, int]:
    """(rank, world size, local rank) as the launcher set them; (0, 1, 0) without one."""
    if "RANK" not in os.environ:
        return 0, 1, 0
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return rank, size, int(os.environ.get("LOCAL_RANK", rank))


@contextmanager
def connected(
    device: str = "auto", *, timeout: float = 1800.0, alone_in_group: bool = False
) -> Iterator[World]:
    """Join the other processes for the length of the block: NCCL where there is CUDA, else gloo.
    Within, this process ends with its launcher (see `speechllm.launcher`).

    timeout: seconds that a rank waits for the others in one collective before it raises.
    alone_in_group: make a process group also for a single process, which fsdp2 and deepspeed want.

    Raises ConfigError when `device` is `cuda` and there is none.
    """
    rank, size, local_rank = read_environment()
    chosen = _device(device, local_rank)
    with LauncherWatch():
        if size > 1 or alone_in_group:
            backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
            dist.init_process_group(
                backend,
                store=dist.HashStore() if size == 1 else None,
                rank=rank,
                world_size=size,
                device_id=chosen if chosen.type == "cuda" else None,
                timeout=timedelta(seconds=timeout),
            )
        try:
            yield World(rank, size, local_rank, chosen)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def _device(device: str, local_rank: int) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if device == "cuda" and not has_cuda:
        raise ConfigError(
            "device: cuda, but torch sees no CUDA device; "
            "use device=cpu (or auto), or install a CUDA build of torch"
        )
    if device == "cpu" or not has_cuda:
        return torch.device("cpu")
    chosen = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(chosen)
    return chosen
