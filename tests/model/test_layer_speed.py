from __future__ import annotations

import time
from pathlib import Path

import torch

import pytest

from speechllm.config import model as schema
from speechllm.model.layer_speed import (
    Rows,
    Way,
    attention_seconds,
    is_small,
    layer_shape,
    median_seconds,
    product_seconds,
    rows_to_time,
)
from speechllm.model.tiny import build_tiny_llm

CPU = torch.device("cpu")
WAYS = (Way("eager", packed=False), Way("sdpa", packed=False))


@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen2"])
def test_layers_are_timed_without_weights(kind: str) -> None:
    state = torch.get_rng_state()
    seconds = attention_seconds(
        schema.LLM(id=f"random:{kind}"),
        WAYS,
        Rows(2, 16),
        stored=torch.bfloat16,
        computed=torch.bfloat16,
        device=CPU,
    )
    assert seconds.keys() == {"eager", "sdpa"}
    assert all(0 < value < 10 for value in seconds.values())
    assert torch.equal(state, torch.get_rng_state())


def test_products_are_timed_in_both_types() -> None:
    seconds = product_seconds(layer_shape(schema.LLM(id="random:llama")), 64, CPU)
    assert seconds.keys() == {"fp32", "bf16"}


def test_shapes_are_read_and_large_ones_timed_on_fewer_rows() -> None:
    shape = layer_shape(schema.LLM(id="random:llama"))
    assert shape == ("llama", 64, 4, 2, 128)
    assert shape.matrix_parameters == 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
    assert rows_to_time(shape, Rows(30, 33), CPU) == (30, 48)
    wide = shape._replace(width=4096, feed_forward=11_008)
    assert rows_to_time(wide, Rows(30, 64), CPU) == (1, 64)
    assert rows_to_time(wide, Rows(30, 64), torch.device("cuda")) == (30, 64)


def test_random_models_are_small(tmp_path: Path) -> None:
    assert is_small(schema.LLM(id="random:llama"))
    large = build_tiny_llm(tmp_path / "llm", hidden=512, layers=5, heads=8)
    assert not is_small(schema.LLM(id=str(large)))


def test_the_median_is_of_interleaved_rounds_and_leaves_out_the_first() -> None:
    calls: list[str] = []

    def action(name: str, seconds: float) -> None:
        # The first run is twice as slow.
        time.sleep(seconds * (2 if name not in calls else 1))
        calls.append(name)

    found = median_seconds(
        {"a": lambda: action("a", 0.001), "b": lambda: action("b", 0.003)}, CPU, most=0.05
    )
    assert found["a"] < found["b"]
    assert calls[:4] == ["a", "b", "a", "b"]
    assert 4 <= len(calls) <= 20
