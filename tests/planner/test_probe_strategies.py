"""A probe on two ranks under every strategy, and of other steps than the usual one under ddp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from forked_function import on_ranks
from planner.probe_worker import CASES, probe_all

from speechllm.model.tiny import build_tiny_llm

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> list[dict[str, Any]]:
    directory = tmp_path_factory.mktemp("probes")
    llm = build_tiny_llm(directory / "llm", kind="olmo2", hidden=256, layers=2, heads=8)
    models = [f"model.llm.id={llm}", "model.connector.hidden_size=256"]
    return on_ranks(
        2, directory, lambda world: probe_all(world, directory, shards, models), patience=300
    )


@pytest.mark.parametrize("case", CASES)
def test_a_probe_leaves_everything_as_it_was(found: list[Any], case: str) -> None:
    for rank in found:
        assert rank[case]["same"]
        assert rank[case]["gradients"] == 0


@pytest.mark.parametrize("case", CASES)
def test_all_ranks_ran_the_same_and_found_the_same(found: list[Any], case: str) -> None:
    one, other = found
    assert one[case]["positions"] == other[case]["positions"] > 0
    assert (one[case]["prefix"] > 0) == (case not in ("whole rows", "plain"))
    assert one[case]["peak"] == other[case]["peak"] > 1e6


@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_what_was_predicted(found: list[Any], case: str) -> None:
    for rank in found:
        assert rank[case]["predicted"] == pytest.approx(rank[case]["peak"], rel=0.15)
