from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

import pytest
from waiting import has_ended, wait_until

from speechllm.errors import ConfigError
from speechllm.world import World, connected, read_environment

SCRIPT = """
import json, os, sys, time
from speechllm.world import connected
with connected("cpu") as world:
    mine = {"rank": world.rank, "text": "ž" * (world.rank + 1)}
    answer = [world.sum([world.rank, 0.5]), world.gather(mine), world.from_main(world.rank + 7)]
    world.barrier()
    open(f"{sys.argv[1]}/{world.rank}", "w").write(json.dumps([*answer, os.getpid()]) + "\\n")
    while True:
        world.barrier()
        time.sleep(0.1)
"""


def test_alone_without_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert read_environment() == (0, 1, 0)
    with connected("cpu") as world:
        assert world == World(0, 1, 0, torch.device("cpu"))
        assert world.sum([1, 2.5]) == [1.0, 2.5]
        assert world.gather({"a": 1}) == [{"a": 1}]
        assert world.from_main("x") == "x"
        world.barrier()


def test_launcher_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert read_environment() == (3, 8, 1)
    monkeypatch.delenv("LOCAL_RANK")
    assert read_environment() == (3, 8, 3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="device=cpu"), connected("cuda"):
        pass


@pytest.mark.distributed
def test_collectives_of_two_processes_which_end_with_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]  # fmt: skip
    rows = [{"rank": 0, "text": "ž"}, {"rank": 1, "text": "žž"}]
    answers = [tmp_path / str(rank) for rank in range(2)]
    with subprocess.Popen([*launcher, str(script), str(tmp_path)]) as torchrun:
        try:
            wait_until(lambda: all(a.is_file() and "\n" in a.read_text() for a in answers))
        finally:
            torchrun.kill()
    for answer in answers:
        *found, process = json.loads(answer.read_text())
        assert found == [[1.0, 1.0], rows, 7]
        wait_until(lambda process=process: has_ended(process))
