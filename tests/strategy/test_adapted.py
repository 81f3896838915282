"""What trains besides the connector, under every strategy: the same training as under DDP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import pytest
from forked_function import on_ranks
from runs import ROOT, TINY
from speech_models import asr, batch_of, noise

from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.data.plan import rank_share
from speechllm.errors import ConfigError
from speechllm.prepare import prepare_model
from speechllm.step import agree, run_step
from speechllm.strategy.base import Strategy, TrainableState
from speechllm.strategy.build import build_strategy
from speechllm.types import Batch, Microbatch, StepData
from speechllm.world import World

pytestmark = pytest.mark.distributed

MICROBATCHES = 4
STEPS = 3
STRATEGIES = {
    "zero2": ["strategy.kind=deepspeed", f"strategy.config={ROOT}/ds_configs/zero2.json"],
    "zero3": ["strategy.kind=deepspeed", f"strategy.config={ROOT}/ds_configs/zero3.json"],
    "fsdp2": ["strategy.kind=fsdp2"],
}
LORA = ["model.lora.rank=4", "model.lora.targets=all-linear", "model.lora.dropout=0.2"]
UNFROZEN = ["model.unfreeze_encoder_layers=1"]
CASES = {  # what adapts: under which strategies
    ("train.ctc_steps=1", *LORA): ["zero2", "zero3", "fsdp2"],
    ("train.activation_checkpointing=true", *LORA, *UNFROZEN): list(STRATEGIES),
}


class Trained(NamedTuple):
    losses: list[float]
    norms: list[float]
    state: TrainableState | None  # on rank 0


def config_of(*overrides: str) -> Config:
    options = ["precision=fp32", "optim.max_grad_norm=0.5", "model.connector.hidden_size=32"]
    return load_config(TINY, [*options, *overrides])


def train(config: Config, world: World, steps: Sequence[int] = range(STEPS)) -> Trained:
    ctc_steps = config.train.ctc_steps
    model = prepare_model(config, world.device, ctc=ctc_steps > 0, sharded=True, training=True)
    strategy: Strategy = build_strategy(config, model, world)
    losses, norms = [], []
    for step in steps:
        data = StepData(0, step, [
            Microbatch(number, float(not is_repeat), _batch(config, step, number), 2, 1.0)
            for number, is_repeat in rank_share(MICROBATCHES, world.rank, world.size)
        ])  # fmt: skip
        totals = agree(data, world, stop=False)
        done = run_step(
            strategy, data, totals, objective="ctc" if step < ctc_steps else "lm", lr=1e-3, seed=1,
            step=step, device=world.device,
        )  # fmt: skip
        losses.append(world.sum([float(done.loss)])[0] / totals.target_tokens)
        norms.append(float(done.grad_norm))
    return Trained(losses, norms, strategy.full_state())


def _batch(config: Config, step: int, number: int) -> Batch:
    seed = MICROBATCHES * step + number
    rows = range(seed, seed + 2)
    targets = [tuple(range(10, 12 + row % 5)) for row in rows]
    audios = [noise(2_000 + 900 * (row % 4), seed=seed) for row in rows]
    return batch_of(config.model, list(map(asr, audios, targets)))


def test_every_strategy_trains_as_ddp_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("deepspeed")
    monkeypatch.setattr("forked_function.PATIENCE", 300.0)  # 9 runs, some with CTC before

    def rank(world: World) -> None:
        for adapted, strategies in CASES.items():
            expected = train(config_of(*adapted), world)
            for name in strategies:
                found = train(config_of(*adapted, *STRATEGIES[name]), world)
                assert_equal(found, expected, f"{name}, {adapted[0]}")

    on_ranks(2, tmp_path, rank, patience=300)


def test_in_bf16_gradients_are_those_of_ddp_up_to_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights cannot say so: Adam makes a whole learning rate of a gradient near 0 that rounds
    otherwise. Nothing is clipped, so moments are sums of gradients."""
    pytest.importorskip("deepspeed")
    monkeypatch.setattr("forked_function.PATIENCE", 300.0)
    adapted = [*LORA, *UNFROZEN, "precision=bf16", "train.activation_checkpointing=true"]
    # Stage 3's linear layers round before they add the bias, and its hooks change the order in
    # which autograd adds up gradients; the others run the very operations of DDP.
    apart = {"zero2": 1e-6, "fsdp2": 1e-6, "zero3": 3e-2}

    def rank(world: World) -> None:
        config = config_of(*adapted, "optim.max_grad_norm=1e9")
        expected = train(config, world, range(2))
        for name, most in apart.items():
            options = [*adapted, "optim.max_grad_norm=1e9", *STRATEGIES[name]]
            found = train(config_of(*options), world, range(2))
            assert found.losses == pytest.approx(expected.losses, abs=1e-2), name
            if found.state is not None and expected.state is not None:
                assert distance(found.state.exp_avg, expected.state.exp_avg) < most, name

    on_ranks(2, tmp_path, rank, patience=300)


def distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Of all tensors together, in parts of their norm."""
    apart = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    return (apart / sum(float(tensor.square().sum()) for tensor in expected.values())) ** 0.5


def assert_equal(found: Trained, expected: Trained, where: str) -> None:
    assert found.losses == pytest.approx(expected.losses, abs=1e-5), where
    assert found.norms == pytest.approx(expected.norms, rel=1e-5), where
    assert (found.state is None) == (expected.state is None)
    if found.state is None or expected.state is None:
        return
    assert found.state.weights.keys() == expected.state.weights.keys()
    for name, weight in expected.state.weights.items():
        assert torch.allclose(found.state.weights[name], weight, rtol=0, atol=2e-4), (where, name)


def test_what_cannot_be_compiled_is_refused() -> None:
    config = config_of(*STRATEGIES["zero3"], "train.compile=true")
    with pytest.raises(ConfigError, match=r"train\.compile .*stage 3.* strategy\.kind=fsdp2"):
        prepare_model(config, torch.device("cpu"), sharded=True, training=True)
