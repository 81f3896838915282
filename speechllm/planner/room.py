"""Whether a run's step fits into memory without activation checkpointing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from speechllm.config.schema import Config
from speechllm.errors import UserError
from speechllm.log import logger
from speechllm.planner.advice import GIB, Machine, config_name, job_of, worst_parts
from speechllm.planner.architecture import read_architecture
from speechllm.planner.workload import Utterance


def needs_checkpointing(config: Config, machine: Machine, utterances: Sequence[Utterance]) -> bool:
    """True where the costliest microbatch's estimate is above what tensors may take of `machine`.

    False, with a word about it, where the architecture is one that cannot be estimated. Precision
    and attention must be settled.
    """
    try:
        job = job_of(config, read_architecture(config.model), machine)
        budget, name = config.data.microbatch_tokens, config_name(config)
        need = sum(worst_parts(config, job, utterances, budget, name).values())
    except (UserError, AttributeError, KeyError, TypeError, ValueError) as error:
        logger.info("activation checkpointing is off: memory cannot be estimated (%s)", error)
        return False
    if need <= machine.usable:
        return False
    logger.info(
        "activation checkpointing is on: without it a step is predicted to take %.1f GiB a rank of "
        "the %.1f GiB that can be used",
        need / GIB,
        machine.usable / GIB,
    )
    return True


def machine_of_rank(ranks: int, device: torch.device) -> Machine:
    """`ranks` like this one: a GPU's whole memory, or a share of what this host has available."""
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
        return Machine(ranks, memory, on_cpu=False)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Machine(ranks, available_bytes() // here, on_cpu=True)


def available_bytes() -> int:
    """Main memory that can be had without swapping, the file cache included."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
