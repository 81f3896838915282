"""What a step takes on one device, as a run's metrics or a benchmark say. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from speechllm.errors import UserError
from speechllm.planner.scaling import Compute

WARM = 0.1  # part of a run's logged steps, the first, that are left out
FEWEST = 3  # steps of which a median is taken


@dataclass(frozen=True)
class Measured:
    """compute: of one device, without waiting for data; of no utterances where their number is not
    known. what: where it is from, in words."""

    compute: Compute
    what: str


def given_step(seconds: float, microbatches: int) -> Measured:
    """Raises UserError."""
    if not 0 < seconds < math.inf:
        raise UserError(f"--step-seconds {seconds:g}: give more than 0, and a number")
    return Measured(Compute(seconds / microbatches, 0.0), "given (--step-seconds)")


def read_measured(path: Path, *, microbatches: int, tokens: int) -> Measured:
    """microbatches: of a step, where the run whose metrics it is has left no config.yaml.
    tokens: `data.microbatch_tokens` that the microbatches must have had.

    Raises UserError where the file is not what is wanted, or of more than one process.
    """
    if path.is_dir():
        path = path / "metrics.jsonl"
    try:
        if path.suffix == ".jsonl":
            lines = [json.loads(line) for line in _text(path).split("\n")[:-1]]
            return _of_metrics(path, lines, microbatches, tokens)
        return _of_benchmark(path, json.loads(_text(path)), tokens)
    except (json.JSONDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--measured {path}: neither a run's metrics.jsonl nor the JSON of "
            f"tools/bench_train.py ({type(error).__name__}: {error})"
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--measured {path}: cannot be read: {error}") from error


def _refuse_other(path: Path, *, ranks: int, had: int, tokens: int) -> None:
    if ranks != 1:
        raise UserError(
            f"--measured {path}: of {ranks} ranks, so communication is in its times; give one of a "
            "single rank"
        )
    if had != tokens:
        raise UserError(
            f"--measured {path}: of microbatches of {had} positions, and the configuration has "
            f"{tokens}; add data.microbatch_tokens={had}, or measure those"
        )


def _of_metrics(
    path: Path, lines: list[dict[str, Any]], microbatches: int, tokens: int
) -> Measured:
    """The median of logged steps, each a mean over `train.log_every` of them."""
    status, config = path.with_name("status.json"), path.with_name("config.yaml")
    ranks, had = 1, tokens
    if status.is_file():
        ranks = json.loads(_text(status)).get("world_size", 1)
    if config.is_file():
        data = yaml.safe_load(_text(config))["data"]
        microbatches, had = data["microbatches_per_step"], data["microbatch_tokens"]
    _refuse_other(path, ranks=ranks, had=had, tokens=tokens)
    steps = [line for line in lines if line.get("objective", "lm") == "lm"]
    steps = steps[int(WARM * len(steps)) :]
    if len(steps) < FEWEST:
        raise UserError(
            f"--measured {path}: {len(steps)} logged step(s) of training the LLM's loss; "
            f"{FEWEST} are the least"
        )
    seconds = median(step["step_seconds"] - step["data_wait_seconds"] for step in steps)
    utterances = sum(step["utterances"] for step in steps) / len(steps)
    compute = Compute(seconds / microbatches, utterances / microbatches)
    return Measured(compute, f"measured ({path}: median of {len(steps)} logged steps)")


def _of_benchmark(path: Path, found: dict[str, Any], tokens: int) -> Measured:
    full = found["full"]
    phases, settings = full["phases"], full["settings"]
    had = settings["microbatch_tokens"]
    _refuse_other(path, ranks=settings["world"], had=had, tokens=tokens)
    update = phases["optimizer"]
    seconds = full["step_seconds"] - phases["load"] - update
    utterances = full["utterances"] / full["steps"]
    microbatches = settings["microbatches_per_step"]
    compute = Compute(seconds / microbatches, utterances / microbatches, update)
    return Measured(compute, f"measured ({path}: the full path)")
