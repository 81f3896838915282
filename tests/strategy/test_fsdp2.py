"""FSDP2 against DDP and against one process, on forked ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import pytest
from forked_function import on_ranks
from runs import TINY
from speech_models import END, PAD, asr, batch_of, noise

from speechllm.config.load import load_config
from speechllm.config.schema import Config
from speechllm.data.plan import rank_share
from speechllm.errors import CheckpointError
from speechllm.generate import generate
from speechllm.model.layers import transformer_layers
from speechllm.prepare import prepare_model
from speechllm.step import agree, run_step
from speechllm.strategy.base import Strategy, TrainableState
from speechllm.strategy.build import build_strategy
from speechllm.types import Batch, Microbatch, Objective, StepData
from speechllm.world import World

pytestmark = pytest.mark.distributed

ALONE = World(0, 1, 0, torch.device("cpu"))
MICROBATCHES = 4  # of a step: two a rank where there are two; of three, some repeat one
Losses = list[tuple[float, float]]  # (loss, gradient norm) of each step


def config_of(kind: str, *overrides: str) -> Config:
    options = ["precision=fp32", "optim.max_grad_norm=0.2", "model.connector.hidden_size=36"]
    return load_config(TINY, [*options, f"strategy.kind={kind}", *overrides])


def build(config: Config, world: World) -> Strategy:
    ctc = config.train.ctc_steps > 0
    model = prepare_model(config, world.device, ctc=ctc, sharded=True)
    return build_strategy(config, model, world)


def batch(config: Config, seed: int, *, with_target: bool = True) -> Batch:
    """Two utterances with targets of different lengths."""
    targets = [range(10, 13 + (seed + i) % 5) if with_target else () for i in range(2)]
    lengths = [2_000 + 700 * ((seed + i) % 4) for i in range(2)]
    examples = [
        asr(noise(length, seed=seed), tuple(target))
        for length, target in zip(lengths, targets, strict=True)
    ]
    return batch_of(config.model, examples, pad_left=not with_target)


def train(
    strategy: Strategy,
    config: Config,
    world: World,
    steps: Sequence[int],
    objective: Objective = "lm",
) -> Losses:
    result = []
    for step in steps:
        share = rank_share(MICROBATCHES, world.rank, world.size)
        data = StepData(0, step, [
            Microbatch(i, float(not is_repeat), batch(config, MICROBATCHES * step + i), 2, 1)
            for i, is_repeat in share
        ])  # fmt: skip
        totals = agree(data, world, stop=False)
        done = run_step(
            strategy, data, totals, objective=objective, lr=1e-3, seed=1, step=step,
            device=world.device,
        )  # fmt: skip
        loss = world.sum([float(done.loss)])[0] / totals.target_tokens
        result.append((loss, float(done.grad_norm)))
    return result


@lru_cache
def single_process(
    steps: range, *overrides: str, objective: Objective = "lm"
) -> tuple[Losses, TrainableState]:
    config = config_of("ddp", *overrides)
    strategy = build(config, ALONE)
    losses = train(strategy, config, ALONE, steps, objective)
    state = strategy.full_state()
    assert state is not None
    return losses, state


def assert_close(
    found: Losses, expected: Losses, *, loss: float = 1e-5, norm: float = 1e-5
) -> None:
    for (found_loss, found_norm), (expected_loss, expected_norm) in zip(
        found, expected, strict=True
    ):
        assert abs(found_loss - expected_loss) <= loss
        assert abs(found_norm / expected_norm - 1) <= norm


def assert_same_state(
    found: TrainableState | None, expected: TrainableState, *, tolerance: float = 2e-4
) -> None:
    assert found is not None
    assert found.step == expected.step
    for part in ("weights", "exp_avg", "exp_avg_sq"):
        ours, theirs = getattr(found, part), getattr(expected, part)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert ours[name].dtype == torch.float32
            assert torch.allclose(ours[name], tensor, rtol=0, atol=tolerance), f"{part} of {name}"


# Three ranks divide neither 260 tokens nor 64 rows evenly, and the last gets no row of some.
@pytest.mark.parametrize(
    ("ranks", "llm", "reshard"),
    [(3, "llama", True), (2, "qwen2", True), (2, "olmo2", False), (1, "qwen2", True)],
)
def test_training_is_that_of_one_process(
    tmp_path: Path, ranks: int, llm: str, reshard: bool
) -> None:
    model = f"model.llm.id=random:{llm}"
    expected, expected_state = single_process(range(4), model)
    assert all(norm > 0.2 for _, norm in expected), "clipping must be at work"

    def rank(world: World) -> None:
        config = config_of("fsdp2", model, f"strategy.reshard_after_forward={reshard}")
        strategy = build(config, world)
        assert_close(train(strategy, config, world, range(4)), expected)
        state = strategy.full_state()
        assert (state is not None) == world.is_main
        if world.is_main:
            assert_same_state(state, expected_state)

    on_ranks(ranks, tmp_path, rank)


@pytest.mark.parametrize(
    ("overrides", "objective"),
    [
        (["train.ctc_steps=9", "model.connector.downsampling_factor=1"], "ctc"),
        (["model.encoder.kind=fbank", "model.encoder.hidden_size=33"], "lm"),
    ],
    ids=["ctc", "fbank"],
)
def test_other_objectives_and_encoders(
    tmp_path: Path, overrides: list[str], objective: Objective
) -> None:
    expected, expected_state = single_process(range(3), *overrides, objective=objective)

    def rank(world: World) -> None:
        config = config_of("fsdp2", *overrides)
        strategy = build(config, world)
        assert_close(train(strategy, config, world, range(3), objective), expected)
        state = strategy.full_state()
        if world.is_main:
            assert_same_state(state, expected_state)

    on_ranks(2, tmp_path, rank)


def test_bf16_is_as_near_as_bf16_can_be(tmp_path: Path) -> None:
    expected, _ = single_process(range(4))

    def rank(world: World) -> None:
        config = config_of("fsdp2", "precision=bf16")
        strategy = build(config, world)
        assert_close(train(strategy, config, world, range(4)), expected, loss=1e-2, norm=0.05)
        dtypes = {p.requires_grad: p.dtype for p in strategy.model.parameters()}
        assert dtypes == {True: torch.float32, False: torch.bfloat16}

    on_ranks(2, tmp_path, rank)


@pytest.mark.parametrize("llm", ["llama", "qwen2"])
def test_the_model_is_that_of_ddp_to_the_last_bit(tmp_path: Path, llm: str) -> None:
    options = (f"model.llm.id=random:{llm}", "precision=bf16")
    torch.manual_seed(5)
    whole = prepare_model(config_of("ddp", *options), ALONE.device)
    drawn = torch.rand(2)

    def rank(world: World) -> None:
        torch.manual_seed(5)
        model: Any = build(config_of("fsdp2", *options), world).model
        assert torch.equal(torch.rand(2), drawn), "the caller's random state was touched"
        assert model.llm.config._attn_implementation == whole.llm.config._attn_implementation
        parameters = dict(model.named_parameters())
        assert parameters.keys() == dict(whole.named_parameters()).keys()
        for name, parameter in whole.named_parameters():
            assert torch.equal(parameters[name].full_tensor(), parameter), name
            assert parameters[name].requires_grad == parameter.requires_grad
        buffers = dict(model.named_buffers())
        for name, buffer in whole.named_buffers():
            assert torch.equal(buffers[name], buffer), name
            assert buffers[name].dtype == buffer.dtype

    on_ranks(2, tmp_path, rank)


@pytest.mark.parametrize(("first", "second"), [("fsdp2", "ddp"), ("ddp", "fsdp2")])
def test_a_state_is_continued_under_the_other_strategy(
    tmp_path: Path, first: str, second: str
) -> None:
    expected, expected_state = single_process(range(4))

    def rank(world: World) -> None:
        config = config_of(first)
        strategy = build(config, world)
        train(strategy, config, world, range(2))
        state = strategy.full_state()
        config = config_of(second, "seed=8")  # other weights, all to be replaced
        strategy = build(config, world)
        train(strategy, config, world, range(7, 8))
        strategy.load_full_state(state)
        assert_close(train(strategy, config, world, range(2, 4)), expected[2:])
        state = strategy.full_state()
        if world.is_main:
            assert_same_state(state, expected_state)

    on_ranks(2, tmp_path, rank)


def test_a_gradient_that_is_not_finite_moves_nothing_but_the_loss_scale(tmp_path: Path) -> None:
    def rank(world: World) -> None:
        config = config_of("fsdp2", "precision=fp16")
        strategy: Any = build(config, world)
        losses = train(strategy, config, world, range(2))
        before = strategy.full_state()
        scale = strategy.loss_scale.value
        sums = strategy.model(batch(config, world.rank))
        # On one rank only; the norm is that of all, so none of them makes the update.
        strategy.backward(sums.loss * (float("inf") if world.rank else 1.0))
        assert not strategy.step(1e-3) < float("inf")
        assert strategy.loss_scale.value == scale / 2
        after = strategy.full_state()
        if world.is_main:
            assert after.step == before.step == 2
            assert_same_state(after, before, tolerance=0.0)
        assert all(p.grad is None for p in strategy.parameters.values())
        assert train(strategy, config, world, range(2, 3))[0][0] < losses[0][0]

    on_ranks(2, tmp_path, rank)


@pytest.mark.parametrize(("llm", "beams"), [("llama", 1), ("qwen2", 2)])
def test_decoding_is_that_of_ddp_though_one_rank_ends_long_before_the_other(
    tmp_path: Path, llm: str, beams: int
) -> None:
    model_id = f"model.llm.id=random:{llm}"

    def decode(model: Any, config: Config, rank: int, end: int) -> list[list[int]]:
        prompts = batch(config, 3 + rank, with_target=False)
        return generate(
            model, prompts, max_new_tokens=3 + 9 * rank, num_beams=beams,
            length_penalty=1.0,  # 0 lets random weights end at once, and nothing is compared
            end_token_ids=(END, end), pad_id=PAD,
        )  # fmt: skip

    config = config_of("ddp", model_id)
    strategy = build(config, ALONE)
    end = decode(strategy.model, config, 1, END)[0][7]  # ends one row of rank 1 before the other
    expected = [decode(strategy.model, config, rank, end) for rank in range(2)]
    assert max(map(len, expected[0])) <= 3 < max(map(len, expected[1]))
    after, _ = single_process(range(1), model_id)

    def rank(world: World) -> list[list[int]]:
        config = config_of("fsdp2", model_id, "seed=8")
        strategy: Any = build(config, world)
        decode(strategy.model, config, world.rank, end)
        # Decoding leaves weights gathered; those that are loaded must be used all the same.
        strategy.load_full_state(build(config_of("ddp", model_id), world).full_state())
        rows = decode(strategy.model, config, world.rank, end)
        assert_close(train(strategy, config, world, range(1)), after)
        return rows

    assert on_ranks(2, tmp_path, rank) == expected


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
def test_a_state_that_does_not_fit_is_refused_by_every_rank(tmp_path: Path, kind: str) -> None:
    def rank(world: World) -> None:
        strategy = build(config_of(kind), world)
        state = strategy.full_state()
        if state is not None:
            name = next(iter(state.weights))
            state.weights[name] = torch.zeros(1)
            state.weights["connector.other"] = torch.zeros(2)
        with pytest.raises(CheckpointError, match=r"connector\.other: in the checkpoint"):
            strategy.load_full_state(state)
        world.barrier()

    on_ranks(2, tmp_path, rank)


@pytest.mark.parametrize("unfrozen", [0, 1])
def test_the_backward_gathers_no_layer_that_has_none(tmp_path: Path, unfrozen: int) -> None:
    def rank(world: World) -> None:
        config = config_of("fsdp2", f"model.unfreeze_encoder_layers={unfrozen}")
        strategy = build(config, world)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            train(strategy, config, world, range(2))
        called = {e.name.partition("FSDP::backward_prefetch for ")[2] for e in profiler.events()}
        assert any("llm." in name for name in called)
        layers = transformer_layers(strategy.model.encoder)
        assert len(layers) > 1
        fetched = [name for name in called if "encoder." in name]
        # The trained layer is fetched by the LLM's first one, and itself fetches nothing below.
        assert len({name.rpartition(".")[2] for name in fetched}) == unfrozen

    on_ranks(1, tmp_path, rank)


def test_a_rank_holds_its_rows_and_no_more(tmp_path: Path) -> None:
    def nbytes(tensors: Sequence[Tensor]) -> int:
        return sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
        )

    def rank(world: World) -> None:
        config = config_of("fsdp2")
        strategy: Any = build(config, world)
        train(strategy, config, world, range(1))
        whole = prepare_model(config, world.device)
        held = [p.to_local() for p in strategy.model.parameters()]
        for state in strategy.optimizer.state.values():
            held += [state["exp_avg"].to_local(), state["exp_avg_sq"].to_local()]
        wanted = [*whole.parameters(), *(2 * [*whole.trainable_parameters().values()])]
        total = sum(p.numel() * p.element_size() for p in wanted)
        assert nbytes(held) <= total / world.size * 1.02

    on_ranks(2, tmp_path, rank)
