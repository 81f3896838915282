"""`speechllm plan --scale`: from a configuration and its options to the text that is printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from speechllm.config.schema import Config
from speechllm.errors import UserError
from speechllm.planner.activations import Shape
from speechllm.planner.advice import Machine, config_name, job_of, parse_size, worst_parts
from speechllm.planner.architecture import read_architecture
from speechllm.planner.command import training_here, utterances_of
from speechllm.planner.links import DEFAULT, parse_link
from speechllm.planner.memory import STRATEGIES, Job
from speechllm.planner.messages import step_messages
from speechllm.planner.options import write_json
from speechllm.planner.scaling import (
    Overlap,
    efficiency,
    layout_of,
    parse_overlap,
    parse_worlds,
    predict_step,
)
from speechllm.planner.scaling_report import Row, Scaling, as_json, as_text
from speechllm.planner.step_time import Measured, given_step, read_measured
from speechllm.planner.workload import Utterance, microbatch, planned_positions
from speechllm.prepare import Split, TextSide
from speechllm.training_data import epoch_plans

SAMPLED_STEPS = 8  # of an epoch, by which the balance of ranks is judged
GPUS_PER_NODE = 8
HIDDEN = Overlap(1.0, 1.0)
PREDICTED = tuple(name for name in STRATEGIES if "offload" not in name)


def scale_command(config: Config, options: argparse.Namespace) -> str:
    """Raises UserError for options that mean nothing or are missing, and unknown models."""
    worlds = parse_worlds(options.scale)
    per_node = GPUS_PER_NODE if options.gpus_per_node is None else options.gpus_per_node
    if per_node < 1:
        raise UserError(f"--gpus-per-node {per_node}: give 1 or more")
    if config_name(config) not in PREDICTED:
        raise UserError("--scale: with offloading a step waits for PCIe, which is not predicted")
    network = parse_link(options.link or DEFAULT)
    overlap = parse_overlap(options.overlap) if options.overlap else Overlap()
    own = config.data.microbatches_per_step
    measured = _measured(options, config)
    on_cpu = config.device == "cpu" or network.name == "gloo-local"
    machine = Machine(1, parse_size(options.gpu_memory) if options.gpu_memory else 0, on_cpu)
    job = job_of(config, read_architecture(config.model), machine)
    utterances, source = utterances_of(config)
    split, text = training_here(config)
    compute = measured.compute
    if not compute.utterances:
        compute = replace(compute, utterances=mean_rows(config, utterances, split))
    costs = cost_sampler(config, job, split, text)
    one = predict_step(compute, layout_of(1, own, costs(own)), (), network, per_node, overlap)

    def row(strategy: str, ranks: int, microbatches: int) -> Row:
        costs_KM = costs(microbatches)
        layout = layout_of(ranks, microbatches, costs_KM)
        here = replace(job, ranks=ranks, microbatches=layout.rounds)
        messages = step_messages(here, strategy)
        step, best = (
            predict_step(compute, layout, messages, network, per_node, hidden)
            for hidden in (overlap, HIDDEN)
        )
        parts = worst_parts(config, here, utterances, config.data.microbatch_tokens, strategy)
        return Row(
            step=step,
            hidden_seconds=best.seconds,
            efficiency=efficiency(step, one),
            nodes=-(-ranks // per_node),
            bytes_per_rank=sum(parts.values()),
            balance_known=costs_KM is not None,
        )

    scaling = Scaling(
        strategy=config_name(config),
        one=one,
        compute=compute,
        measured=measured.what,
        network=network,
        overlap=overlap,
        overlap_given=options.overlap is not None,
        gpus_per_node=per_node,
        utterances=source,
        usable=machine.usable if options.gpu_memory else None,
        strong={name: [row(name, w, own) for w in worlds] for name in PREDICTED},
        weak={name: [row(name, w, own * w) for w in worlds] for name in PREDICTED},
    )
    found = json.dumps(as_json(scaling), indent=1)
    if options.json == "-":
        return found
    if options.json is not None:
        write_json(options.json, found)
    return as_text(scaling)


def _measured(options: argparse.Namespace, config: Config) -> Measured:
    microbatches = config.data.microbatches_per_step
    if options.measured is not None:
        tokens = config.data.microbatch_tokens
        return read_measured(options.measured, microbatches=microbatches, tokens=tokens)
    if options.step_seconds is not None:
        return given_step(options.step_seconds, microbatches)
    raise UserError(
        "--scale: what does a step take on one GPU? Give --measured FILE (a run of one process, "
        "its metrics.jsonl, or the JSON of tools/bench_train.py) or --step-seconds S"
    )


def cost_sampler(
    config: Config, job: Job, split: Split | None, text: TextSide | None
) -> Callable[[int], np.ndarray | None]:
    """From a number of microbatches a step M to the positions that the LLM runs on in those of some
    whole steps of epoch 0, [K, M]; None where the data are not here, or do not fill one step."""

    @cache
    def costs(microbatches: int) -> np.ndarray | None:
        if split is None or text is None:
            return None
        data = config.data.model_copy(update={"microbatches_per_step": microbatches})
        plan = epoch_plans(config.model_copy(update={"data": data}), split)(0)
        whole = plan.num_microbatches // microbatches
        if not whole:
            return None
        chosen = np.unique(np.linspace(0, whole - 1, min(SAMPLED_STEPS, whole)).astype(int))
        planned = [m for k in chosen.tolist() for m in plan.step(k)]
        found = run_positions(config, job, split, text, planned)
        return found.reshape(len(chosen), microbatches)

    return costs


def run_positions(
    config: Config, job: Job, split: Split, text: TextSide, microbatches: Sequence[np.ndarray]
) -> np.ndarray:
    """float64 [n]: of each of these microbatches (numbers of utterances), padding included."""
    rows_n = np.array([len(numbers) for numbers in microbatches])
    positions = planned_positions(config, split, text, np.concatenate(microbatches))
    longest_n = np.maximum.reduceat(positions, np.cumsum(rows_n) - rows_n)
    shapes = (
        Shape(rows, columns, tokens=0, frames=0, labels=0, prefix=len(text.prefix))
        for rows, columns in zip(rows_n.tolist(), longest_n.tolist(), strict=True)
    )
    return np.array([job.rows(shape).positions for shape in shapes], dtype=np.float64)


def mean_rows(config: Config, utterances: Sequence[Utterance], split: Split | None) -> float:
    """Utterances of a mean microbatch: of the epoch's plan, else with as many of each length."""
    if split is not None:
        plan = epoch_plans(config, split)(0)
        return plan.num_utterances / plan.num_microbatches
    shapes = [microbatch(config, u, config.data.microbatch_tokens) for u in utterances]
    rows = [shape.rows for shape in shapes if shape is not None]
    if not rows:
        raise UserError("data.microbatch_tokens holds none of the utterances assumed; raise it")
    return len(rows) / sum(1 / count for count in rows)
