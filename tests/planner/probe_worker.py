"""What every rank does in the test of probes: one in each case, and what it leaves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from runs import ROOT, tiny_config

from speechllm.planner.probe import probe
from speechllm.run import open_run
from speechllm.strategy.base import TrainableState
from speechllm.world import World

# ZeRO-3 last: it leaves its own linear function in torch, which keeps more.
CASES = {
    **{name: (name,) for name in ("ddp", "fsdp2", "zero1", "zero2")},
    "whole rows": ("ddp", "performance.prefix_cache=off"),
    "plain": ("ddp", "performance.preset=plain", "performance.plain_utterances=2"),
    "zero3": ("zero3", "data.microbatches_per_step=2"),  # one a rank
}
BUCKET = 500_000  # numbers, that the shipped ones of 200 MB do not hide all else


def probe_all(world: World, directory: Path, shards: Path, models: Sequence[str]) -> dict[str, Any]:
    return {
        name: _probe(world, directory / name, shards, chosen, [*models, *more])
        for name, (chosen, *more) in CASES.items()
    }


def _probe(
    world: World, directory: Path, shards: Path, strategy: str, overrides: Sequence[str]
) -> dict[str, Any]:
    chosen = [f"strategy.kind={strategy}"]
    if strategy.startswith("zero"):
        settings = _settings(directory, strategy, world.rank)
        chosen = ["strategy.kind=deepspeed", f"strategy.config={settings}"]
    config = tiny_config(
        directory,
        shards,
        *chosen,
        "data.num_workers=0",
        "data.microbatches_per_step=4",
        "data.microbatch_tokens=500",
        *overrides,
    )
    with ExitStack() as stack:
        run = open_run(config, world, stack)
        before = run.strategy.full_state()
        found = probe(run)
        after = run.strategy.full_state()
        return {
            "peak": found.peak,
            "predicted": found.predicted,
            "positions": found.shape.positions,
            "prefix": found.shape.prefix,
            "same": before is None or (after is not None and _equal(before, after)),
            "gradients": sum(p.grad is not None for p in run.model.parameters()),
        }


def _settings(directory: Path, strategy: str, rank: int) -> Path:
    """The shipped file, with smaller buckets."""
    shipped = json.loads((ROOT / "ds_configs" / f"{strategy}.json").read_text())
    shipped["zero_optimization"]["reduce_bucket_size"] = BUCKET
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / f"zero_of_rank_{rank}.json"
    file.write_text(json.dumps(shipped))
    return file


def _equal(one: TrainableState, other: TrainableState) -> bool:
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    return one.step == other.step and all(
        torch.equal(tensor, getattr(other, kind)[name])
        for kind in kinds
        for name, tensor in getattr(one, kind).items()
    )
