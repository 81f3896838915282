"""Bytes of tensors that one rank holds at its highest moment of a step, under each strategy.

W ranks, P parameters that train (fp32), F bytes of frozen weights. What each strategy divides
follows ZeRO (Rajbhandari et al. 2020, arXiv:1910.02054) and FSDP (Zhao et al. 2023,
arXiv:2304.11277). ZeRO and FSDP2 have never been measured on GPUs here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from speechllm.model.prefix import masks_hold
from speechllm.planner import activations as kept
from speechllm.planner.activations import FLOAT, Rows, Setting, Shape
from speechllm.planner.architecture import Architecture
from speechllm.planner.workload import audio_bytes
from speechllm.strategy.zero_config import ZeRO

STRATEGIES = ("ddp", "zero1", "zero2", "fsdp2", "zero3", "zero3_offload")  # the simplest first
PARTS = (
    "frozen_llm", "frozen_encoder", "ctc_head", "trainable", "gradients", "optimizer",
    "prefix", "activations", "logits", "gathered", "buckets", "batch",
)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """All that estimates depend on, besides the microbatch.

    microbatches: of one rank in a step. zero: the ZeRO settings of each strategy of that kind.
    reshard: whether fsdp2 frees gathered weights after a layer's forward. ctc: the head of that
    objective is held. cached: keys and values of the prefix are computed once a run. packing: all
    utterances are in one row. label_logits: positions without a label have no logits.
    logits_limit: bytes of fp32 logits at a time; None where all are there at once.
    stored_frames: bytes of a number of the encoder's outputs where those are read and the encoder
    is not run, else 0.
    """

    architecture: Architecture
    setting: Setting
    ranks: int
    microbatches: int
    zero: Mapping[str, ZeRO]
    reshard: bool
    ctc: bool
    cached: bool
    packing: bool
    label_logits: bool
    logits_limit: int | None
    stored_frames: int

    def rows(self, shape: Shape) -> Rows:
        """What `speechllm.model.shortcuts.Shortcuts.lay_out` makes of that microbatch."""
        left_out = shape.prefix if self.cached else 0
        whole = Rows(shape.positions, shape.columns, shape.positions)
        if not masks_hold(shape.columns, self.architecture.longest_row):
            return whole
        positions = shape.positions - shape.rows * left_out
        if self.packing and self.setting.attention != "flash":
            return Rows(positions, left_out + positions, left_out + positions)
        return replace(whole, positions=positions)


@dataclass(frozen=True)
class Moment:
    """A point of the step at which memory may be highest.

    activations: bytes, logits apart. backward: whether gradients of this microbatch are there.
    product_inputs: inputs of the LLM's frozen products, kept by none but DeepSpeed's own linear
    function, which ZeRO-3 puts in the place of torch's (`memory_efficient_linear`).
    """

    activations: int
    logits: int = 0
    backward: bool = False
    product_inputs: int = 0


def estimate_memory(job: Job, shape: Shape, strategy: str) -> dict[str, int]:
    """Bytes of each of `PARTS` at the highest moment of a step of `shape` microbatches."""
    return max(
        (_parts(job, shape, strategy, moment) for moment in moments(job, shape)),
        key=lambda parts: sum(parts.values()),
    )


def moments(job: Job, shape: Shape) -> list[Moment]:
    """The encoder's forward, or its outputs as they are decoded; the start of the LLM's backward;
    the end of it, where the connector's gradients are made."""
    about, setting, rows = job.architecture, job.setting, job.rows(shape)
    below = kept.connector(about, setting, shape)
    if about.whisper is not None:
        frame = kept.encoder_layer(about.whisper, setting)
        if setting.checkpointing:
            frame = about.whisper.width * setting.compute
        below += about.unfrozen_layers * frame * shape.rows * shape.frames
    frames = kept.encoder_forward(about, setting, shape)
    if job.stored_frames:
        frames = shape.rows * shape.frames * about.frame_width * setting.compute
    scored = shape.labels if job.label_logits else rows.positions
    logits = kept.logits(about.llm, setting, scored, job.logits_limit)
    above = kept.decoder(about, setting, rows)
    # The cross entropy's working space is released before the first layer's is needed.
    layer = kept.decoder_backward(about, setting, rows)
    inputs = kept.product_inputs(about, setting, rows)
    all_inputs = 0 if setting.checkpointing else about.llm.layers * inputs
    return [
        Moment(frames),
        Moment(below + above, logits, product_inputs=all_inputs),
        Moment(below + above + layer, product_inputs=all_inputs or inputs),
        Moment(below + kept.connector_backward(about, setting, shape, rows), backward=True),
    ]


