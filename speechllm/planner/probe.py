"""One worst-case step before training, so that memory runs out now and not at step 40,000."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch

from speechllm.data.plan import FlatPlan
from speechllm.errors import UserError
from speechllm.log import logger
from speechllm.planner.activations import Shape
from speechllm.planner.advice import GIB, Machine, config_name, job_of
from speechllm.planner.architecture import read_architecture
from speechllm.planner.measure import peak_growth
from speechllm.planner.memory import estimate_memory
from speechllm.planner.workload import is_plain, shape_of
from speechllm.run import Run
from speechllm.types import SAMPLE_RATE, Batch

REMEDY = (
    "(and raise data.microbatches_per_step by as much), set train.activation_checkpointing=true, "
    "or take a strategy that shards; `speechllm plan` says what fits"
)


@dataclass(frozen=True)
class ProbeResult:
    """Of the rank that has least left, in bytes: tensors at the peak of the step, what had been
    predicted for it, and what there is."""

    shape: Shape
    audio_seconds: float  # of the longest row
    peak: int
    predicted: int
    available: int

    @property
    def text(self) -> str:
        return (
            f"probe: {self.shape.rows} x {self.shape.columns} positions with audio of "
            f"{self.audio_seconds:.1f} s, the costliest microbatch of the epoch, take "
            f"{self.peak / GIB:.2f} GiB a rank (predicted: {self.predicted / GIB:.2f}) of "
            f"{self.available / GIB:.2f}"
        )


def probe(run: Run) -> ProbeResult:
    """Run forward and backward of the costliest microbatch of epoch 0, on every rank the same.

    The loss is made NaN, and a step whose gradient is not finite updates nothing, so weights,
    moments, gradients and the random state are afterwards as before. Evaluation and decoding are
    not probed. All ranks must call it.

    Raises:
        UserError: memory ran out, or would once the optimizer has its moments; names the remedy.
    """
    plan = run.plan_of(0).flat()
    utterances = plan.microbatch(costliest(plan, run.train.corpus.durations))
    batch = run.loader.read(0, utterances).batch
    shape = shape_of(run.config, batch, run.model.shortcuts.prefix.length(batch.opening))
    seconds = int(batch.audio_lengths_A.max()) / SAMPLE_RATE
    parts = _predicted(run, shape)
    standing = _standing(run, parts)
    try:
        growth = peak_growth(lambda: _step(run, batch), run.world.device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"probe: memory ran out in a microbatch of {shape.rows} x {shape.columns} positions "
            f"with audio of {seconds:.1f} s, the costliest of the epoch; {_remedy(run)} ({error})"
        ) from error
    mine = [standing + growth, sum(parts.values()), _available(run, standing)]
    highest = max(run.world.gather(mine), key=lambda sizes: sizes[0] / sizes[2])
    result = ProbeResult(shape, seconds, *highest)
    if result.peak > result.available:
        raise UserError(f"{result.text}; {_remedy(run)}")
    logger.info("%s", result.text)
    return result


def costliest(plan: FlatPlan, durations: np.ndarray) -> int:
    """The microbatch with most positions; among equals that with the longest audio.

    durations: float64, seconds of each utterance of the corpus.
    """
    longest = np.maximum.reduceat(durations[plan.utterances], plan.microbatch_starts[:-1])
    return int(np.lexsort((longest, plan.positions))[-1])


def _remedy(run: Run) -> str:
    plain = is_plain(run.config)
    return f"lower {'performance.plain_utterances' if plain else 'data.microbatch_tokens'} {REMEDY}"


def _step(run: Run, batch: Batch) -> None:
    """As `run_step`, of two microbatches where gradients of an earlier one will stand beside the
    next. DeepSpeed's stage 3 keeps gathered weights from the second microbatch on, if it runs like
    the first: so there is always a second, and the prefix is not computed in the first (where
    FSDP2 must compute it, having the embeddings only within)."""
    strategy, world = run.strategy, run.world
    by_deepspeed = run.config.strategy.kind == "deepspeed"
    if by_deepspeed:
        run.model.compute_prefix()
    # With fp16 a gradient that is not finite lowers the loss scale, which is put back.
    state = strategy.full_state() if run.config.precision == "fp16" else None
    rounds = min(2, -(-run.config.data.microbatches_per_step // world.size))
    devices = [world.device] if world.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for number in range(2 if by_deepspeed else rounds):
            last = number % rounds == rounds - 1
            with strategy.microbatch(last=last):
                sums = strategy.model(batch.to(world.device), "lm")
                strategy.backward(sums.loss * math.nan)
            if last:
                norm = strategy.step(0.0)
                assert not math.isfinite(norm), "the probe would have trained"
    if run.config.precision == "fp16":
        strategy.load_full_state(state)


def _predicted(run: Run, shape: Shape) -> dict[str, int]:
    machine = Machine(run.world.size, memory=0, on_cpu=run.world.device.type != "cuda")
    job = job_of(run.config, read_architecture(run.config.model), machine)
    return estimate_memory(job, shape, config_name(run.config))


def _standing(run: Run, parts: dict[str, int]) -> int:
    """Bytes of tensors before the step, with the moments that the first update will make.

    On a CPU weights and moments are taken as they are predicted, which is a matter of counting.
    """
    if run.world.device.type != "cuda":
        names = ["frozen_llm", "frozen_encoder", "ctc_head", "trainable", "optimizer", "batch"]
        if run.config.strategy.kind == "ddp" and run.world.size > 1:
            names.append("gradients")  # in buckets that are there from the start
        return sum(parts[name] for name in names)
    moments_are_there = run.progress.step > 0 or run.config.train.init_from is not None
    to_come = 0 if moments_are_there else parts["optimizer"]
    return torch.cuda.memory_allocated(run.world.device) + to_come


def _available(run: Run, standing: int) -> int:
    """Bytes that this rank's tensors can have: on a GPU what is free and what torch holds of it, on
    a CPU the free memory that the ranks of this host share, and what they have taken."""
    device = run.world.device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) + standing
