"""Every strategy is the same training: curves, weights, resumption and decoding compared with one
process in fp32, and the comparison itself tried on planted faults."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from safetensors.torch import load_file

import pytest
from forked_function import on_ranks
from strategy.matrix_worker import (
    ADAPTED_STEPS,
    CONTINUED,
    CUT,
    MAX_GRAD_NORM,
    STEPS,
    STRATEGIES,
    run_matrix,
)

pytestmark = pytest.mark.distributed


class Tolerance(NamedTuple):
    """loss: absolute, nats a token. norm: relative. weights: absolute; None where they are not
    compared, as bf16 moves Adam's first steps by a whole lr."""

    loss: float
    norm: float
    weights: float | None


TOLERANCES = {"fp32": Tolerance(1e-5, 1e-5, 2e-4), "bf16": Tolerance(1e-2, 5e-2, None)}


class Results:
    def __init__(self, curves: dict[str, Any], directory: Path) -> None:
        self.curves = curves
        self.directory = directory

    def weights(self, case: str) -> dict[str, Tensor]:
        return load_file(self.directory / f"{case.replace('/', '_')}.safetensors")

    def differences(self, case: str, expected: str, *, first: int = 0) -> Tolerance:
        """The largest of each; the case begins at step `first` of the expected curve."""
        found, wanted = self.curves[case], self.curves[expected]
        count = len(found["losses"])
        assert count > 0
        losses, norms = (wanted[k][first : first + count] for k in ("losses", "norms"))
        assert len(losses) == count
        left, right = self.weights(case), self.weights(expected)
        assert left.keys() == right.keys()
        return Tolerance(
            max(abs(a - b) for a, b in zip(found["losses"], losses, strict=True)),
            max(abs(a - b) / b for a, b in zip(found["norms"], norms, strict=True)),
            max(float((left[name] - right[name]).abs().max()) for name in left),
        )


def within(found: Tolerance, allowed: Tolerance) -> bool:
    pairs = zip(found, allowed, strict=True)
    return all(most is None or (value is not None and value <= most) for value, most in pairs)


@pytest.fixture(scope="module")
def results(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    pytest.importorskip("deepspeed")  # once, before the fork
    directory = tmp_path_factory.mktemp("matrix")
    curves, _ = on_ranks(
        2, directory, lambda world: run_matrix(world, shards, directory), patience=600
    )
    return Results(curves, directory)


@pytest.mark.parametrize("per_rank", [1, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_strategy_trains_as_one_process(
    results: Results, strategy: str, precision: str, per_rank: int
) -> None:
    found = results.differences(f"{strategy}/{precision}/{per_rank}", f"alone/{per_rank}/{STEPS}")
    assert within(found, TOLERANCES[precision]), found


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_lora_and_unfrozen_layers_train_as_in_one_process(
    results: Results, strategy: str, precision: str
) -> None:
    expected = f"adapted/alone/1/{ADAPTED_STEPS}"
    names = results.weights(expected).keys()
    assert {name.split(".")[0] for name in names} == {"connector", "encoder", "llm"}
    found = results.differences(f"adapted/{strategy}/{precision}/1", expected)
    assert within(found, TOLERANCES[precision]), found


def test_the_matrix_has_clipping_and_targets_of_different_lengths(results: Results) -> None:
    for per_rank in (1, 3):
        curve = results.curves[f"alone/{per_rank}/{STEPS}"]
        assert min(curve["norms"]) > MAX_GRAD_NORM
        assert len(set(curve["losses"])) == STEPS
    assert results.curves["target_tokens"][0] != results.curves["target_tokens"][1]


@pytest.mark.parametrize("fault", ["mean_of_means", "skipped_sync", "phantom_step"])
def test_a_planted_fault_is_found(results: Results, fault: str) -> None:
    found = results.differences(f"fault/{fault}", f"alone/3/{STEPS}")
    assert not within(found, TOLERANCES["fp32"]), found


@pytest.mark.parametrize(("before", "after"), list(itertools.product(STRATEGIES, STRATEGIES)))
def test_a_strategy_goes_on_where_another_stopped(
    results: Results, before: str, after: str
) -> None:
    found = results.differences(f"{before}-{after}", f"alone/1/{CUT + CONTINUED}", first=CUT)
    assert within(found, TOLERANCES["fp32"]), found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_decoding_is_the_same_with_outputs_of_unequal_lengths(
    results: Results, strategy: str
) -> None:
    short, long = results.curves["generate/ddp"]
    assert results.curves[f"generate/{strategy}"] == [short, long]
    assert len(short) == len(long) == 5
    assert max(len(text) for _, text in short) < min(len(text) for _, text in long)
