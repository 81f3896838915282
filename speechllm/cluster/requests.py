"""What one host's share of a job asks for, by the site's names: pure arithmetic."""

from __future__ import annotations

import math

from speechllm.cluster.job import Job
from speechllm.cluster.sections import parse_memory
from speechllm.errors import ConfigError


def slots_per_host(job: Job) -> int:
    """Slots that each host gives the job: of the parallel environment, else one; Slurm's CPUs."""
    site = job.site
    return site.cpus.slots if job.mode == "pe" or site.cpus.pe or site.kind == "slurm" else 1


def resource_requests(job: Job) -> dict[str, str]:
    """name -> value of every resource, in the order of the profile.

    Raises ConfigError where the GPUs of a host do not divide by its slots.
    """
    site, slots = job.site, slots_per_host(job)
    found = dict(site.requests)
    if job.gpus_per_node and site.gpus is not None:
        share = slots if site.gpus.per == "slot" else 1
        if job.gpus_per_node % share:
            raise ConfigError(
                f"{job.gpus_per_node} GPUs on a host of {slots} slots: the site counts "
                f"{site.gpus.name} for each slot, so the GPUs must divide by the slots; change "
                "--gpus-per-node or cpus.slots"
            )
        found[site.gpus.name] = str(job.gpus_per_node // share)
    if job.gpus_per_node and site.gpu_memory is not None:
        found |= dict.fromkeys(site.gpu_memory.names, site.gpu_memory.amount)
    found |= ram_requests(job)
    if site.storage is not None:
        share = slots if site.storage.per == "slot" else 1
        found |= {name: f"{count / share:g}" for name, count in site.storage.tokens.items()}
    return found | time_requests(job)


def ram_requests(job: Job) -> dict[str, str]:
    ram = job.site.ram
    if ram is None:
        return {}
    amount = memory_share(ram.amount, slots_per_host(job) if ram.per == "slot" else 1)
    return dict.fromkeys(ram.names, amount)


def time_requests(job: Job) -> dict[str, str]:
    time = job.site.time
    found = {}
    if job.time_limit is not None and time.soft:
        # After our own clock: Grid Engine 8.1.9 does not heed exit code 99 of a job that meets its
        # soft limit in a second start; it is warned, killed and out of the queue.
        found[time.soft] = clock(job.time_limit - time.margin / 2)
    if job.time_limit is not None and time.hard:
        found[time.hard] = clock(job.time_limit)
    return found


def memory_share(amount: str, parts: int) -> str:
    """A part of an amount such as 64G, rounded up to whole MiB; the amount itself for one part.

    >>> memory_share("64G", 3)
    '21846M'
    """
    return amount if parts == 1 else f"{math.ceil(parse_memory(amount) / parts / 2**20)}M"


def clock(seconds: float) -> str:
    """H:MM:SS, as every batch system reads it."""
    minutes, rest = divmod(math.floor(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
