"""Which strategies fit, which one to take, and the largest token budget under it."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from speechllm.config.schema import Config
from speechllm.errors import UserError
from speechllm.model.build import bf16_is_fast
from speechllm.model.pretrained import usual_attention
from speechllm.planner.activations import Setting
from speechllm.planner.architecture import Architecture
from speechllm.planner.memory import STRATEGIES, Job, estimate_memory
from speechllm.planner.traffic import estimate_traffic
from speechllm.planner.workload import Utterance, microbatch
from speechllm.strategy.zero_config import ZERO, ZeRO, read_zero_config

GIB = 2**30
USABLE = 0.9  # the rest goes to fragmentation of the allocator
CONTEXT = GIB  # CUDA's context, kernels, NCCL's and cuBLAS's buffers
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
LARGEST_BUDGET = 1 << 24
NEARLY = 0.9  # budgets that differ by less are as good as each other

# As in ds_configs/.
_BUCKET = {"reduce_bucket_size": 50_000_000, "allgather_bucket_size": 50_000_000}
_STAGE3 = {
    "stage": 3,
    "overlap_comm": True,
    "reduce_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 500_000_000,
    "stage3_max_reuse_distance": 500_000_000,
}
_TO_CPU = {"device": "cpu", "pin_memory": True}
SHIPPED = {
    "zero1": ZeRO.model_validate({"stage": 1, **_BUCKET}),
    "zero2": ZeRO.model_validate({"stage": 2, "overlap_comm": True, **_BUCKET}),
    "zero3": ZeRO.model_validate(_STAGE3),
    "zero3_offload": ZeRO.model_validate(
        {**_STAGE3, "offload_param": _TO_CPU, "offload_optimizer": _TO_CPU}
    ),
}


@dataclass(frozen=True)
class Machine:
    """`memory`: bytes of each rank's device, before anything is on it."""

    ranks: int
    memory: int
    on_cpu: bool

    @property
    def usable(self) -> int:
        """Bytes that tensors may take."""
        return max(0, int(USABLE * self.memory) - (0 if self.on_cpu else CONTEXT))


@dataclass(frozen=True)
class StrategyPlan:
    """bytes_per_rank: tensors at the highest moment of a step, the sum of `parts`."""

    fits: bool
    bytes_per_rank: int
    bytes_on_wire_per_step: int
    parts: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """recommended: of the strategies that fit, the one that moves least; where none does, one
    whose largest budget is about the highest, without offloading if possible; None where not even
    one utterance fits.
    max_batch_tokens: the largest `data.microbatch_tokens` that fits under it."""

    machine: Machine
    job: Job
    budget: int
    strategies: dict[str, StrategyPlan]
    recommended: str | None
    max_batch_tokens: int


