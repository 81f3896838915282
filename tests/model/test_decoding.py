"""Our decoding against transformers' own `generate`, and against the LLM without any cache."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, MistralConfig

import pytest
from speech_models import END, PAD, asr, batch_of, model_config, noise, tiny_speech_llm

from speechllm.generate import generate
from speechllm.model import decoding, decoding_cache
from speechllm.model.decoding import read_prompts
from speechllm.model.decoding_cache import Beams, attention_of_beams, can_hold
from speechllm.model.speech_llm import SpeechLLM
from speechllm.types import Batch

CONFIG = model_config(connector="linear")
NEW = 10


@pytest.fixture(scope="module", params=["llama", "olmo2", "qwen2"])
def model(request: pytest.FixtureRequest) -> SpeechLLM:
    return tiny_speech_llm(model_config(llm=f"random:{request.param}", connector="linear")).eval()


@pytest.fixture(scope="module")
def llama() -> SpeechLLM:
    return tiny_speech_llm(CONFIG).eval()


def prompts(*, same_prefix: bool = False) -> Batch:
    """Rows of different lengths, padded on the left."""
    examples = []
    for row, length in enumerate((9_000, 2_000, 30_000, 12_000, 700, 17_000)):
        prefix = (40, 41, 42) if same_prefix else tuple(range(40, 41 + row % 3))
        examples.append(asr(noise(length, seed=row), (), prefix=prefix))
    return batch_of(CONFIG, examples, pad_left=True)


def said(model: SpeechLLM, batch: Batch, **options: Any) -> list[list[int]]:
    defaults = {"max_new_tokens": NEW, "num_beams": 1, "end_token_ids": (END,), "pad_id": PAD}
    return generate(model, batch, **(defaults | options))


def ends_of(rows: list[list[int]], *places: tuple[int, int]) -> tuple[int, ...]:
    """Tokens that let rows end: (row, place) each."""
    return tuple({rows[row][place] for row, place in places})


@pytest.mark.parametrize(
    ("beams", "length_penalty"), [(1, 0.0), (2, 0.0), (2, 1.0), (4, 0.0), (4, 1.0)]
)
def test_text_is_that_of_transformers(
    model: SpeechLLM, beams: int, length_penalty: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoding_cache, "STEPS_AHEAD", 2)  # so that blocks fill up again and again
    monkeypatch.setattr(decoding_cache, "STEPS_FREED", 2)
    batch = prompts()
    whole = said(model, batch, num_beams=beams, length_penalty=length_penalty, plain=True)
    assert said(model, batch, num_beams=beams, length_penalty=length_penalty) == whole
    options = {
        "num_beams": beams, "length_penalty": length_penalty,
        "end_token_ids": ends_of(whole, (0, -1), (1, len(whole[1]) // 2), (3, -2)),
    }  # fmt: skip
    rows = said(model, batch, **options)
    assert rows == said(model, batch, plain=True, **options)
    assert rows != whole


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_leave_as_they_end(
    llama: SpeechLLM, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = prompts()
    free = said(llama, batch, num_beams=beams, plain=True)
    options = {
        "num_beams": beams, "end_token_ids": ends_of(free, *((row, -1 - row) for row in range(4))),
    }  # fmt: skip
    sizes: list[int] = []
    real = Beams.say

    def watched(self: Beams, tokens_BQ: Tensor, parents_BQ: Tensor) -> Tensor:
        logits = real(self, tokens_BQ, parents_BQ)
        blocks = {layer.keys.shape[0] for layer in self.layers}
        assert blocks == {len(tokens_BQ)}, "keys of rows that have ended are still there"
        sizes.append(len(tokens_BQ))
        return logits

    monkeypatch.setattr(Beams, "say", watched)
    rows = said(llama, batch, **options)
    assert rows == said(llama, batch, plain=True, **options)
    assert len({len(row) for row in rows}) > 1
    assert len(set(sizes)) > 1
    assert sizes == sorted(sizes, reverse=True)


def logits_of_beams(
    model: SpeechLLM, batch: Batch, tokens_BT: Tensor, *, shared: int = 0
) -> tuple[Tensor, Tensor]:
    """Logits [B, T, V] after `tokens_BT`, one by one: by Beams, as the second of three beams, and
    by the LLM at once without a cache."""
    llm = model.llm
    embeds = model.inputs_embeds(batch)
    mask = batch.attention_mask_BS
    prefix = []
    if shared:
        row = int(mask.sum(1).argmax())  # the row without padding
        found = llm(inputs_embeds=embeds[row : row + 1, :shared], use_cache=True).past_key_values
        prefix = [(layer.keys, layer.values) for layer in found.layers]
    beams = Beams(llm, 3, prefix)
    read_prompts(beams, embeds, mask)
    steps = []
    with attention_of_beams(llm):
        for step, tokens_B in enumerate(tokens_BT.unbind(1)):
            others = torch.full_like(tokens_B, 60 + step)
            parents = [0, 1, 2] if step else [0, 0, 0]
            logits = beams.say(
                torch.stack((others, tokens_B, others + 9), dim=1),
                torch.tensor(parents).expand(len(tokens_B), -1),
            )
            steps.append(logits[:, 1])
    whole = torch.cat((mask, torch.ones_like(tokens_BT)), dim=1)
    expected = llm(
        inputs_embeds=torch.cat((embeds, llm.get_input_embeddings()(tokens_BT)), dim=1),
        attention_mask=whole,
        position_ids=(whole.cumsum(1) - 1).clamp(min=0),
    ).logits
    return torch.stack(steps, dim=1), expected[:, mask.shape[1] :]


@torch.no_grad()
@pytest.mark.parametrize("shared", [0, 3])
def test_a_beam_sees_its_prompt_and_what_it_has_said(model: SpeechLLM, shared: int) -> None:
    batch = prompts(same_prefix=True)
    tokens_BT = torch.randint(10, 250, (len(batch.keys), 5), generator=torch.manual_seed(1))
    found, expected = logits_of_beams(model, batch, tokens_BT, shared=shared)
    assert torch.allclose(found, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fault", ["positions", "columns", "prefix"])
def test_being_off_by_one_does_not_go_unnoticed(
    model: SpeechLLM, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_read, real_say = Beams.read, Beams.say

    def read(self: Beams, embeds: Tensor, real: Tensor, positions: Tensor) -> Tensor:
        logits = real_read(self, embeds, real, positions + (fault == "prefix"))
        self.next_B = self.next_B + (fault == "positions")
        return logits

    def say(self: Beams, tokens: Tensor, parents: Tensor) -> Tensor:
        if fault == "columns":
            self.seen_BQC = self.seen_BQC.roll(1, dims=1)
        return real_say(self, tokens, parents)

    monkeypatch.setattr(Beams, "read", read)
    monkeypatch.setattr(Beams, "say", say)
    batch = prompts(same_prefix=True)
    tokens_BT = torch.randint(10, 250, (len(batch.keys), 5), generator=torch.manual_seed(1))
    found, expected = logits_of_beams(model, batch, tokens_BT, shared=3)
    assert not torch.allclose(found, expected, atol=1e-4)


def test_keys_of_a_prompt_are_held_once_and_given_up_beams_are_forgotten(
    llama: SpeechLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns: list[int] = []
    real = Beams.say

    def watched(self: Beams, tokens_BQ: Tensor, parents_BQ: Tensor) -> Tensor:
        logits = real(self, tokens_BQ, parents_BQ)
        columns.append(self.layers[0].keys.shape[2] - self.prompt)
        assert self.layers[0].keys.shape[0] == len(tokens_BQ)
        return logits

    monkeypatch.setattr(Beams, "say", watched)
    monkeypatch.setattr(decoding_cache, "STEPS_AHEAD", 4)
    monkeypatch.setattr(decoding_cache, "STEPS_FREED", 4)
    said(llama, prompts(), num_beams=4, length_penalty=1.0, max_new_tokens=40, end_token_ids=(259,))
    assert len(columns) == 39
    assert columns[-1] < 4 * 39 * 0.7


def test_what_has_another_cache_is_left_to_transformers(
    llama: SpeechLLM, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    small: dict[str, Any] = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 30,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    }  # fmt: skip
    for config, expected in (
        (LlamaConfig(**small), True),
        (MistralConfig(**small, sliding_window=None), True),
        (MistralConfig(**small, sliding_window=8), False),
        (BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=30), False),
    ):
        assert can_hold(AutoModelForCausalLM.from_config(config)) is expected
    batch = prompts()
    expected_rows = said(llama, batch, plain=True)
    monkeypatch.setattr(decoding, "can_hold", lambda llm: False)
    decoding._say_that_it_cannot.cache_clear()
    with caplog.at_level(logging.INFO, logger="speechllm"):
        for _ in range(2):
            assert said(llama, batch) == expected_rows
    assert [
        r.message for r in caplog.records if "transformers' own" in r.message
    ] == caplog.messages
    assert len(caplog.messages) == 1


def test_the_model_keeps_its_own_attention(llama: SpeechLLM) -> None:
    before = llama.llm.config._attn_implementation
    said(llama, prompts(), num_beams=2)
    assert llama.llm.config._attn_implementation == before == "sdpa"
