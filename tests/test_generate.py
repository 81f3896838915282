"""Decoding: greedy is greedy, beams search, rows are independent, ends are cut."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

import pytest
from speech_models import END, PAD, asr, batch_of, model_config, noise, tiny_speech_llm

from speechllm.config import model as schema
from speechllm.generate import generate
from speechllm.model.hub import resolve
from speechllm.model.speech_llm import SpeechLLM

PROMPTS = [
    asr(noise(16_000, seed=1), ()),
    asr(noise(2_000, seed=2), (), prefix=(40,)),
    asr(noise(9_000, seed=3, amplitude=9_000), (), prefix=(50, 51, 52, 53)),
]
NEVER = (259,)  # a token that these models do not say within NEW tokens
NEW = 12


@pytest.fixture(scope="module")
def cfg() -> schema.Model:
    return model_config(connector="transformer")


@pytest.fixture(scope="module")
def model(cfg: schema.Model) -> SpeechLLM:
    return tiny_speech_llm(cfg)


def decode(
    model: SpeechLLM, cfg: schema.Model, prompts=PROMPTS, *, beams: int = 1, ends=NEVER
) -> list[list[int]]:  # type: ignore[no-untyped-def]
    return generate(
        model,
        batch_of(cfg, prompts, pad_left=True),
        max_new_tokens=NEW,
        num_beams=beams,
        end_token_ids=ends,
        pad_id=PAD,
    )


@torch.no_grad()
def scores_by_hand(model: SpeechLLM, cfg: schema.Model, prompt, said: list[int]) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """Log-probabilities [V] of what follows prompt + said, without any cache."""
    embeds = model.inputs_embeds(batch_of(cfg, [prompt]))
    said_embeds = model.llm.get_input_embeddings()(torch.tensor([said], dtype=torch.int64))
    logits = model.llm(inputs_embeds=torch.cat((embeds, said_embeds), dim=1)).logits
    return logits[0, -1].log_softmax(-1)


def total_score(model: SpeechLLM, cfg: schema.Model, prompt, said: list[int]) -> float:  # type: ignore[no-untyped-def]
    return sum(
        scores_by_hand(model, cfg, prompt, said[:i])[token].item() for i, token in enumerate(said)
    )


def test_greedy_equals_a_loop_without_cache(model: SpeechLLM, cfg: schema.Model) -> None:
    model.eval()
    for prompt, row in zip(PROMPTS, decode(model, cfg), strict=True):
        said: list[int] = []
        for _ in range(NEW):
            said.append(int(scores_by_hand(model, cfg, prompt, said).argmax()))
        assert row == said


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_do_not_depend_on_their_batch(model: SpeechLLM, cfg: schema.Model, beams: int) -> None:
    together = decode(model, cfg, beams=beams)
    assert together == [decode(model, cfg, [prompt], beams=beams)[0] for prompt in PROMPTS]
    assert len({tuple(row) for row in together}) > 1


def test_beams_find_what_greedy_misses(model: SpeechLLM, cfg: schema.Model) -> None:
    model.eval()
    gains = [
        total_score(model, cfg, prompt, beam) - total_score(model, cfg, prompt, greedy)
        for prompt, greedy, beam in zip(
            PROMPTS, decode(model, cfg), decode(model, cfg, beams=4), strict=True
        )
    ]
    assert max(gains) > 0.01
    assert sum(gains) > 0


def test_the_likeliest_beam_wins_unless_length_is_rewarded(
    model: SpeechLLM, cfg: schema.Model
) -> None:
    model.eval()
    ends = tuple({row[4] for row in decode(model, cfg, beams=4)})

    def found(length_penalty: float) -> tuple[int, float]:
        """Tokens and log-probability of all outputs, end tokens included where they are certain."""
        rows = generate(
            model, batch_of(cfg, PROMPTS, pad_left=True), max_new_tokens=NEW, num_beams=4,
            length_penalty=length_penalty, end_token_ids=ends, pad_id=PAD,
        )  # fmt: skip
        scores = [
            total_score(model, cfg, prompt, row) + (ended(prompt, row) if len(row) < NEW else 0.0)
            for prompt, row in zip(PROMPTS, rows, strict=True)
        ]
        return sum(map(len, rows)), sum(scores)

    def ended(prompt, row: list[int]) -> float:  # type: ignore[no-untyped-def]
        scores = scores_by_hand(model, cfg, prompt, row)
        return max(scores[end].item() for end in ends)

    (short, likely), (long, unlikely) = found(0.0), found(8.0)
    assert short < long
    assert likely > unlikely + 0.01


def test_end_tokens_cut_and_are_left_out(model: SpeechLLM, cfg: schema.Model) -> None:
    whole = decode(model, cfg)
    ends = (whole[0][4], whole[1][2])
    cut = decode(model, cfg, ends=ends)
    for before, after in zip(whole, cut, strict=True):
        place = min((before.index(e) for e in ends if e in before), default=NEW)
        assert after == before[:place]
    assert len(cut[0]) <= 4
    assert len(cut[1]) <= 2


def test_padding_that_is_the_end_token_harms_nothing(model: SpeechLLM, cfg: schema.Model) -> None:
    batch = batch_of(cfg, PROMPTS, pad_left=True, pad_id=END)
    rows = generate(model, batch, max_new_tokens=NEW, num_beams=1, end_token_ids=(END,), pad_id=END)
    assert rows == decode(model, cfg, ends=(END,))


def test_right_padding_is_refused(model: SpeechLLM, cfg: schema.Model) -> None:
    with pytest.raises(AssertionError, match="left"):
        generate(
            model,
            batch_of(cfg, PROMPTS),
            max_new_tokens=1,
            num_beams=1,
            end_token_ids=NEVER,
            pad_id=PAD,
        )


def test_no_dropout_and_training_goes_on_as_before(cfg: schema.Model) -> None:
    connector = cfg.connector.model_copy(update={"dropout": 0.9})
    model = tiny_speech_llm(cfg.model_copy(update={"connector": connector})).train()
    first = decode(model, cfg)
    assert first == decode(model, cfg)
    assert model.connector.training
    assert not model.llm.training


def test_sampling_defaults_of_a_model_directory_do_not_leak_in(
    tmp_path: Path, model: SpeechLLM, cfg: schema.Model
) -> None:
    directory = tmp_path / "llm"
    shutil.copytree(resolve("random:llama"), directory)
    defaults = {
        "do_sample": True, "temperature": 3.0, "top_k": 3, "repetition_penalty": 5.0,
        "no_repeat_ngram_size": 1, "min_new_tokens": 3, "num_beams": 2, "max_length": 5,
        "suppress_tokens": list(range(200)), "length_penalty": 9.0,
    }  # fmt: skip
    (directory / "generation_config.json").write_text(json.dumps(defaults), encoding="utf-8")
    other = tiny_speech_llm(model_config(llm=str(directory), connector="transformer"))
    assert decode(other, cfg) == decode(model, cfg)
    assert decode(other, cfg, beams=3) == decode(model, cfg, beams=3)


@pytest.mark.parametrize("beams", [1, 2])
def test_bf16_decodes(model: SpeechLLM, cfg: schema.Model, beams: int) -> None:
    rows = decode(tiny_speech_llm(cfg, precision="bf16"), cfg, beams=beams)
    assert all(rows)
    assert {len(row) for row in rows} <= set(range(1, NEW + 1))
    firsts = [row[0] for row in decode(model, cfg, beams=beams)]
    assert sum(row[0] == first for row, first in zip(rows, firsts, strict=True)) >= 2
