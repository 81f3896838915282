"""The whole model: where tokens go, what the loss is, what it depends on, and what trains."""

from __future__ import annotations

from collections.abc import Sequence

import torch

import pytest
from speech_models import (
    CONNECTORS,
    END,
    PAD,
    asr,
    batch_of,
    model_config,
    noise,
    tiny_speech_llm,
)

from speechllm.model.build import build_model
from speechllm.model.layout import position_ids
from speechllm.model.speech_llm import SpeechLLM
from speechllm.types import IGNORE, AudioSegment, Example, TextSegment

LLMS = ("random:llama", "random:olmo2", "random:qwen2")
EXAMPLES = (
    asr(noise(16_000, seed=1), (10, 11, 12)),
    asr(noise(1, seed=2), (13,)),
    asr(noise(9_999, seed=3, amplitude=9_000), (14, 15, 16, 17, 18, 19), prefix=(30, 31)),
)
SEVERAL_AUDIOS = Example(
    "several",
    (
        TextSegment((5,)),
        AudioSegment(noise(5_000, seed=4)),
        TextSegment((6, 7)),
        TextSegment((20, END), trained=True),
        AudioSegment(noise(2_500, seed=5)),
        AudioSegment(noise(400, seed=6)),
        TextSegment((21, 22, END), trained=True),
    ),
)


@torch.no_grad()
def embed_by_hand(model: SpeechLLM, example: Example) -> tuple[torch.Tensor, list[int]]:
    """(embeddings [S, W], labels) of one example, segment by segment."""
    parts, labels = [], []
    for segment in example.segments:
        if isinstance(segment, TextSegment):
            tokens = torch.tensor(segment.tokens)
            parts.append(model.llm.get_input_embeddings()(tokens))
            labels += segment.tokens if segment.trained else [IGNORE] * len(segment.tokens)
        else:
            audio_1N = torch.from_numpy(segment.samples)[None]
            tokens_1KW, counts = model.audio_tokens(audio_1N, torch.tensor([audio_1N.shape[1]]))
            assert counts.tolist() == [tokens_1KW.shape[1]]
            parts.append(tokens_1KW[0])
            labels += [IGNORE] * tokens_1KW.shape[1]
    return torch.cat(parts), labels


@torch.no_grad()
def loss_by_hand(model: SpeechLLM, example: Example) -> tuple[float, int, int]:
    """(loss, correct, tokens) from the logits of all positions of one example alone."""
    embeds_SW, labels = embed_by_hand(model, example)
    output = model.llm(inputs_embeds=embeds_SW[None], labels=torch.tensor([labels]))
    guesses = output.logits[0, :-1].argmax(-1).tolist()
    pairs = [(g, t) for g, t in zip(guesses, labels[1:], strict=True) if t != IGNORE]
    return output.loss.item() * len(pairs), sum(g == t for g, t in pairs), len(pairs)


def losses_alone(model: SpeechLLM, examples: Sequence[Example]) -> list[float]:
    return [loss_by_hand(model, example)[0] for example in examples]


@pytest.mark.parametrize("llm", LLMS)
@pytest.mark.parametrize("connector", ["mlp", "transformer"])
@torch.no_grad()
def test_loss_is_the_naive_one_for_every_family(llm: str, connector: str) -> None:
    cfg = model_config(llm=llm, connector=connector)
    model = tiny_speech_llm(cfg)
    examples = [*EXAMPLES, SEVERAL_AUDIOS]
    sums = model(batch_of(cfg, examples))
    expected = [loss_by_hand(model, example) for example in examples]
    torch.testing.assert_close(sums.loss.item(), sum(e[0] for e in expected), atol=0, rtol=1e-5)
    assert sums.correct.item() == sum(e[1] for e in expected)
    assert sums.tokens.item() == sum(e[2] for e in expected) == 4 + 2 + 7 + 2 + 3


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("encoder", [None, {"kind": "fbank", "mels": 20, "hidden_size": 16}])
@torch.no_grad()
def test_loss_does_not_depend_on_batch_mates_or_padding(connector: str, encoder) -> None:  # type: ignore[no-untyped-def]
    cfg = model_config(connector=connector, encoder=encoder)
    model = tiny_speech_llm(cfg)
    for example, expected in zip(EXAMPLES, losses_alone(model, EXAMPLES), strict=True):
        mates = [e for e in EXAMPLES if e is not example]
        masked = [Example(m.key, m.segments[:-1]) for m in mates]  # in the batch, not in the loss
        for pad_left in (False, True):
            loss = model(batch_of(cfg, [masked[0], example, masked[1]], pad_left=pad_left)).loss
            torch.testing.assert_close(loss.item(), expected, atol=0, rtol=1e-5)