def _parts(job: Job, shape: Shape, strategy: str, moment: Moment) -> dict[str, int]:
    about, ranks, size = job.architecture, job.ranks, job.setting.frozen
    trained = FLOAT * about.trained_parameters
    share = -(-trained // ranks)
    # Gradients of earlier microbatches stand while the next one runs; DDP's buckets always do.
    standing = job.microbatches > 1 or moment.backward
    parts = dict.fromkeys(PARTS, 0)
    parts["frozen_llm"] = size * about.llm.parameters
    parts["frozen_encoder"] = size * about.frozen_encoder_parameters
    parts["ctc_head"] = size * about.llm.embedding_parameters if job.ctc else 0
    parts["prefix"] = kept.prefix(about.llm, job.setting, shape) if job.cached else 0
    parts["activations"], parts["logits"] = moment.activations, moment.logits
    parts["batch"] = audio_bytes(shape)
    if job.stored_frames:
        parts["batch"] = shape.rows * shape.frames * about.frame_width * job.stored_frames
    match strategy:
        case "ddp":
            parts["trainable"], parts["optimizer"] = trained, 2 * trained
            parts["gradients"] = trained if standing or ranks > 1 else 0
        case "zero1" | "zero2":
            # A share of the weights is held once more, as the optimizer's own.
            parts["trainable"], parts["optimizer"] = trained + share, 2 * share
            whole = trained if strategy == "zero1" else share
            parts["gradients"] = whole if standing else 0
            if moment.backward:
                parts["gradients"] += share
            # DeepSpeed makes the buffers when the first gradient comes. ZeRO-1 reduces once a step
            # and still has them in the next microbatch, ZeRO-2 frees them after each.
            held = standing if strategy == "zero1" else moment.backward
            if held or about.lora_parameters:
                parts["buckets"] = _bucket_bytes(job.zero[strategy], trained)
        case "zero3" | "zero3_offload":
            settings = job.zero[strategy]
            parts["frozen_llm"] = -(-parts["frozen_llm"] // ranks)
            parts["frozen_encoder"] = -(-parts["frozen_encoder"] // ranks)
            parts["trainable"], parts["optimizer"] = 2 * share, 2 * share
            parts["gradients"] = share + (share if moment.backward else 0)
            parts["gathered"] = _live_bytes(job, settings)
            if settings.memory_efficient_linear:
                parts["activations"] += moment.product_inputs
            parts["buckets"] = min(trained, FLOAT * settings.reduce_bucket_size)
            if settings.param_on_cpu:
                parts["frozen_llm"] = parts["frozen_encoder"] = 0
            if settings.optimizer_on_cpu:
                parts["trainable"] = 0 if settings.param_on_cpu else share
                parts["optimizer"] = parts["gradients"] = 0
        case "fsdp2":
            parts["frozen_llm"] = -(-parts["frozen_llm"] // ranks)
            parts["frozen_encoder"] = -(-parts["frozen_encoder"] // ranks)
            parts["trainable"], parts["optimizer"] = share, 2 * share
            # Not reduced before the last microbatch, so whole until then.
            parts["gradients"] = trained if job.microbatches > 1 else share * moment.backward
            parts["gathered"] = _gathered_bytes(job, trained)
    return parts


def _bucket_bytes(settings: ZeRO, trained: int) -> int:
    """DeepSpeed's contiguous buffers for gradients on their way: one, or two with overlap."""
    if settings.contiguous_gradients:
        return FLOAT * settings.reduce_bucket_size * (2 if settings.overlap_comm else 1)
    return min(trained, FLOAT * settings.reduce_bucket_size)


def _live_bytes(job: Job, settings: ZeRO) -> int:
    """ZeRO-3 keeps gathered weights up to `stage3_max_live_parameters`, above that the layer which
    is needed: at most all. They are copied out of a buffer that holds what is fetched at a time.
    With torch's own linear function autograd holds all of the LLM's until their backward."""
    about, size = job.architecture, job.setting.frozen
    largest = max(about.llm.layer_parameters, about.llm.embedding_parameters)
    live = min(about.frozen_parameters, settings.stage3_max_live_parameters + largest)
    if not settings.memory_efficient_linear:
        live = max(live, about.llm.parameters)
    fetched = max(settings.stage3_prefetch_bucket_size, about.llm.layer_parameters)
    buffer = min(about.frozen_parameters, fetched)
    return size * (live + buffer) + FLOAT * about.connector_parameters


def _gathered_bytes(job: Job, trained: int) -> int:
    """FSDP2 holds what belongs to no layer (embeddings, output matrix, convolutions), the layer
    that runs, the next one that is fetched, and the buffer from which that one is copied. Without
    resharding: everything."""
    about, size = job.architecture, job.setting.frozen
    if not job.reshard:
        return size * about.frozen_parameters + trained
    root = about.llm.parameters - about.llm.layers * about.llm.layer_parameters
    unit = about.llm.layer_parameters
    if about.whisper is not None:
        root += about.whisper.parameters - about.whisper.layers * about.whisper.layer_parameters
        unit = max(unit, about.whisper.layer_parameters)
    return size * (root + 3 * unit) + FLOAT * about.connector_parameters
