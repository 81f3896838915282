from __future__ import annotations

from pathlib import Path

import torch

import pytest
from runs import tiny_config

from speechllm.data.loader import read_batches
from speechllm.errors import DataError
from speechllm.prepare import open_split, prepare_model, prepare_text
from speechllm.step import agree, dropout_seed, refuse_too_many_bad, run_step
from speechllm.strategy.build import build_strategy
from speechllm.types import BadUtterance, Microbatch, StepData
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


def cuts(tmp_path: Path, shards: Path, microbatches: list[list[int]]) -> tuple[float, float, dict]:
    """Loss sum, gradient norm and weights after one step over the same utterances, cut so."""
    config = tiny_config(tmp_path, shards, "model.connector.dropout=0", "optim.max_grad_norm=0.01")
    text = prepare_text(config)
    split = open_split(config, config.data.train, text, key="data.train", budget=4096)
    model = prepare_model(config, ALONE.device)
    strategy = build_strategy(config, model, ALONE)
    batches = list(
        read_batches(
            split.store, text.prompter, text.audio_tokens, text.pad_id,
            [torch.tensor(m).numpy() for m in microbatches],
            with_target=True, pad_left=False, num_workers=0, prefetch=1,
        )
    )  # fmt: skip
    data = StepData(0, 0, batches)
    totals = agree(data, ALONE, stop=False)
    result = run_step(
        strategy, data, totals, objective="lm", lr=1e-3, seed=1, step=0, device=ALONE.device
    )
    weights = {n: p.detach().clone() for n, p in model.trainable_parameters().items()}
    return float(result.loss) / totals.target_tokens, float(result.grad_norm), weights


def test_the_cut_into_microbatches_changes_nothing(tmp_path: Path, shards: Path) -> None:
    """Unequal microbatches too: the loss is a mean over tokens, not over microbatches."""
    loss, norm, weights = cuts(tmp_path, shards, [[0, 1, 2, 3, 4, 5, 6, 7]])
    assert norm > 0.01, "the test wants clipping to be active"
    for cut in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[5], [0, 7, 2], [1, 3, 4, 6]]):
        other_loss, other_norm, other_weights = cuts(tmp_path, shards, cut)
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert other_norm == pytest.approx(norm, rel=1e-5)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, atol=2e-4, rtol=0)


def test_dropout_seed_is_a_function_of_seed_step_and_microbatch() -> None:
    seeds = {dropout_seed(s, t, m) for s in range(3) for t in range(20) for m in range(8)}
    assert len(seeds) == 3 * 20 * 8
    assert dropout_seed(1, 2, 3) == dropout_seed(1, 2, 3)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_bad_fraction_is_of_the_epoch_and_names_what_was_bad() -> None:
    bad = (BadUtterance("utt-1", "a.tar", "undecodable"),)
    empty = Microbatch(0, 0.0, None, 0, 0.0, bad=bad)  # type: ignore[arg-type]
    data = StepData(0, 0, [empty])
    refuse_too_many_bad(data, ALONE, bad=1, epoch_utterances=100, fraction=0.01)
    with pytest.raises(DataError, match=r"2 of 100.*[\s\S]*utt-1 in a\.tar: undecodable"):
        refuse_too_many_bad(data, ALONE, bad=2, epoch_utterances=100, fraction=0.01)
