"""One run directory, continued by the same command under other strategies and numbers of ranks."""

from __future__ import annotations

from pathlib import Path

import torch

from safetensors.torch import load_file

import pytest
from forked_ranks import Ranks
from runs import ROOT, TINY, metrics

from speechllm.checkpoint import find_checkpoint
from speechllm.cli import main


def command(run_dir: Path, shards: Path, steps: int, *overrides: str) -> list[str]:
    settings = ["data.num_workers=0", "optim.schedule=constant", "data.microbatch_tokens=120"]
    settings += ["optim.max_grad_norm=0.05", "collective_timeout=60", f"train.steps={steps}"]
    return ["train", TINY, *settings, f"data.train={shards}", f"run_dir={run_dir}", *overrides]


@pytest.mark.distributed
def test_two_ranks_one_rank_and_two_ranks_continue_one_run(tmp_path: Path, shards: Path) -> None:
    pytest.importorskip("deepspeed")  # once, before the fork
    zero3 = ("strategy.kind=deepspeed", f"strategy.config={ROOT}/ds_configs/zero3.json")
    chain = [((0, 1), ("strategy.kind=ddp",)), ((0,), ("strategy.kind=fsdp2",)), ((0, 1), zero3)]
    for number, (ranks, strategy) in enumerate(chain, 1):
        part = command(tmp_path / "run", shards, 3 * number, *strategy)
        ended = Ranks(tmp_path / str(number), part, launchers=[ranks]).wait()
        assert ended.codes == [0] * len(ranks), ended.logs
        assert ("resuming after step" in ended.logs[0]) == (number > 1)
    assert main(command(tmp_path / "whole", shards, 9)) == 0
    found, expected = metrics(tmp_path / "run"), metrics(tmp_path / "whole")
    assert [x["step"] for x in found] == list(range(1, 10))
    assert [x["loss"] for x in found] == pytest.approx([x["loss"] for x in expected], abs=1e-5)
    norms = [x["grad_norm"] for x in expected]
    assert [x["grad_norm"] for x in found] == pytest.approx(norms, rel=1e-5)
    weights, wanted = (
        load_file(find_checkpoint(tmp_path / run, prefer="last") / "trainable.safetensors")
        for run in ("run", "whole")
    )
    for name, weight in wanted.items():
        torch.testing.assert_close(weights[name], weight, atol=2e-4, rtol=0)