@torch.no_grad()
def test_padding_with_the_end_token_keeps_it_in_the_loss() -> None:
    cfg = model_config()
    model = tiny_speech_llm(cfg)
    sums = model(batch_of(cfg, EXAMPLES, pad_id=END))
    torch.testing.assert_close(sums.loss, model(batch_of(cfg, EXAMPLES, pad_id=PAD)).loss)
    assert sums.tokens.item() == 4 + 2 + 7


@torch.no_grad()
def test_right_guesses_are_counted() -> None:
    cfg = model_config()
    model = tiny_speech_llm(cfg)
    embeds_SW, _ = embed_by_hand(model, asr(noise(3_000), ()))
    first = model.llm(inputs_embeds=embeds_SW[None]).logits[0, -1].argmax().item()
    for target, correct in ((first, 1), ((first + 1) % 250, 0)):
        segments = (*asr(noise(3_000), ()).segments, TextSegment((target,), trained=True))
        sums = model(batch_of(cfg, [Example("key", segments)]))
        assert (sums.correct.item(), sums.tokens.item()) == (correct, 1)


@pytest.mark.parametrize("pad_left", [False, True])
@torch.no_grad()
def test_audio_and_text_land_in_their_places(pad_left: bool) -> None:
    cfg = model_config(connector="transformer")
    model = tiny_speech_llm(cfg)
    examples = [*EXAMPLES, SEVERAL_AUDIOS]
    batch = batch_of(cfg, examples, pad_left=pad_left)
    rows = model.inputs_embeds(batch)
    for row, mask, example in zip(rows, batch.attention_mask_BS.bool(), examples, strict=True):
        expected_SW, _ = embed_by_hand(model, example)
        torch.testing.assert_close(row[mask], expected_SW, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_text_only_examples_need_no_second_path() -> None:
    cfg = model_config()
    model = tiny_speech_llm(cfg)
    example = Example("text", (TextSegment((1, 2, 3)), TextSegment((4, END), trained=True)))
    loss = model(batch_of(cfg, [example])).loss
    torch.testing.assert_close(loss.item(), loss_by_hand(model, example)[0], atol=0, rtol=1e-5)


@torch.no_grad()
def test_another_number_of_audio_tokens_than_places_is_refused() -> None:
    cfg = model_config()
    batch = batch_of(cfg, EXAMPLES)
    batch.most_audio_tokens += 1
    with pytest.raises(AssertionError, match="another number of audio tokens"):
        tiny_speech_llm(cfg)(batch)


def test_position_ids_start_at_the_first_real_position() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert position_ids(mask).tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]]


@torch.no_grad()
def test_the_llm_is_told_the_positions() -> None:
    """Rotary positions are relative, so these LLMs would not tell; those with absolute ones do."""
    cfg = model_config()
    model = tiny_speech_llm(cfg)
    batch = batch_of(cfg, EXAMPLES, pad_left=True)
    seen = []
    model.llm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model(batch)
    assert seen[0].equal(position_ids(batch.attention_mask_BS))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("encoder", [None, {"kind": "fbank", "mels": 20, "hidden_size": 16}])
