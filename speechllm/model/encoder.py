"""Frames (50 per second) from waveforms: the frozen Whisper encoder, or a trainable filterbank.

Shape legend: A utterances, C chunks of at most 30 s, N samples at 16 kHz, F mel bins, M mel frames
(100 per second), T frames, D width of the frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformers.models.whisper.modeling_whisper import WhisperEncoder

from speechllm.model.frontend import FRAME_SAMPLES, LogMel, num_frames
from speechllm.model.specaugment import mask_features, masks_of_chunks, mean_of_rows
from speechllm.types import SpecMasks

CHUNK_FRAMES = 1500  # what every released Whisper has positions for: 30 s
CHUNK_SAMPLES = CHUNK_FRAMES * FRAME_SAMPLES


class WhisperFrames(nn.Module):
    """Whisper's encoder (Radford et al. 2022, arXiv:2212.04356) on audio of any length.

    `WhisperEncoder.forward` takes 30 s and nothing else and knows no key mask. This forward runs
    the same modules on the frames there are: equal to the bit for 30 s, and for 5 s at a seventh
    of the cost. Attention sees an utterance's own frames only, so batch mates change nothing.
    """

    def __init__(self, encoder: WhisperEncoder, context: Literal["trim", "pad30"]) -> None:
        super().__init__()
        assert encoder.config.max_source_positions == CHUNK_FRAMES
        self.log_mel = LogMel(encoder.config.num_mel_bins)
        self.encoder = encoder
        self.context = context

    @property
    def width(self) -> int:
        """D."""
        return int(self.encoder.config.d_model)

    def forward(
        self,
        audio_AN: Tensor,
        lengths_A: Tensor,
        masks: SpecMasks | None = None,
        samples: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """int16 [A, N] and samples [A] (1 or more) -> frames [A, T, D] and frame counts [A].

        T is what N samples give; frames beyond a row's count are arbitrary. `masks` are put on the
        log-mel features. `samples` says on the host what `lengths_A` holds, so that the device need
        not be asked.
        """
        if samples is None:
            samples = lengths_A.tolist()
        if audio_AN.shape[1] > CHUNK_SAMPLES:
            chunks_CN, chunk_lengths_C, used_C = _cut(audio_AN, lengths_A)
            if masks is not None:
                masks = masks_of_chunks(masks, CHUNK_FRAMES, used_C)
            # The last chunk of a row is shorter than the others of a batch, but for chance.
            frames_CTD, counts_C = self._encode(chunks_CN, chunk_lengths_C, masks, ragged=True)
            return _join(frames_CTD, counts_C, num_frames(lengths_A), num_frames(audio_AN.shape[1]))
        ragged = num_frames(min(samples)) < num_frames(audio_AN.shape[1])
        return self._encode(audio_AN, lengths_A, masks, ragged=ragged)

    def _encode(
        self, audio_AN: Tensor, lengths_A: Tensor, masks: SpecMasks | None, *, ragged: bool
    ) -> tuple[Tensor, Tensor]:
        counts_A = num_frames(lengths_A)
        if self.context == "trim":
            mel_AFM, seen_A = self.log_mel(audio_AN, lengths_A)
            mel_AFM = _masked(mel_AFM, seen_A, masks)
            return self._transformer(mel_AFM, seen_A, ragged=ragged), counts_A
        positions_N = torch.arange(audio_AN.shape[1], device=audio_AN.device)
        audio_AN = audio_AN.masked_fill(positions_N >= lengths_A[:, None], 0)
        padded_AN = functional.pad(audio_AN, (0, CHUNK_SAMPLES - audio_AN.shape[1]))
        mel_AFM, seen_A = self.log_mel(padded_AN, torch.full_like(lengths_A, CHUNK_SAMPLES))
        frames_ATD = self._transformer(_masked(mel_AFM, seen_A, masks), seen_A, ragged=False)
        return frames_ATD[:, : num_frames(audio_AN.shape[1])], counts_A

    def _transformer(self, mel_AFM: Tensor, counts_A: Tensor, *, ragged: bool) -> Tensor:
        """Features and their frame counts -> frames; rows' padding, where there is any
        (`ragged`), is never attended to.

        The convolutions need no mask: features beyond a row's count are zero like a convolution's
        own padding, and a row's last frame ends with its last feature.
        """
        encoder = self.encoder
        x_ADM = functional.gelu(encoder.conv1(mel_AFM.to(encoder.conv1.weight.dtype)))
        x_ATD = functional.gelu(encoder.conv2(x_ADM)).transpose(1, 2)
        positions_T = torch.arange(x_ATD.shape[1], device=x_ATD.device)
        x_ATD = x_ATD + encoder.embed_positions(positions_T)
        x_ATD = functional.dropout(x_ATD, p=encoder.dropout, training=self.training)
        mask_A11T = None
        if ragged:
            padding_AT = positions_T >= counts_A[:, None]
            lowest = torch.finfo(x_ATD.dtype).min
            mask_A11T = x_ATD.new_zeros(padding_AT.shape).masked_fill_(padding_AT, lowest)
            mask_A11T = mask_A11T[:, None, None]
        for layer in encoder.layers:
            x_ATD = layer(x_ATD, mask_A11T)
        return encoder.layer_norm(x_ATD)


class FilterbankFrames(nn.Module):
    """Log-mel features, two stacked to a frame and projected; trained with the connector.

    Each mel bin is brought to zero mean and unit variance over the utterance, which takes out
    loudness and channel.
    """

    def __init__(self, mels: int, hidden_size: int) -> None:
        super().__init__()
        self.log_mel = LogMel(mels)
        self.projection = nn.Linear(2 * mels, hidden_size)

    @property
    def width(self) -> int:
        """D."""
        return self.projection.out_features

    def forward(
        self,
        audio_AN: Tensor,
        lengths_A: Tensor,
        masks: SpecMasks | None = None,
        samples: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """int16 [A, N] and samples [A] (1 or more) -> frames [A, T, D] and frame counts [A].

        T is what N samples give; frames beyond a row's count are arbitrary. `masks` are put on the
        log-mel features.
        """
        mel_AFM, counts_A = self.log_mel(audio_AN, lengths_A)
        num_A11 = 2 * counts_A[:, None, None]
        outside_A1M = torch.arange(mel_AFM.shape[2], device=mel_AFM.device) >= num_A11
        mean_AF1 = mel_AFM.sum(2, keepdim=True) / num_A11  # features outside are zero
        centred_AFM = (mel_AFM - mean_AF1).masked_fill(outside_A1M, 0.0)
        variance_AF1 = centred_AFM.square().sum(2, keepdim=True) / num_A11
        x_AFM = centred_AFM * torch.rsqrt(variance_AF1 + 1e-5)
        if masks is not None:
            x_AFM = mask_features(x_AFM, counts_A, masks, 0.0)  # the mean of every bin
        x_AMF = x_AFM.transpose(1, 2)
        x_ATF = x_AMF.reshape(len(x_AMF), x_AMF.shape[1] // 2, 2 * x_AMF.shape[2])
        return self.projection(x_ATF), counts_A


def _masked(mel_AFM: Tensor, counts_A: Tensor, masks: SpecMasks | None) -> Tensor:
    """A frozen encoder has seen no zeros of a mask: the utterance's mean is as little as can be."""
    if masks is None:
        return mel_AFM
    return mask_features(mel_AFM, counts_A, masks, mean_of_rows(mel_AFM, counts_A))


