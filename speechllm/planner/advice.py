"""Which strategies fit, which one to take, and the largest token budget under it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from speechllm.config.schema import Config
from speechllm.errors import UserError
from speechllm.model.build import bf16_is_fast, frozen_type
from speechllm.model.prefix import why_not_cached
from speechllm.model.pretrained import usual_attention
from speechllm.planner.activations import Setting
from speechllm.planner.architecture import Architecture
from speechllm.planner.memory import STRATEGIES, Job, estimate_memory
from speechllm.planner.traffic import estimate_traffic
from speechllm.planner.workload import Utterance, is_plain, microbatch, row_of
from speechllm.strategy.zero_config import ZERO, ZeRO, read_zero_config

GIB = 2**30
USABLE = 0.9  # the rest goes to fragmentation of the allocator
CONTEXT = GIB  # CUDA's context, kernels, NCCL's and cuBLAS's buffers
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
LARGEST_BUDGET = 1 << 24
LARGEST_PLAIN = 1 << 14
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
    max_batch_tokens: the largest `data.microbatch_tokens` that fits under it.
    plain_utterances, max_plain_utterances: of a microbatch under `preset: plain`, which decide
    there; else None. max_batch_tokens is then what these come to at most."""

    machine: Machine
    job: Job
    budget: int
    strategies: dict[str, StrategyPlan]
    recommended: str | None
    max_batch_tokens: int
    plain_utterances: int | None = None
    max_plain_utterances: int | None = None


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
    size = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    if not 0.5 < size < math.inf:
        raise UserError(
            f"--gpu-memory {text!r}: not a size; write a number and its unit, as in 80GB, 24GiB or "
            "40960MB"
        )
    return round(size)


def job_of(config: Config, architecture: Architecture, machine: Machine) -> Job:
    """What the configuration comes to on `machine`."""
    device = torch.device("cpu" if machine.on_cpu else "cuda")
    precision = config.precision
    if precision == "auto":
        precision = "bf16" if bf16_is_fast(device) else "fp32"
    compute = 4 if precision == "fp32" else 2
    frozen = frozen_type(config.model, precision, device).itemsize
    settings = _zero_settings(config)
    own = {config_name(config): settings} if settings is not None else {}
    shortcuts, plain = config.performance, is_plain(config)
    reason = why_not_cached(
        shortcuts,
        llm_trains=architecture.lora_parameters > 0,
        longest_row=architecture.longest_row,
    )
    return Job(
        architecture=architecture,
        setting=Setting(
            compute=compute,
            frozen=frozen,
            attention=_attention(config, device, frozen),
            on_cpu=machine.on_cpu,
            checkpointing=config.train.activation_checkpointing is True,
            recasts=compute != frozen or precision == "fp16",
        ),
        ranks=machine.ranks,
        microbatches=-(-config.data.microbatches_per_step // machine.ranks),
        zero=SHIPPED | own,
        reshard=config.strategy.kind != "fsdp2" or config.strategy.reshard_after_forward,
        ctc=config.train.ctc_steps > 0,
        cached=reason is None,
        packing=shortcuts.packing == "on" and not plain,
        label_logits=shortcuts.label_logits and not plain,
        logits_limit=(
            shortcuts.logits_megabytes << 20
            if shortcuts.label_logits and architecture.plain_head and not plain
            else None
        ),
        stored_frames={"off": 0, "bf16": 2, "int8": 1}[shortcuts.encoder_cache],
    )


def _attention(
    config: Config, device: torch.device, frozen: int
) -> Literal["eager", "sdpa", "grouped", "flash"]:
    """As it is where nothing is measured."""
    chosen = config.model.llm.attention
    if chosen == "flash_attention_2":
        return "flash"
    if chosen != "auto":
        return chosen
    if is_plain(config):
        return "sdpa"
    return usual_attention(device, torch.bfloat16 if frozen == 2 else torch.float32)


def _zero_settings(config: Config) -> ZeRO | None:
    if config.strategy.kind != "deepspeed":
        return None
    return ZeRO.model_validate(read_zero_config(config.strategy.config)[ZERO])


def config_name(config: Config) -> str:
    """The one of STRATEGIES that the configuration asks for."""
    settings = _zero_settings(config)
    if settings is None:
        return config.strategy.kind
    offloads = settings.param_on_cpu or settings.optimizer_on_cpu
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
    find_largest = largest_plain if is_plain(config) else largest_budget
    if fitting:
        chosen = min(fitting, key=lambda name: strategies[name].bytes_on_wire_per_step)
        largest = find_largest(config, job, utterances, machine.usable, chosen)
    else:
        budgets = {
            name: find_largest(config, job, utterances, machine.usable, name) for name in STRATEGIES
        }
        # Offloading moves weights over PCIe for every microbatch: only where nothing else goes.
        others = {name: budget for name, budget in budgets.items() if "offload" not in name}
        near = budgets if not any(others.values()) else others
        near = {name: b for name, b in near.items() if b >= NEARLY * max(near.values())}
        chosen = min(near, key=lambda name: strategies[name].bytes_on_wire_per_step)
        largest = budgets[chosen]
    plan = Plan(machine, job, budget, strategies, chosen if largest else None, largest)
    if not is_plain(config):
        return plan
    longest = max(row_of(config, utterance).columns for utterance in utterances)
    return replace(
        plan,
        max_batch_tokens=largest * longest,
        plain_utterances=config.performance.plain_utterances,
        max_plain_utterances=largest,
    )


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
        fitting = [row_of(config, shortest)]
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

    largest = 64 * _largest(LARGEST_BUDGET // 64, lambda count: fits(64 * count))
    trains = any(microbatch(config, utterance, largest) for utterance in utterances)
    return largest if trains else 0


def largest_plain(
    config: Config, job: Job, utterances: Sequence[Utterance], usable: int, strategy: str
) -> int:
    """As `largest_budget`, of `performance.plain_utterances`."""

    def fits(count: int) -> bool:
        changed = config.performance.model_copy(update={"plain_utterances": count})
        tried = config.model_copy(update={"performance": changed})
        parts = worst_parts(tried, job, utterances, config.data.microbatch_tokens, strategy)
        return sum(parts.values()) <= usable

    return _largest(LARGEST_PLAIN, fits)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to `most` that fits, where all above one that does not fit do not
    either; 0 where none does."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
