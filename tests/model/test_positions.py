"""What is said of a microbatch before it is run is what the LLM's layers then see."""

from __future__ import annotations

from typing import Any

import torch

import pytest
from speech_models import CPU, PREFIX, asr, batch_of, model_config, noise

from speechllm.config.performance import Performance
from speechllm.model.build import build_model
from speechllm.model.positions import positions_of
from speechllm.types import AudioSegment, Example, TextSegment

EXAMPLES = (asr(noise(16_000, seed=1), (10, 11, 12)), asr(noise(9_999, seed=3), (14, 15)))
TWO_AUDIOS = Example(
    "two",
    (
        TextSegment(PREFIX[:2]),
        AudioSegment(noise(5_000, seed=4)),
        TextSegment((20,), trained=True),
        AudioSegment(noise(400, seed=6)),
        TextSegment((21,), trained=True),
    ),
)


@pytest.mark.parametrize(
    ("performance", "narrow", "shared"),
    [
        ({}, False, 3),
        ({}, True, 0),
        ({"packing": "on"}, False, 3),
        ({"prefix_cache": "off"}, False, 0),
        ({"preset": "plain"}, False, 0),
    ],
    ids=["prefix", "window", "packed", "whole", "plain"],
)
@torch.no_grad()
def test_positions_are_those_that_are_run(
    performance: dict[str, Any], narrow: bool, shared: int
) -> None:
    cfg = model_config(llm="random:llama")
    model = build_model(
        cfg, precision="fp32", device=CPU, seed=1,
        performance=Performance.model_validate(performance), prefix=PREFIX,
    )  # fmt: skip
    if narrow:  # as of an LLM whose layers see fewer positions than the rows have
        object.__setattr__(model.shortcuts, "longest_row", 5)
    model.compute_prefix()
    shapes: list[int] = []
    model.llm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["inputs_embeds"].shape[:2].numel()),
        with_kwargs=True,
    )
    for examples in (EXAMPLES, (*EXAMPLES, TWO_AUDIOS)):
        batch = batch_of(cfg, examples)
        found = positions_of(model, batch)
        model(batch)
        assert found.run == shapes.pop()
        left_out = min(shared, 2 if TWO_AUDIOS in examples else 3)
        assert found.used == sum(batch.lengths) - left_out * len(examples)
        assert (found.used == found.run) == (performance == {"packing": "on"})


def test_ctc_runs_audio_tokens_alone() -> None:
    cfg = model_config(llm="random:llama")
    model = build_model(cfg, precision="fp32", device=CPU, seed=1)
    batch = batch_of(cfg, EXAMPLES)
    longest, other = batch.audio_mask_BS.sum(1).tolist()
    assert longest > other
    assert positions_of(model, batch, "ctc") == (2 * longest, longest + other)
