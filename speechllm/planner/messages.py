"""The collectives of an optimizer step under each strategy: what, how large, how many.

W ranks, P bytes of fp32 weights that train, E and L bytes of the frozen encoder and LLM. Volumes
follow ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054, section 7) with two differences: what is
frozen has no gradients, and DeepSpeed's stages 1 and 2 reduce gradients by all-reduce, each rank
keeping its part. Sizes are those of whole tensors; `links.sent_bytes` says what of them travels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from speechllm.planner.activations import FLOAT
from speechllm.planner.links import Kind
from speechllm.planner.memory import Job
from speechllm.step import StepTotals

MIB = 2**20
FIRST_BUCKET, BUCKET = MIB, 25 * MIB  # of DistributedDataParallel
AGREED = 8 * len(fields(StepTotals))  # doubles


@dataclass(frozen=True)
class Message:
    """`count` collectives a step of together `size` bytes.

    beside: what they may run beside: the backward of the microbatches, the compute of them, or
    nothing, since the next thing waits for them. microbatches: of a step, in how many there are
    such.
    """

    what: Literal["counts", "gradients", "weights", "updated weights", "norm"]
    kind: Kind
    size: int
    count: int
    beside: Literal["backward", "compute", None] = None
    microbatches: int = 1


def step_messages(job: Job, strategy: str) -> tuple[Message, ...]:
    """What `job.ranks` ranks send in a step of `job.microbatches` rounds. Nothing for one rank.

    How many collectives there are is a matter of buckets, which hold whole tensors: about.
    """
    if job.ranks == 1:
        return ()
    about, often = job.architecture, job.microbatches
    trained = FLOAT * about.trained_parameters
    counts = Message("counts", "all_reduce", AGREED, 1)
    match strategy:
        case "ddp":
            buckets = 1 + _ceil(max(0, trained - FIRST_BUCKET), BUCKET)
            return counts, Message("gradients", "all_reduce", trained, buckets, "backward")
        case "zero1" | "zero2":
            settings = job.zero[strategy]
            times = often if strategy == "zero2" else 1
            buckets = _ceil(trained, FLOAT * settings.reduce_bucket_size)
            parts = _ceil(trained, FLOAT * max(1, settings.allgather_bucket_size))
            parts = max(parts, 2)  # the parameters that decay, and those that do not
            return (
                counts,
                Message(
                    "gradients", "all_reduce", times * trained, times * buckets, "backward", times
                ),
                Message("norm", "all_reduce", 2 * FLOAT, 2),
                Message("updated weights", "all_gather", trained, parts),
            )
        case "zero3" | "zero3_offload":
            return counts, *_zero3(job, strategy), Message("norm", "all_reduce", 16, 2)
        case "fsdp2":
            return counts, *_fsdp2(job), Message("norm", "all_reduce", FLOAT, 1)
        case _:
            raise AssertionError(strategy)


def _fsdp2(job: Job) -> tuple[Message, Message]:
    """Layers are gathered for the forward and those of the LLM and what trains of the encoder for
    the backward, in each microbatch. All else is gathered once a step, as are the layers with
    `reshard_after_forward: false`."""
    about, size, often = job.architecture, job.setting.frozen, job.microbatches
    layers = about.llm.layers
    llm_layers = size * layers * about.llm.layer_parameters + FLOAT * about.lora_parameters
    encoder_layers = encoder_trained = encoder_units = 0
    if about.whisper is not None:
        encoder_units, layer = about.whisper.layers, about.whisper.layer_parameters
        frozen = encoder_units - about.unfrozen_layers
        encoder_layers = size * frozen * layer
        encoder_trained = FLOAT * about.unfrozen_layers * layer
    trained = FLOAT * about.trained_parameters
    everything = size * about.frozen_parameters + trained
    root = everything - llm_layers - encoder_layers - encoder_trained
    if job.reshard:
        gathered = root + often * (encoder_layers + 2 * encoder_trained + 2 * llm_layers)
        gathers = 1 + often * (encoder_units + about.unfrozen_layers + 2 * layers)
    else:
        gathered, gathers, often = everything, 1 + encoder_units + layers, 1
    units = 1 + about.unfrozen_layers + (layers if about.lora_parameters else 0)
    return (
        Message("weights", "all_gather", gathered, gathers, "compute", often),
        Message("gradients", "reduce_scatter", trained, units, "backward"),
    )


def _zero3(job: Job, strategy: str) -> tuple[Message, Message]:
    """Weights of the encoder are gathered for the forward of each microbatch, those of the LLM for
    its backward too, except what comes round within `stage3_max_reuse_distance` (there and back, so
    half of it), and again with activation checkpointing; gradients are reduced in each microbatch.
    Matrix by matrix, as was counted on two ranks. At most: tensors below
    `stage3_param_persistence_threshold` stay, which with a small model may be many.
    """
    about, size, often = job.architecture, job.setting.frozen, job.microbatches
    settings = job.zero[strategy]
    kept = min(settings.stage3_max_reuse_distance // 2, settings.stage3_max_live_parameters)
    again = max(0, about.llm.parameters - kept)
    trained = FLOAT * about.trained_parameters
    passes = 2 if job.setting.checkpointing else 1
    gathered = size * (about.frozen_parameters + passes * again) + 2 * trained
    matrices = about.llm.layers * (7 if about.llm.gated else 6) * (1 + passes * (again > 0))
    matrices += 6 * about.whisper.layers if about.whisper is not None else 0
    buckets = _ceil(trained, FLOAT * settings.reduce_bucket_size)
    return (
        Message("weights", "all_gather", often * gathered, often * matrices, "compute", often),
        Message("gradients", "reduce_scatter", often * trained, often * buckets, "backward", often),
    )


def _ceil(size: int, part: int) -> int:
    return -(-size // part)
