from __future__ import annotations

import torch

import pytest
from runs import TINY

import speechllm.planner.room
from speechllm.config.load import load_config
from speechllm.planner.advice import GIB, Machine
from speechllm.planner.room import available_bytes, machine_of_rank, needs_checkpointing
from speechllm.planner.workload import assumed

CPU = torch.device("cpu")


def test_activations_that_do_not_fit_are_computed_again() -> None:
    config = load_config(TINY, [])
    for memory, needed in ((10 * GIB, False), (20_000_000, True)):
        machine = Machine(1, memory, on_cpu=True)
        assert needs_checkpointing(config, machine, assumed(config)) == needed


def test_an_architecture_that_cannot_be_estimated_is_no_obstacle(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unknown(model: object) -> None:
        raise AttributeError("no num_attention_heads")

    monkeypatch.setattr(speechllm.planner.room, "read_architecture", unknown)
    config = load_config(TINY, [])
    with caplog.at_level("INFO", logger="speechllm"):
        assert not needs_checkpointing(config, Machine(1, 1, on_cpu=True), assumed(config))
    assert "no num_attention_heads" in caplog.text


def test_ranks_of_a_host_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speechllm.planner.room, "available_bytes", lambda: 8 * GIB)
    assert machine_of_rank(2, CPU).memory == 8 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert machine_of_rank(4, CPU) == Machine(4, 4 * GIB, on_cpu=True)


def test_the_file_cache_counts_as_available() -> None:
    assert available_bytes() > 100_000_000
