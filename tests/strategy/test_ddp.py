from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import pytest
from runs import TINY, tiny_config

from speechllm.config.load import load_config
from speechllm.strategy.base import TrainableState
from speechllm.strategy.build import build_strategy
from speechllm.strategy.ddp import DDPStrategy
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))
CONFIG = load_config(TINY, ["optim.max_grad_norm=0.5", "precision=fp32"])


class Small(nn.Module):
    """Two trainable tensors and a frozen one, with the face that a strategy needs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.frozen = nn.Linear(2, 2).requires_grad_(False)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return dict(sorted((n, p) for n, p in self.named_parameters() if p.requires_grad))

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(self.layer(x)).square().sum()


@pytest.fixture
def strategy() -> DDPStrategy:
    return DDPStrategy(Small(), CONFIG, ALONE)  # type: ignore[arg-type]


def steps(strategy: DDPStrategy, count: int) -> list[float]:
    norms = []
    for i in range(count):
        with strategy.microbatch(last=True):
            strategy.backward(strategy.model(torch.ones(4, 3) * (i + 1)))
        norms.append(float(strategy.step(1e-2)))
    return norms


def test_state_goes_out_and_in_and_training_goes_on_as_if_nothing_had_been(
    strategy: DDPStrategy,
) -> None:
    steps(strategy, 3)
    saved = strategy.full_state()
    assert saved is not None
    assert saved.step == 3
    assert saved.weights.keys() == {"layer.weight", "layer.bias"}
    assert all(t.dtype == torch.float32 for t in saved.weights.values())
    steps(strategy, 2)
    whole = strategy.full_state()
    other = DDPStrategy(Small(), CONFIG, ALONE)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in other.parameters.values():
            parameter.zero_()
    other.load_full_state(saved)
    steps(other, 2)
    resumed = other.full_state()
    assert whole is not None
    assert resumed is not None
    for part in ("weights", "exp_avg", "exp_avg_sq"):
        for name, tensor in getattr(whole, part).items():
            assert torch.equal(getattr(resumed, part)[name], tensor)
    assert resumed.step == whole.step == 5


def test_a_saved_state_does_not_change_with_further_steps(strategy: DDPStrategy) -> None:
    saved = strategy.full_state()
    assert saved is not None
    before = saved.weights["layer.weight"].clone()
    steps(strategy, 2)
    assert torch.equal(saved.weights["layer.weight"], before)


def test_clipping_bounds_the_step_and_the_norm_is_the_one_before(strategy: DDPStrategy) -> None:
    (norm,) = steps(strategy, 1)
    assert norm > 0.5
    moment = strategy.optimizer.state[strategy.parameters["layer.weight"]]["exp_avg"]
    assert float(moment.norm()) <= 0.5 * (1 - 0.9) + 1e-6


def test_a_gradient_that_is_not_finite_moves_nothing(strategy: DDPStrategy) -> None:
    steps(strategy, 1)
    before = strategy.full_state()
    strategy.backward(strategy.model(torch.full((1, 3), float("inf"))))
    assert not strategy.step(1e-2) < float("inf")
    after = strategy.full_state()
    assert before is not None
    assert after is not None
    assert after.step == before.step == 1
    assert torch.equal(after.weights["layer.weight"], before.weights["layer.weight"])
    assert strategy.parameters["layer.weight"].grad is None


def test_fp16_scales_the_loss_and_not_the_update(strategy: DDPStrategy) -> None:
    config = load_config(TINY, ["optim.max_grad_norm=0.5", "precision=fp16"])
    scaled = DDPStrategy(Small(), config, ALONE)  # type: ignore[arg-type]
    start = scaled.loss_scale.value
    assert steps(scaled, 3) == pytest.approx(steps(strategy, 3), rel=1e-5)
    expected, found = strategy.full_state(), scaled.full_state()
    assert expected is not None
    assert found is not None
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight)
    scaled.backward(scaled.model(torch.full((1, 3), float("inf"))))
    scaled.step(1e-2)
    resumed = DDPStrategy(Small(), config, ALONE)  # type: ignore[arg-type]
    after = scaled.full_state()
    resumed.load_full_state(after)
    assert after is not None
    assert after.step == 3
    assert resumed.loss_scale.value == scaled.loss_scale.value == start / 2


def test_frozen_parts_have_no_state(tmp_path: Path, shards: Path) -> None:
    from speechllm.prepare import prepare_model

    config = tiny_config(tmp_path, shards)
    model = prepare_model(config, ALONE.device)
    state = build_strategy(config, model, ALONE).full_state()
    assert isinstance(state, TrainableState)
    assert all(name.startswith("connector.") for name in state.weights)
