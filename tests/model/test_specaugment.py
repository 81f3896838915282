"""Masks cover what they say and nothing else, through every front-end."""

from __future__ import annotations

import numpy as np
import torch

import pytest
from speech_models import CPU, noise

from speechllm.config.model import WhisperEncoder
from speechllm.model.build import build_encoder
from speechllm.model.encoder import CHUNK_FRAMES, CHUNK_SAMPLES, FilterbankFrames
from speechllm.model.frontend import LogMel
from speechllm.model.specaugment import mask_features, masks_of_chunks, mean_of_rows
from speechllm.types import SpecMasks


def masks(times: list[list[list[int]]], bands: list[list[list[float]]]) -> SpecMasks:
    return SpecMasks(torch.tensor(times), torch.tensor(bands, dtype=torch.float32))


def test_what_is_masked() -> None:
    mel_AFM = 1 + torch.rand(2, 8, 12)
    mel_AFM[1, :, 8:] = 0
    counts_A = torch.tensor([6, 4])
    given = masks([[[2, 5], [0, 0]], [[0, 1], [7, 9]]], [[[0.25, 0.5]], [[0.0, 0.0]]])
    masked_AFM = mask_features(mel_AFM, counts_A, given, -1.0)
    expected = torch.zeros(2, 8, 12, dtype=torch.bool)
    expected[0, :, 2:5] = True
    expected[0, 2:4] = True
    expected[1, :, 0] = True
    expected[1, :, 7] = True  # frame 8 is beyond the row
    assert ((masked_AFM == -1) == expected).all()
    assert torch.equal(masked_AFM[~expected], mel_AFM[~expected])


@pytest.mark.parametrize("bins", [80, 128])
def test_bands_are_parts_of_the_mel_axis(bins: int) -> None:
    given = masks([[[0, 0]]], [[[0.1, 0.35]]])
    masked_1FM = mask_features(torch.ones(1, bins, 4), torch.tensor([2]), given, 0.0)
    covered = (masked_1FM[0, :, 0] == 0).nonzero().squeeze(1)
    assert len(covered) == bins // 4
    assert covered[0] == round(0.1 * bins)


def test_the_mean_is_the_rows_own() -> None:
    mel_AFM, counts_A = torch.rand(2, 80, 20), torch.tensor([10, 3])
    mel_AFM[1, :, 6:] = 0
    means = [float(mel_AFM[0].mean()), float(mel_AFM[1, :, :6].mean())]
    assert mean_of_rows(mel_AFM, counts_A).flatten().tolist() == pytest.approx(means)


def test_masks_of_chunks_are_those_of_the_whole() -> None:
    used_C = torch.tensor([True, True, True, True, False, False])
    given = masks([[[2990, 3010]], [[5, 9]]], [[[0.1, 0.2]], [[0.3, 0.4]]])
    cut = masks_of_chunks(given, CHUNK_FRAMES, used_C)
    positions_M = torch.arange(2 * CHUNK_FRAMES)
    low, high = cut.times_G2[..., :1], cut.times_G2[..., 1:]
    covered_CM = ((positions_M >= low) & (positions_M < high)).any(1)
    assert [row.nonzero().flatten().tolist() for row in covered_CM] == [
        [*range(2990, 3000)], [*range(10)], [], [5, 6, 7, 8],
    ]  # fmt: skip
    assert cut.bands_H2[:, 0, 0].tolist() == pytest.approx([0.1, 0.1, 0.1, 0.3])


def test_long_audio_is_masked_as_the_features_of_its_chunks() -> None:
    encoder = build_encoder(WhisperEncoder(id="random:whisper"), torch.float32, CPU)
    long = noise(CHUNK_SAMPLES + 32_000)
    audio_1N, lengths_1 = torch.from_numpy(long)[None], torch.tensor([len(long)])
    given = masks([[[2_900, 3_050]]], [[[0.5, 0.6]]])
    frames_1TD, _ = encoder(audio_1N, lengths_1, given)
    for start, end, span in ((0, CHUNK_SAMPLES, [2_900, 3_000]), (CHUNK_SAMPLES, None, [0, 50])):
        part_1N = audio_1N[:, start:end]
        alone_1TD, _ = encoder(
            part_1N, torch.tensor([part_1N.shape[1]]), masks([[span]], [[[0.5, 0.6]]])
        )
        first = start // 320
        torch.testing.assert_close(frames_1TD[:, first : first + alone_1TD.shape[1]], alone_1TD)


def test_batch_mates_and_their_masks_change_nothing() -> None:
    encoder = FilterbankFrames(80, 16)
    one, two = noise(8_000, seed=1), noise(16_000, seed=2)
    audio_AN = torch.zeros(2, 16_000, dtype=torch.int16)
    audio_AN[0, :8_000], audio_AN[1] = torch.from_numpy(one), torch.from_numpy(two)
    lengths_A = torch.tensor([8_000, 16_000])
    given = masks([[[3, 9], [0, 0]], [[20, 90], [1, 2]]], [[[0.2, 0.3]], [[0.0, 0.9]]])
    together_ATD, _ = encoder(audio_AN, lengths_A, given)
    alone_1TD, _ = encoder(audio_AN[:1, :8_000], lengths_A[:1], masks([[[3, 9]]], [[[0.2, 0.3]]]))
    torch.testing.assert_close(together_ATD[:1, : alone_1TD.shape[1]], alone_1TD)


def test_the_filterbank_gets_zeros_the_mean_of_its_bins() -> None:
    encoder = FilterbankFrames(80, 16)
    audio_1N, lengths_1 = torch.from_numpy(noise(16_000))[None], torch.tensor([16_000])
    everything = masks([[[0, 100]]], [[[0.0, 0.0]]])
    frames_1TD, _ = encoder(audio_1N, lengths_1, everything)
    torch.testing.assert_close(frames_1TD, encoder.projection.bias.expand_as(frames_1TD))


def test_empty_masks_are_no_masks() -> None:
    mel_1FM, counts_1 = LogMel(80)(torch.from_numpy(noise(5_000))[None], torch.tensor([5_000]))
    nothing = SpecMasks(torch.zeros(1, 3, 2, dtype=torch.int64), torch.zeros(1, 0, 2))
    masked_1FM = mask_features(mel_1FM, counts_1, nothing, mean_of_rows(mel_1FM, counts_1))
    assert np.array_equal(masked_1FM.numpy(), mel_1FM.numpy())