def _cut(audio_AN: Tensor, lengths_A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks of 30 s, row by row, the last of a row as long as what is left of it; their samples;
    and which chunks of the rectangle of all rows these are."""
    chunks_a_row = -(-audio_AN.shape[1] // CHUNK_SAMPLES)
    padded_AN = functional.pad(audio_AN, (0, chunks_a_row * CHUNK_SAMPLES - audio_AN.shape[1]))
    starts = torch.arange(chunks_a_row, device=lengths_A.device) * CHUNK_SAMPLES
    lengths = (lengths_A[:, None] - starts).clamp(max=CHUNK_SAMPLES).flatten()
    used_C = lengths > 0
    return padded_AN.view(-1, CHUNK_SAMPLES)[used_C], lengths[used_C], used_C


def _join(
    frames_CTD: Tensor, counts_C: Tensor, counts_A: Tensor, length: int
) -> tuple[Tensor, Tensor]:
    """The chunks' frames in their rows again: chunks and rows are in the same order."""
    positions = torch.arange(max(length, frames_CTD.shape[1]), device=counts_A.device)
    joined_ATD = frames_CTD.new_zeros(len(counts_A), length, frames_CTD.shape[2])
    inside_CT = positions[: frames_CTD.shape[1]] < counts_C[:, None]
    inside_AT = positions[:length] < counts_A[:, None]
    joined_ATD[inside_AT] = frames_CTD[inside_CT]
    return joined_ATD, counts_A
