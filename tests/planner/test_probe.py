from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch

import pytest
from runs import tiny_config

from speechllm.errors import UserError
from speechllm.planner import probe as module
from speechllm.planner.probe import probe
from speechllm.run import Run, open_run
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


def opened(directory: Path, shards: Path, stack: ExitStack, *overrides: str) -> Run:
    config = tiny_config(directory, shards, "data.num_workers=0", *overrides)
    return open_run(config, ALONE, stack)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_probe_leaves_everything_as_it_was(tmp_path: Path, shards: Path, precision: str) -> None:
    # A CPU's LayerNorm does not take fp16 with weights in bf16.
    overrides = [f"precision={precision}", "model.frozen_dtype=fp32", "data.microbatch_tokens=128"]
    with ExitStack() as stack:
        run = opened(tmp_path, shards, stack, *overrides)
        before, random = run.strategy.full_state(), torch.get_rng_state()
        found = probe(run)
        after = run.strategy.full_state()
        assert before is not None
        assert after is not None
        assert torch.equal(random, torch.get_rng_state())
        assert all(p.grad is None for p in run.model.parameters())
        assert (after.step, after.loss_scale) == (before.step, before.loss_scale)
        for kind in ("weights", "exp_avg", "exp_avg_sq"):
            old, new = getattr(before, kind), getattr(after, kind)
            assert all(torch.equal(old[name], new[name]) for name in old)
        assert found.shape.positions <= 128 * 1.2
        assert 1e6 < found.peak < found.available


def test_too_little_memory_ends_the_run_with_the_remedy(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_available", lambda run, standing: 1_000_000)
    with ExitStack() as stack:
        run = opened(tmp_path, shards, stack)
        with pytest.raises(UserError, match=r"data\.microbatch_tokens.*activation_checkpointing"):
            probe(run)


def test_memory_that_runs_out_ends_the_run_with_the_remedy(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(run: Run, batch: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(module, "_step", out_of_memory)
    with ExitStack() as stack:
        run = opened(tmp_path, shards, stack)
        with pytest.raises(UserError, match=r"ran out.*positions.*microbatch_tokens.*3 GiB"):
            probe(run)
