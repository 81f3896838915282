"""Log-mel spectrogram from int16 waveforms, on the device the model runs on.

Shape legend: A utterances, N samples at 16 kHz, F mel bins, M mel frames (100 per second),
T encoder frames (50 per second).
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from transformers.audio_utils import mel_filter_bank

from speechllm.types import SAMPLE_RATE

FRAME_SAMPLES = 320  # samples of one encoder frame: two mel frames
MEL_HOP = 160
WINDOW = 400

Count = TypeVar("Count", int, np.ndarray, Tensor)


def num_frames(num_samples: Count) -> Count:
    """Encoder frames (50 per second) of `num_samples` samples; an incomplete frame counts."""
    return (num_samples + FRAME_SAMPLES - 1) // FRAME_SAMPLES


class LogMel(nn.Module):
    """Whisper's log-mel features, one utterance's independent of its batch mates.

    The waveform of each utterance ends in zeros up to a whole encoder frame. What follows it in
    the batch plays no part: the reflection at the end of the STFT is written at each row's own
    end, and the floor (8 decades below the loudest bin) is each row's own. Equal to
    `transformers.WhisperFeatureExtractor` on the same zero-padded input.

    Always fp32, also under autocast: bf16 filters cost 1e-2 in the features.
    """

    mel_filters_FK: Tensor
    window: Tensor

    def __init__(self, mels: int) -> None:
        super().__init__()
        filters_KF = mel_filter_bank(
            num_frequency_bins=1 + WINDOW // 2,
            num_mel_filters=mels,
            min_frequency=0.0,
            max_frequency=SAMPLE_RATE / 2,
            sampling_rate=SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        filters_FK = torch.from_numpy(filters_KF.T.copy()).float()
        self.register_buffer("mel_filters_FK", filters_FK, persistent=False)
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)

    @torch.no_grad()
    def forward(self, audio_AN: Tensor, lengths_A: Tensor) -> tuple[Tensor, Tensor]:
        """int16 [A, N] and samples [A] -> features fp32 [A, F, M] and encoder frames [A].

        M is twice the encoder frames that N samples give; features beyond a row's own length are
        zero.
        """
        frames_A = num_frames(lengths_A)
        num_mel_frames = 2 * num_frames(audio_AN.shape[1])
        with torch.autocast(audio_AN.device.type, enabled=False):
            wave_AN = _with_reflected_ends(audio_AN, lengths_A, frames_A)
            stft_AKM = torch.stft(
                wave_AN, WINDOW, MEL_HOP, window=self.window, center=False, return_complex=True
            )
            # One frame more than is used; the copy keeps the product off the slow strided path.
            power_AKM = stft_AKM[..., :num_mel_frames].abs().square().contiguous()
            mel_AFM = (self.mel_filters_FK @ power_AKM).clamp_(min=1e-10).log10_()
            positions_M = torch.arange(num_mel_frames, device=mel_AFM.device)
            outside_A1M = (positions_M >= 2 * frames_A[:, None])[:, None]
            loudest_A11 = mel_AFM.masked_fill(outside_A1M, -torch.inf).amax((1, 2), keepdim=True)
            mel_AFM = torch.maximum(mel_AFM, loudest_A11 - 8.0).add_(4.0).div_(4.0)
            return mel_AFM.masked_fill_(outside_A1M, 0.0), frames_A


def _with_reflected_ends(audio_AN: Tensor, lengths_A: Tensor, frames_A: Tensor) -> Tensor:
    """fp32 waveforms in [-1, 1), each reflected by half a window at its own two ends."""
    half = WINDOW // 2
    num_samples = num_frames(audio_AN.shape[1]) * FRAME_SAMPLES
    positions_N = torch.arange(audio_AN.shape[1], device=audio_AN.device)
    wave_AN = audio_AN.float().div_(32768.0).masked_fill_(positions_N >= lengths_A[:, None], 0.0)
    padded_AN = wave_AN.new_zeros(len(wave_AN), num_samples + 2 * half)
    padded_AN[:, half : half + wave_AN.shape[1]] = wave_AN
    padded_AN[:, :half] = padded_AN[:, half + 1 : WINDOW + 1].flip(1)
    end_A1 = frames_A[:, None] * FRAME_SAMPLES + half
    offsets_R = torch.arange(half, device=audio_AN.device)
    reflected_AR = padded_AN.gather(1, end_A1 - 2 - offsets_R)
    return padded_AN.scatter_(1, end_A1 + offsets_R, reflected_AR)