def machine_here(config: Config, gpus: int | None, nodes: int, gpu_memory: str | None) -> Machine:
    """`gpus` ranks on each of `nodes` nodes; what is not given is as on this machine.

    Raises UserError for sizes that mean nothing.
    """
    has_gpu = config.device != "cpu" and torch.cuda.is_available()
    ranks = gpus if gpus is not None else (torch.cuda.device_count() if has_gpu else 1)
    for name, value in (("--gpus", ranks), ("--nodes", nodes)):
        if value < 1:
            raise UserError(f"{name} {value}: give 1 or more")
    if gpu_memory is not None:
        return Machine(ranks * nodes, parse_size(gpu_memory), on_cpu=False)
    if has_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        return Machine(ranks * nodes, total, on_cpu=False)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(ranks * nodes, free // ranks, on_cpu=True)


def parse_size(text: str) -> int:
    """Bytes of `80GB`, `80GiB`, `80G` (all 80 * 2**30, as makers of GPUs count), `512MB`, `1.5TB`.

    Raises UserError.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = round(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if not size:
        raise UserError(
            f"--gpu-memory {text!r}: not a size; write a number and its unit, as in 80GB, 24GiB or "
            "40960MB"
        )
    return size


def job_of(config: Config, architecture: Architecture, machine: Machine) -> Job:
    """What the configuration comes to on `machine`."""
    device = torch.device("cpu" if machine.on_cpu else "cuda")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if bf16_is_fast(device) else "fp32"
    compute = 4 if precision == "fp32" else 2
    frozen = 4 if precision == "fp32" or config.model.frozen_dtype == "fp32" else 2
    attention = config.model.llm.attention
    if attention == "auto":
        attention = usual_attention(device, torch.bfloat16 if frozen == 2 else torch.float32)
    settings = _zero_settings(config)
    own = {config_name(config): settings} if settings is not None else {}
    return Job(
        architecture=architecture,
        setting=Setting(
            compute=compute,
            frozen=frozen,
            attention="sdpa" if attention == "flash_attention_2" else attention,
            on_cpu=machine.on_cpu,
            checkpointing=config.train.activation_checkpointing is True,
            recasts=compute != frozen or precision == "fp16",
        ),
        ranks=machine.ranks,
        microbatches=-(-config.data.microbatches_per_step // machine.ranks),
        zero=SHIPPED | own,
        reshard=config.strategy.kind != "fsdp2" or config.strategy.reshard_after_forward,
        ctc=config.train.ctc_steps > 0,
        logits_limit=(
            config.performance.logits_megabytes << 20
            if config.performance.label_logits and config.performance.preset == "full"
            else None
        ),
    )


def _zero_settings(config: Config) -> ZeRO | None:
    if config.strategy.kind != "deepspeed":
        return None
    return ZeRO.model_validate(read_zero_config(config.strategy.config)[ZERO])


def config_name(config: Config) -> str:
    """The one of STRATEGIES that the configuration asks for."""
    settings = _zero_settings(config)
    if settings is None:
        return config.strategy.kind
    offloads = settings.offload_param is not None or settings.offload_optimizer is not None
    return f"zero{settings.stage}{'_offload' if offloads and settings.stage == 3 else ''}"


def make_plan(
    config: Config, architecture: Architecture, machine: Machine, utterances: Sequence[Utterance]
) -> Plan:
    """Estimate all strategies for the configured token budget, and choose."""
    job = job_of(config, architecture, machine)
    budget = config.data.microbatch_tokens
    strategies = {}
    for name in STRATEGIES:
        parts = worst_parts(config, job, utterances, budget, name)
        size = sum(parts.values())
        strategies[name] = StrategyPlan(
            size <= machine.usable, size, estimate_traffic(job, name), parts
        )
    fitting = [name for name in STRATEGIES if strategies[name].fits]
    if fitting:
        chosen = min(fitting, key=lambda name: strategies[name].bytes_on_wire_per_step)
        largest = largest_budget(config, job, utterances, machine.usable, chosen)
    else:
        budgets = {
            name: largest_budget(config, job, utterances, machine.usable, name)
            for name in STRATEGIES
        }
        # Offloading moves weights over PCIe for every microbatch: only where nothing else goes.
        others = {name: budget for name, budget in budgets.items() if "offload" not in name}
        near = budgets if not any(others.values()) else others
        near = {name: b for name, b in near.items() if b >= NEARLY * max(near.values())}
        chosen = min(near, key=lambda name: strategies[name].bytes_on_wire_per_step)
        largest = budgets[chosen]
    return Plan(machine, job, budget, strategies, chosen if largest else None, largest)


def worst_parts(
    config: Config, job: Job, utterances: Sequence[Utterance], budget: int, strategy: str
) -> dict[str, int]:
    """The parts of memory under the costliest microbatch that `budget` gives.

    Utterances that are longer than the budget are left out, as in training; where all are, the
    shortest is taken."""
    shapes = [microbatch(config, utterance, budget) for utterance in utterances]
    fitting = [shape for shape in shapes if shape is not None]
    if not fitting:
        shortest = min(utterances, key=lambda utterance: utterance.samples)
        shape = microbatch(config, shortest, LARGEST_BUDGET)
        assert shape is not None
        fitting = [shape.one_row()]
    estimates = [estimate_memory(job, shape, strategy) for shape in fitting]
    return max(estimates, key=lambda parts: sum(parts.values()))


def largest_budget(
    config: Config, job: Job, utterances: Sequence[Utterance], usable: int, strategy: str
) -> int:
    """The largest `data.microbatch_tokens`, a multiple of 64, whose worst microbatch fits into
    `usable` bytes; 0 where none does."""

    def fits(tokens: int) -> bool:
        if all(microbatch(config, utterance, tokens) is None for utterance in utterances):
            return True  # too small for any; see below
        return sum(worst_parts(config, job, utterances, tokens, strategy).values()) <= usable

    low, high = 0, LARGEST_BUDGET // 64
    while low < high:
        middle = (low + high + 1) // 2
        if fits(64 * middle):
            low = middle
        else:
            high = middle - 1
    trains = any(microbatch(config, utterance, 64 * low) for utterance in utterances)
    return 64 * low if trains else 0
