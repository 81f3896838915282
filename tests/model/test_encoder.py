"""Frames are the Whisper encoder's own, on short, long and batched audio."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch

import pytest
from speech_models import CPU, noise

from speechllm.config import model as schema
from speechllm.model.build import build_encoder
from speechllm.model.encoder import CHUNK_SAMPLES, FilterbankFrames, WhisperFrames

FRAMES = (1, 2, 31, 50)


def whisper(context: Literal["trim", "pad30"] = "trim") -> WhisperFrames:
    cfg = schema.WhisperEncoder(id="random:whisper", context=context)
    encoder = build_encoder(cfg, torch.float32, CPU)
    assert isinstance(encoder, WhisperFrames)
    # Fresh Whisper weights leave the biases zero, and with them faults at the edges unseen.
    generator = torch.Generator().manual_seed(4)
    for parameter in encoder.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return encoder


def filterbank() -> FilterbankFrames:
    torch.manual_seed(0)
    return FilterbankFrames(mels=40, hidden_size=24)


def encode(
    encoder: torch.nn.Module, rows: Sequence[np.ndarray], *, width: int = 0
) -> list[torch.Tensor]:
    """Each row's frames [T, D], from one batch at least `width` samples wide."""
    audio_AN = torch.zeros(len(rows), max(width, *map(len, rows)), dtype=torch.int16)
    for row_N, samples in zip(audio_AN, rows, strict=True):
        row_N[: len(samples)] = torch.from_numpy(samples)
    with torch.no_grad():
        frames_ATD, counts_A = encoder(audio_AN, torch.tensor([len(row) for row in rows]))
    assert frames_ATD.shape[1] == -(-audio_AN.shape[1] // 320)
    assert frames_ATD.shape[2] == encoder.width
    return [frames[:count] for frames, count in zip(frames_ATD, counts_A, strict=True)]


def test_bit_equal_to_transformers_on_thirty_seconds() -> None:
    encoder = whisper()
    audio_1N = torch.from_numpy(noise(CHUNK_SAMPLES))[None]
    mel_1FM, _ = encoder.log_mel(audio_1N, torch.tensor([CHUNK_SAMPLES]))
    with torch.no_grad():
        expected = encoder.encoder(mel_1FM).last_hidden_state
        frames, _ = encoder(audio_1N, torch.tensor([CHUNK_SAMPLES]))
    assert torch.equal(frames, expected)


def test_pad30_is_transformers_output_cut() -> None:
    encoder = whisper("pad30")
    short, long = noise(4_000, seed=1), noise(16_100, seed=2)
    for samples, frames in zip((short, long), encode(encoder, [short, long]), strict=True):
        audio_1N = torch.zeros(1, CHUNK_SAMPLES, dtype=torch.int16)
        audio_1N[0, : len(samples)] = torch.from_numpy(samples)
        mel_1FM, _ = encoder.log_mel(audio_1N, torch.tensor([CHUNK_SAMPLES]))
        with torch.no_grad():
            expected = encoder.encoder(mel_1FM).last_hidden_state[0, : -(-len(samples) // 320)]
        torch.testing.assert_close(frames, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", [whisper, filterbank, lambda: whisper("pad30")])
def test_batch_mates_and_padding_change_nothing(make) -> None:  # type: ignore[no-untyped-def]
    encoder = make()
    rows = [noise(320 * n - n, seed=n, amplitude=40.0 * n) for n in FRAMES]
    together = encode(encoder, rows, width=320 * 55)
    for samples, frames, count in zip(rows, together, FRAMES, strict=True):
        assert len(frames) == count
        torch.testing.assert_close(frames, encode(encoder, [samples])[0], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_of_one_length_need_no_mask_unless_the_batch_is_wider() -> None:
    encoder = whisper()
    masks: list[bool] = []
    encoder.encoder.layers[0].register_forward_pre_hook(
        lambda _, args: masks.append(args[1] is not None)
    )
    samples = noise(5_000, seed=1)
    alone = encode(encoder, [samples, samples])[0]
    wider = encode(encoder, [samples, samples], width=9_000)[0]
    audio_AN = torch.from_numpy(np.stack([samples, samples]))
    told, _ = encoder(audio_AN, torch.tensor([5_000, 5_000]), None, (5_000, 5_000))
    assert masks == [False, True, False]
    torch.testing.assert_close(wider, alone, atol=1e-6, rtol=1e-5)
    assert told[0].equal(alone)


@pytest.mark.parametrize("make", [whisper, filterbank])
def test_every_frame_depends_on_its_own_audio(make) -> None:  # type: ignore[no-untyped-def]
    encoder = make()
    samples = noise(320 * 20)
    changed = samples.copy()
    changed[320 * 19 :] = 0
    before, after = encode(encoder, [samples, changed])
    assert not torch.allclose(before[-1], after[-1], atol=1e-3)


@pytest.mark.parametrize("context", ["trim", "pad30"])
def test_long_audio_is_its_chunks_joined(context: Literal["trim", "pad30"]) -> None:
    encoder = whisper(context)
    long, short = noise(2 * CHUNK_SAMPLES + 5_000, seed=1), noise(9_000, seed=2)
    pieces = [long[:CHUNK_SAMPLES], long[CHUNK_SAMPLES : 2 * CHUNK_SAMPLES], long[-5_000:]]
    got_short, got_long = encode(encoder, [short, long])
    expected = torch.cat([encode(encoder, [piece])[0] for piece in pieces])
    torch.testing.assert_close(got_long, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_short, encode(encoder, [short])[0], atol=1e-5, rtol=1e-5)


def test_filterbank_normalises_loudness_away_and_takes_long_audio_whole() -> None:
    encoder = filterbank()
    quiet = noise(8_000, amplitude=100)
    frames = encode(encoder, [quiet, quiet * 40])
    torch.testing.assert_close(frames[0], frames[1], atol=1e-3, rtol=1e-3)
    assert len(encode(encoder, [noise(CHUNK_SAMPLES + 321)])[0]) == 1502


def test_filterbank_frames_are_standardised_features() -> None:
    encoder = filterbank()
    encoder.projection = torch.nn.Identity()  # type: ignore[assignment]
    with torch.no_grad():
        frames_1TF, _ = encoder(torch.from_numpy(noise(32_000))[None], torch.tensor([32_000]))
    features_MF = frames_1TF.reshape(200, 40)
    torch.testing.assert_close(features_MF.mean(0), torch.zeros(40), atol=1e-4, rtol=0)
    torch.testing.assert_close(features_MF.std(0), torch.ones(40), atol=1e-2, rtol=0)
