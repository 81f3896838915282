from __future__ import annotations

import math

import torch
from torch import nn

import pytest

from speechllm.config.schema import Optim, Train
from speechllm.optim import build_adamw, learning_rate, phase_of, update, updates_made

TOTAL = 100


def rates(**settings: object) -> list[float]:
    optim = Optim(lr=1.0, warmup_steps=10, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, optim, TOTAL) for step in range(TOTAL)]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_warm_up_starts_above_zero_and_reaches_the_peak(schedule: str) -> None:
    found = rates(schedule=schedule)
    assert found[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert found[10] == pytest.approx(1.0)


def test_constant_stays() -> None:
    assert set(rates(schedule="constant")[9:]) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_decay_nears_the_floor_and_the_last_step_still_moves(schedule: str, floor: float) -> None:
    found = rates(schedule=schedule, min_lr_fraction=floor)
    assert floor < found[-1] < floor + 0.02
    assert found[9:] == sorted(found[9:], reverse=True)


def test_middle_of_the_decay() -> None:
    optim = Optim(lr=2.0, warmup_steps=0, schedule="cosine")
    assert learning_rate(50, optim, 100) == pytest.approx(1.0)
    assert learning_rate(25, optim.model_copy(update={"schedule": "linear"}), 100) == 1.5


def test_a_run_made_of_warm_up_alone_and_steps_beyond_the_end() -> None:
    optim = Optim(lr=1.0, warmup_steps=5, schedule="linear")
    assert [learning_rate(s, optim, 5) for s in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1])
    assert learning_rate(1000, optim, 10) == 0.0


def test_only_matrices_are_decayed() -> None:
    layer = nn.Linear(2, 2)
    optimizer = build_adamw(dict(layer.named_parameters()), Optim(weight_decay=0.5))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {id(layer.weight): 0.5, id(layer.bias): 0.0}


def test_the_rate_of_the_step_is_what_moves_the_weights() -> None:
    layer = nn.Linear(1, 1, bias=False)
    optimizer = build_adamw(dict(layer.named_parameters()), Optim(weight_decay=0.0))
    before = layer.weight.detach().clone()
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step()
    assert (before - layer.weight).item() == pytest.approx(0.25)  # Adam's first step is lr * sign


def test_phases_start_anew_and_cover_the_run() -> None:
    train = Train(steps=10, ctc_steps=4)
    found = [phase_of(step, train) for step in range(10)]
    assert [phase.objective for phase in found] == ["ctc"] * 4 + ["lm"] * 6
    assert [phase.step for phase in found] == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5]
    assert [phase.steps for phase in found] == [4] * 4 + [6] * 6
    assert phase_of(0, Train(steps=10)) == ("lm", 0, 10, 1.0)
    scaled = Train(steps=10, ctc_steps=4, ctc_lr_scale=2.0)
    assert [phase_of(step, scaled).lr_scale for step in (3, 4)] == [2.0, 1.0]


def test_a_gradient_that_is_not_finite_updates_nothing() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = build_adamw({"weight": weight}, Optim())
    assert updates_made(optimizer) == 0
    for norm, updates in ((1.0, 1), (float("nan"), 1), (float("inf"), 1), (2.0, 2)):
        weight.grad = torch.full((2, 2), norm)
        before = weight.detach().clone()
        update(optimizer, lr=0.1, norm=torch.tensor(norm))
        assert torch.equal(weight, before) == (not math.isfinite(norm))
        assert updates_made(optimizer) == updates
        assert all(moment.isfinite().all() for moment in optimizer.state[weight].values())
