"""What every rank does in the test of probes: one under each strategy, and what it leaves."""

from __future__ import annotations

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
STRATEGIES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def probe_all(world: World, directory: Path, shards: Path, models: Sequence[str]) -> dict[str, Any]:
    return {name: _probe(world, directory / name, shards, name, models) for name in STRATEGIES}


def _probe(
    world: World, directory: Path, shards: Path, strategy: str, models: Sequence[str]
) -> dict[str, Any]:
    chosen = [f"strategy.kind={strategy}"]
    if strategy.startswith("zero"):
        file = ROOT / "ds_configs" / f"{strategy}.json"
        chosen = ["strategy.kind=deepspeed", f"strategy.config={file}"]
    config = tiny_config(
        directory,
        shards,
        *chosen,
        *models,
        "data.num_workers=0",
        "data.microbatches_per_step=4",
        "data.microbatch_tokens=500",
        "performance.prefix_cache=off",  # the prediction is of whole rows
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
            "same": before is None or (after is not None and _equal(before, after)),
            "gradients": sum(p.grad is not None for p in run.model.parameters()),
        }


def _equal(one: TrainableState, other: TrainableState) -> bool:
    kinds = ("weights", "exp_avg", "exp_avg_sq")
    return one.step == other.step and all(
        torch.equal(tensor, getattr(other, kind)[name])
        for kind in kinds
        for name, tensor in getattr(one, kind).items()
    )
