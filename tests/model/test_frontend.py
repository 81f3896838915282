"""Log-mel features are Whisper's, and an utterance's are its own."""

from __future__ import annotations

import numpy as np
import torch

from transformers import WhisperFeatureExtractor

import pytest
from speech_models import noise

from speechllm.model.frontend import LogMel, num_frames

LENGTHS = (1, 159, 320, 321, 3199, 16_000, 16_001)


def padded(rows: list[np.ndarray], *, junk: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows as a batch; what follows a row is `junk`, which no result may depend on."""
    audio_AN = torch.full((len(rows), max(map(len, rows))), junk, dtype=torch.int16)
    for row_N, samples in zip(audio_AN, rows, strict=True):
        row_N[: len(samples)] = torch.from_numpy(samples)
    return audio_AN, torch.tensor([len(samples) for samples in rows])


@pytest.mark.parametrize("mels", [80, 128])
def test_equals_the_feature_extractor_row_by_row(mels: int) -> None:
    rows = [noise(n, seed=n, amplitude=30.0 * (i + 1) ** 3) for i, n in enumerate(LENGTHS)]
    mel_AFM, counts_A = LogMel(mels)(*padded(rows, junk=999))
    assert mel_AFM.dtype == torch.float32
    assert mel_AFM.shape == (len(rows), mels, 2 * 51)
    extractor = WhisperFeatureExtractor(feature_size=mels)
    for mel_FM, count, samples in zip(mel_AFM, counts_A.tolist(), rows, strict=True):
        assert count == -(-len(samples) // 320)
        wave = np.zeros(count * 320, dtype=np.float32)
        wave[: len(samples)] = samples / np.float32(32768)
        expected_FM = extractor(
            wave, sampling_rate=16_000, padding="do_not_pad", return_tensors="pt"
        ).input_features[0]
        torch.testing.assert_close(mel_FM[:, : 2 * count], expected_FM, atol=1e-4, rtol=0)
        assert not mel_FM[:, 2 * count :].any()


def test_equals_the_feature_extractor_on_thirty_seconds() -> None:
    samples = noise(40_000)
    audio_1N = torch.zeros(1, 480_000, dtype=torch.int16)
    audio_1N[0, :40_000] = torch.from_numpy(samples)
    mel_1FM, _ = LogMel(80)(audio_1N, torch.tensor([480_000]))
    expected = WhisperFeatureExtractor()(
        samples / np.float32(32768), sampling_rate=16_000, return_tensors="pt"
    ).input_features
    torch.testing.assert_close(mel_1FM, expected, atol=1e-4, rtol=0)


def test_batch_mates_change_nothing() -> None:
    log_mel = LogMel(80)
    quiet, loud = noise(5_001, seed=1, amplitude=20), noise(9_000, seed=2, amplitude=12_000)
    alone_1FM, _ = log_mel(*padded([quiet]))
    together_AFM, _ = log_mel(*padded([loud, quiet]))
    torch.testing.assert_close(together_AFM[1, :, :32], alone_1FM[0], atol=1e-6, rtol=1e-5)


def test_silence_and_one_sample_are_finite() -> None:
    mel_AFM, counts_A = LogMel(80)(torch.zeros(2, 1, dtype=torch.int16), torch.tensor([1, 1]))
    assert counts_A.tolist() == [1, 1]
    assert mel_AFM.isfinite().all()


def test_autocast_does_not_coarsen_it() -> None:
    audio, lengths = padded([noise(8_000)])
    log_mel = LogMel(80)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mel_AFM, _ = log_mel(audio, lengths)
    assert torch.equal(mel_AFM, log_mel(audio, lengths)[0])


def test_num_frames_of_ints_arrays_and_tensors() -> None:
    samples = [1, 319, 320, 321, 480_000, 480_001]
    expected = [1, 1, 1, 2, 1500, 1501]
    assert [num_frames(n) for n in samples] == expected
    assert num_frames(np.array(samples)).tolist() == expected
    assert num_frames(torch.tensor(samples)).tolist() == expected
