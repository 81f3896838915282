"""Every shortcut, and every pair of them, gives the loss and the gradients of the plain path."""

from __future__ import annotations

import itertools
from typing import Any

import torch

import pytest
from speech_models import (
    CPU,
    END,
    PREFIX,
    asr,
    batch_of,
    model_config,
    noise,
)

from speechllm.config.model import Model
from speechllm.config.performance import Performance
from speechllm.model.build import build_model
from speechllm.model.speech_llm import SpeechLLM
from speechllm.types import AudioSegment, Example, LossSums, TextSegment

LLMS = ("random:llama", "random:olmo2", "random:qwen2")
RUN_PREFIX = (*PREFIX, 40)  # longer than what the examples share with it
OFF: dict[str, Any] = {"prefix_cache": "off", "packing": "off", "label_logits": False}
SWITCHES: tuple[dict[str, Any], ...] = (
    {"prefix_cache": "auto"},
    {"packing": "on"},
    {"label_logits": True},
    {"label_logits": True, "logits_megabytes": 1},
)
EXAMPLES = (
    asr(noise(16_000, seed=1), (10, 11, 12)),
    asr(noise(1, seed=2), (13,)),
    asr(noise(9_999, seed=3), (14, 15, 16, 17, 18, 19)),
)
# The label at position 1 is predicted from position 0, which therefore cannot be left out.
TEXT = Example("text", (TextSegment(PREFIX[:1]), TextSegment((4, END), trained=True)))
SEVERAL = Example(
    "several",
    (
        TextSegment(PREFIX[:2]),
        AudioSegment(noise(5_000, seed=4)),
        TextSegment((20, END), trained=True),
        AudioSegment(noise(400, seed=6)),
        TextSegment((21, 22, END), trained=True),
    ),
)
BATCHES = {"asr": EXAMPLES, "cut": (*EXAMPLES, SEVERAL), "none": (*EXAMPLES, SEVERAL, TEXT)}


def tiny(llm: str, attention: str = "sdpa", **performance: Any) -> tuple[Model, SpeechLLM]:
    cfg = model_config(llm=llm)
    cfg = cfg.model_copy(update={"llm": cfg.llm.model_copy(update={"attention": attention})})
    asked = Performance.model_validate(performance)
    model = build_model(
        cfg, precision="fp32", device=CPU, seed=1, performance=asked, prefix=RUN_PREFIX
    )
    return cfg, model


def gradients(model: SpeechLLM, batch: Any) -> tuple[LossSums, dict[str, torch.Tensor]]:
    model.zero_grad()
    sums = model(batch)
    (sums.loss / sums.tokens).backward()
    found = {
        n: p.grad.clone() for n, p in model.trainable_parameters().items() if p.grad is not None
    }
    return sums, found


def assert_equal(found: Any, expected: Any) -> None:
    (sums, grads), (wanted_sums, wanted) = found, expected
    torch.testing.assert_close(sums.loss, wanted_sums.loss, atol=1e-5, rtol=1e-5)
    assert sums.correct.item() == wanted_sums.correct.item()
    assert sums.tokens.item() == wanted_sums.tokens.item()
    assert grads.keys() == wanted.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_pair_of_shortcuts_equals_the_plain_path(llm: str, attention: str) -> None:
    cfg, plain = tiny(llm, attention, preset="plain")
    batches = [
        batch_of(cfg, examples, pad_left=left)
        for examples, left in itertools.product(BATCHES.values(), (False, True))
    ]
    expected = [gradients(plain, batch) for batch in batches]
    for one, other in itertools.combinations_with_replacement(SWITCHES, 2):
        _, model = tiny(llm, attention, **(OFF | one | other))
        for batch, wanted in zip(batches, expected, strict=True):
            assert_equal(gradients(model, batch), wanted)
