"""SpecAugment's masks on log-mel features, where the features are: on the device.

Shape legend: A utterances, C chunks, G masks, F mel bins, M mel frames (100 per second), T encoder
frames (50 per second).
"""

from __future__ import annotations

import torch
from torch import Tensor

from speechllm.types import SpecMasks


def mask_features(
    mel_AFM: Tensor, counts_A: Tensor, masks: SpecMasks, fill_A11: Tensor | float
) -> Tensor:
    """Features [A, F, M] with what is masked replaced by `fill_A11`.

    counts_A: encoder frames of each row. Nothing is written beyond them.
    """
    _, bins, frames = mel_AFM.shape
    positions_M = torch.arange(frames, device=mel_AFM.device)
    in_time_AM = _within(positions_M, masks.times_G2)
    middles_F = (torch.arange(bins, device=mel_AFM.device) + 0.5) / bins
    in_band_AF = _within(middles_F, masks.bands_H2)
    inside_A1M = (positions_M < 2 * counts_A[:, None])[:, None]
    masked_AFM = (in_time_AM[:, None] | in_band_AF[:, :, None]) & inside_A1M
    return torch.where(masked_AFM, fill_A11, mel_AFM)


def mean_of_rows(mel_AFM: Tensor, counts_A: Tensor) -> Tensor:
    """[A, 1, 1]: the mean feature of each row, whose features beyond its own frames are zero."""
    return mel_AFM.sum((1, 2), keepdim=True) / (2 * mel_AFM.shape[1] * counts_A[:, None, None])


def masks_of_chunks(masks: SpecMasks, chunk_frames: int, used_C: Tensor) -> SpecMasks:
    """The masks of rows that were cut into chunks of `chunk_frames` encoder frames, row by row.

    used_C: bool, which of the chunks are there.
    """
    rows, spans, _ = masks.times_G2.shape
    chunks = len(used_C) // rows
    starts = 2 * chunk_frames * torch.arange(chunks, device=used_C.device)
    times_CG2 = (masks.times_G2[:, None] - starts[:, None, None]).reshape(-1, spans, 2)
    return SpecMasks(times_CG2[used_C], masks.bands_H2.repeat_interleave(chunks, 0)[used_C])


def _within(positions: Tensor, edges_AG2: Tensor) -> Tensor:
    """bool [A, positions]: within any of the spans [first, after the last)."""
    low_AG1, high_AG1 = edges_AG2[:, :, :1], edges_AG2[:, :, 1:]
    return ((positions >= low_AG1) & (positions < high_AG1)).any(1)
