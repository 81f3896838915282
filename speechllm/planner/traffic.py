"""Bytes that one rank sends in an optimizer step, under each strategy.

W ranks, P bytes of fp32 weights that train, E and L bytes of the frozen encoder and LLM, a
microbatches of a rank. A ring moves (W-1)/W of the data for an all-gather or a reduce-scatter and
twice that for an all-reduce (Patarasuk and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002). Sums of
counts and norms, a few bytes, are left out, and so is the way between CPU and GPU.
"""

from __future__ import annotations

from speechllm.planner.activations import FLOAT
from speechllm.planner.memory import Job


def estimate_traffic(job: Job, strategy: str) -> int:
    """Bytes a rank sends (and receives) in a step, whatever the microbatches hold.

    ddp: one all-reduce of the gradients, 2 P.
    zero1: the same, in DeepSpeed's buckets, and an all-gather of the updated weights, 3 P.
    zero2: DeepSpeed reduces the gradients of each microbatch as it comes, (2 a + 1) P.
    zero3, zero3_offload: each microbatch gathers the encoder for its forward, the LLM for forward
    and backward (and for running the layers again, with activation checkpointing), what trains for
    both, and reduces the gradients: a (E + 2 L + 3 P). At most: what stays within
    `stage3_max_reuse_distance` is not gathered twice.
    fsdp2: as zero3 but gradients are reduced once, and what belongs to no layer is gathered once a
    step; layers that run again are gathered already. Without resharding all is gathered once.
    """
    about, ranks, size = job.architecture, job.ranks, job.setting.frozen
    part = (ranks - 1) / ranks
    trained = FLOAT * about.trained_parameters
    encoder, llm = size * about.frozen_encoder_parameters, size * about.llm.parameters
    often = job.microbatches
    match strategy:
        case "ddp":
            moved = 2 * trained
        case "zero1":
            moved = 3 * trained
        case "zero2":
            moved = (2 * often + 1) * trained
        case "zero3" | "zero3_offload":
            passes = 3 if job.setting.checkpointing else 2
            moved = often * (encoder + passes * llm + 3 * trained)
        case "fsdp2" if job.reshard:
            layers = size * about.llm.layers * about.llm.layer_parameters
            inner = encoder - size * _outside_layers(job)
            once = encoder - inner + llm - layers
            moved = once + often * (inner + 2 * layers + 2 * trained) + trained
        case "fsdp2":
            moved = encoder + llm + 2 * trained
        case _:
            raise AssertionError(strategy)
    return round(part * moved)


def _outside_layers(job: Job) -> int:
    """Parameters of the encoder that belong to none of its layers."""
    whisper = job.architecture.whisper
    if whisper is None:
        return 0
    return whisper.parameters - whisper.layers * whisper.layer_parameters