def test_what_trains_is_fp32_and_the_rest_is_left_alone(precision, encoder) -> None:  # type: ignore[no-untyped-def]
    cfg = model_config(connector="transformer", encoder=encoder)
    model = tiny_speech_llm(cfg, precision=precision)
    trainable = model.trainable_parameters()
    assert list(trainable) == sorted(trainable)
    parts = {name.split(".")[0] for name in trainable}
    assert parts == ({"connector", "encoder"} if encoder else {"connector"})
    frozen = {n: p for n, p in model.named_parameters() if n not in trainable}
    before = {n: p.clone() for n, p in frozen.items()}
    stored = torch.bfloat16 if precision == "bf16" else torch.float32
    assert {p.dtype for p in frozen.values()} == {stored}
    assert {p.dtype for p in trainable.values()} == {torch.float32}
    assert {b.dtype for n, b in model.named_buffers() if "inv_freq" in n} == {torch.float32}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2)
    model(batch_of(cfg, EXAMPLES)).loss.backward()
    optimizer.step()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trainable.values())
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in frozen.items())


@pytest.mark.parametrize("connector", CONNECTORS)
def test_one_small_step_moves_the_weights_under_bf16(connector: str) -> None:
    cfg = model_config(connector=connector)
    model = tiny_speech_llm(cfg, precision="bf16")
    trainable = model.trainable_parameters()
    before = {n: p.detach().clone() for n, p in trainable.items()}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-4)
    model(batch_of(cfg, EXAMPLES)).loss.backward()
    optimizer.step()
    moved = sum(int((p != before[n]).sum()) for n, p in trainable.items())
    total = sum(p.numel() for p in trainable.values())
    assert moved > 0.99 * total


def test_train_leaves_frozen_parts_in_eval_mode() -> None:
    model = tiny_speech_llm(model_config(connector="transformer"))
    for mode in (False, True):
        model.train(mode)
        assert model.connector.training is mode
        assert all(m.training is mode for m in model.connector.modules())
        frozen = [*model.encoder.modules(), *model.llm.modules()]
        assert not any(m.training for m in frozen)
    with_filterbank = tiny_speech_llm(model_config(encoder={"kind": "fbank"}))
    assert with_filterbank.encoder.training
    assert not with_filterbank.llm.training


@torch.no_grad()
def test_bf16_is_near_fp32() -> None:
    cfg = model_config(connector="transformer")
    batch = batch_of(cfg, EXAMPLES)
    fp32 = tiny_speech_llm(cfg)(batch).loss
    bf16 = tiny_speech_llm(cfg, precision="bf16")(batch).loss
    assert bf16.dtype == torch.float32
    torch.testing.assert_close(bf16, fp32, atol=0, rtol=1e-2)


def test_encoder_leaves_no_graph_where_it_is_frozen() -> None:
    cfg = model_config()
    model = tiny_speech_llm(cfg)
    seen: list[torch.Tensor] = []
    model.connector.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(batch_of(cfg, EXAMPLES)).loss.backward()
    assert not seen[0].requires_grad


def test_ctc_aligns_the_end_token_too() -> None:
    cfg = model_config(connector="mlp")
    model = build_model(cfg, precision="fp32", device=torch.device("cpu"), seed=1, ctc=True).eval()
    examples = (asr(noise(16_000, seed=1), (10, 11, 12)), asr(noise(16_000, seed=2), (13,)))
    assert model.ctc_head is not None
    batch = batch_of(cfg, examples)
    with torch.no_grad():
        tokens_AKW, counts_A = model.audio_tokens(batch.audio_AN, batch.audio_lengths_A)
        targets = [torch.tensor(ids) for ids in ((10, 11, 12, END), (13, END))]
        expected = model.ctc_head(tokens_AKW, counts_A, targets)
        found = model(batch, "ctc")
    torch.testing.assert_close(found.loss, expected.loss)
    assert int(found.tokens) == batch.num_target_tokens == 6
