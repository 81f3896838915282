from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pytest
from runs import tiny_config

import speechllm.evaluate
from speechllm.decode import Prediction
from speechllm.evaluate import evaluate, evenly
from speechllm.prepare import open_split, prepare_model, prepare_text
from speechllm.world import World

ALONE = World(0, 1, 0, torch.device("cpu"))


def scores(tmp_path: Path, shards: Path, *overrides: str) -> dict[str, float]:
    config = tiny_config(tmp_path, shards, "data.num_workers=0", *overrides)
    text = prepare_text(config)
    split = open_split(config, config.data.train, text, key="data.validation", budget=1024)
    model = prepare_model(config, ALONE.device)
    found = evaluate(model, split, text, config, ALONE)
    assert model.connector.training
    return found


def test_the_mean_is_over_tokens_whatever_the_batches(tmp_path: Path, shards: Path) -> None:
    """No divisor is off by one, and dropout is off."""
    large = scores(tmp_path, shards)
    small = scores(tmp_path, shards, "data.microbatch_tokens=120")
    assert small["loss"] == pytest.approx(large["loss"], rel=1e-5)
    assert small["token_accuracy"] == pytest.approx(large["token_accuracy"])
    assert small["utterances"] == large["utterances"] == 48
    # Random weights guess among 260 ids: about ln 260 nats a token.
    assert large["loss"] == pytest.approx(np.log(260), abs=0.3)


def test_texts_are_decoded_in_the_batches_of_generate(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def decode(*args: Any) -> Iterator[list[Prediction]]:
        for microbatch in args[-1]:
            sizes.append(len(microbatch))
            yield [Prediction(int(n), "", "red light", "red", 1.0) for n in microbatch]

    monkeypatch.setattr(speechllm.evaluate, "decode", decode)
    wer = "evaluation.wer_utterances=9"
    assert scores(tmp_path, shards, wer)["wer"] == 0.5
    assert sizes == [9], "all fit into one"
    scores(tmp_path, shards, wer, "performance.preset=plain", "performance.plain_utterances=4")
    assert sizes == [9, 4, 4, 1]


def test_subsets_are_spread_evenly_and_always_the_same() -> None:
    numbers = np.arange(100) * 2
    assert evenly(numbers, 4).tolist() == [0, 50, 100, 150]
    assert evenly(numbers, 0).tolist() == numbers.tolist()
    assert evenly(numbers, 1000).tolist() == numbers.tolist()
