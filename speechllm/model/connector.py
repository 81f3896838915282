"""The part that trains: frames of the encoder in, audio tokens for the LLM out.

Shape legend: A utterances, T frames (50 per second), K audio tokens, D width of the frames,
W width of the LLM's embeddings, H hidden width, G heads, E width of a head.

Every connector turns n frames into `out_length(cfg, n)` tokens. Frames beyond a row's count are
zeroed before anything mixes frames, so a token depends on its own utterance alone.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from speechllm.config import model as schema

Count = TypeVar("Count", int, np.ndarray, Tensor)

CHECK_FRAMES = 96  # length of the noise by which the output's scale is set


def out_length(cfg: schema.Connector, frames: Count) -> Count:
    """Audio tokens of `frames` frames: one for each `downsampling_factor` begun.

    The one place where this is computed: planner, collator and forward all come here.
    """
    return (frames + cfg.downsampling_factor - 1) // cfg.downsampling_factor


def build_connector(
    cfg: schema.Connector, in_dim: int, out_dim: int, *, out_rms: float | None = None
) -> nn.Module:
    """A connector with fresh weights from torch's random state, fp32, on the CPU.

    All have forward(frames [A, T, in_dim], counts [A]) -> (tokens [A, K, out_dim], counts [A]).

    Args:
        out_rms: root mean square that the tokens' elements shall have at first (the LLM's own
            embeddings'), reached by scaling the last weight matrix. None leaves torch's default.
    """
    connector: nn.Module
    match cfg.kind:
        case "transformer":
            connector = TransformerConnector(cfg, in_dim, out_dim)
        case "mlp":
            connector = MLPConnector(cfg, in_dim, out_dim)
        case "linear":
            connector = LinearConnector(cfg, in_dim, out_dim)
        case "conv1d":
            connector = Conv1dConnector(cfg, in_dim, out_dim)
    if out_rms is not None:
        _scale_output(connector, in_dim, out_rms)
    return connector


@torch.no_grad()
def _scale_output(connector: nn.Module, in_dim: int, out_rms: float) -> None:
    """Scale `out` (weight and bias) so that unit noise comes out with `out_rms`."""
    out = connector.get_submodule("out")
    assert isinstance(out, nn.Linear)
    was_training = connector.training
    connector.eval()
    noise_1TD = torch.randn(1, CHECK_FRAMES, in_dim)
    tokens_1KW, _ = connector(noise_1TD, torch.tensor([CHECK_FRAMES]))
    factor = out_rms / tokens_1KW.square().mean().sqrt()
    out.weight.mul_(factor)
    out.bias.mul_(factor)
    connector.train(was_training)


def _zero_padding(frames_ATD: Tensor, counts_A: Tensor) -> Tensor:
    positions_T = torch.arange(frames_ATD.shape[1], device=frames_ATD.device)
    return frames_ATD.masked_fill((positions_T >= counts_A[:, None])[..., None], 0.0)


def _stack(frames_ATD: Tensor, counts_A: Tensor, factor: int) -> Tensor:
    """`factor` neighbours side by side, [A, K, factor * D]; a row's last token ends in zeros."""
    num_frames = frames_ATD.shape[1]
    frames_ATD = _zero_padding(frames_ATD, counts_A)
    padded_ATD = functional.pad(frames_ATD, (0, 0, 0, -num_frames % factor))
    return padded_ATD.reshape(len(frames_ATD), -1, factor * frames_ATD.shape[2])


class LinearConnector(nn.Module):
    """Stacked frames, one linear map."""

    def __init__(self, cfg: schema.LinearConnector, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.out = nn.Linear(cfg.downsampling_factor * in_dim, out_dim)

    def forward(self, frames_ATD: Tensor, counts_A: Tensor) -> tuple[Tensor, Tensor]:
        stacked_AKD = _stack(frames_ATD, counts_A, self.cfg.downsampling_factor)
        return self.out(stacked_AKD), out_length(self.cfg, counts_A)


class MLPConnector(nn.Module):
    """Stacked frames, LayerNorm, two linear maps with GELU between."""

    def __init__(self, cfg: schema.MLPConnector, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.norm = nn.LayerNorm(cfg.downsampling_factor * in_dim)
        self.hidden = nn.Linear(cfg.downsampling_factor * in_dim, cfg.hidden_size)
        self.dropout = nn.Dropout(cfg.dropout)
        self.out = nn.Linear(cfg.hidden_size, out_dim)

    def forward(self, frames_ATD: Tensor, counts_A: Tensor) -> tuple[Tensor, Tensor]:
        stacked_AKD = _stack(frames_ATD, counts_A, self.cfg.downsampling_factor)
        x_AKH = functional.gelu(self.hidden(self.norm(stacked_AKD)))
        return self.out(self.dropout(x_AKH)), out_length(self.cfg, counts_A)


class Conv1dConnector(nn.Module):
    """A strided convolution, GELU, a linear map. Token k sees `kernel_size` frames about its own.

    The window of token k covers frames k*f - l to k*f - l + kernel_size - 1 for stride f and
    l = max(0, kernel_size - f) // 2; what lies outside the utterance is zero.
    """

    def __init__(self, cfg: schema.Conv1dConnector, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.conv = nn.Conv1d(in_dim, cfg.hidden_size, cfg.kernel_size, cfg.downsampling_factor)
        self.dropout = nn.Dropout(cfg.dropout)
        self.out = nn.Linear(cfg.hidden_size, out_dim)

    def forward(self, frames_ATD: Tensor, counts_A: Tensor) -> tuple[Tensor, Tensor]:
        num_frames = frames_ATD.shape[1]
        kernel, stride = self.cfg.kernel_size, self.cfg.downsampling_factor
        left = max(0, kernel - stride) // 2
        # Exactly as long as the last token needs; negative padding drops frames no window meets.
        right = (out_length(self.cfg, num_frames) - 1) * stride + kernel - left - num_frames
        frames_ADT = _zero_padding(frames_ATD, counts_A).transpose(1, 2)
        x_AHK = functional.gelu(self.conv(functional.pad(frames_ADT, (left, right))))
        return self.out(self.dropout(x_AHK.transpose(1, 2))), out_length(self.cfg, counts_A)


class TransformerConnector(nn.Module):
    """Stacked frames, a linear map, bidirectional transformer layers, a linear map."""

    def __init__(self, cfg: schema.TransformerConnector, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.hidden = nn.Linear(cfg.downsampling_factor * in_dim, cfg.hidden_size)
        self.dropout = nn.Dropout(cfg.dropout)
        self.layers = nn.ModuleList(TransformerLayer(cfg) for _ in range(cfg.num_layers))
        self.final_norm = nn.LayerNorm(cfg.hidden_size) if cfg.add_final_norm else nn.Identity()
        self.out = nn.Linear(cfg.hidden_size, out_dim)

    def forward(self, frames_ATD: Tensor, counts_A: Tensor) -> tuple[Tensor, Tensor]:
        counts_A = counts_A.to(frames_ATD.device)
        x_AKH = self.hidden(_stack(frames_ATD, counts_A, self.cfg.downsampling_factor))
        if self.cfg.use_positional_embeddings:
            x_AKH = x_AKH + sinusoids(x_AKH.shape[1], x_AKH.shape[2], x_AKH.device).to(x_AKH.dtype)
        x_AKH = self.dropout(x_AKH)
        token_counts_A = out_length(self.cfg, counts_A)
        positions_K = torch.arange(x_AKH.shape[1], device=x_AKH.device)
        visible_A11K = (positions_K < token_counts_A[:, None])[:, None, None]
        for layer in self.layers:
            x_AKH = layer(x_AKH, visible_A11K)
        return self.out(self.final_norm(x_AKH)), token_counts_A


class TransformerLayer(nn.Module):
    """Self-attention and a GELU feed-forward part, pre-norm or post-norm (arXiv:2002.04745)."""

    def __init__(self, cfg: schema.TransformerConnector) -> None:
        super().__init__()
        self.norm_first = cfg.norm_first
        self.num_heads = cfg.num_heads
        self.dropout = cfg.dropout
        self.attention_norm = nn.LayerNorm(cfg.hidden_size)
        self.qkv = nn.Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.attention_out = nn.Linear(cfg.hidden_size, cfg.hidden_size)
        self.mlp_norm = nn.LayerNorm(cfg.hidden_size)
        self.mlp_in = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.mlp_out = nn.Linear(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x_AKH: Tensor, visible_A11K: Tensor) -> Tensor:
        """visible_A11K: bool, True for the tokens that attention may see."""
        if self.norm_first:
            x_AKH = x_AKH + self._attention(self.attention_norm(x_AKH), visible_A11K)
            return x_AKH + self._mlp(self.mlp_norm(x_AKH))
        x_AKH = self.attention_norm(x_AKH + self._attention(x_AKH, visible_A11K))
        return self.mlp_norm(x_AKH + self._mlp(x_AKH))

    def _attention(self, x_AKH: Tensor, visible_A11K: Tensor) -> Tensor:
        qkv_3AGKE = self.qkv(x_AKH).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query_AGKE, key_AGKE, value_AGKE = qkv_3AGKE.unbind(0)
        mixed_AGKE = functional.scaled_dot_product_attention(
            query_AGKE,
            key_AGKE,
            value_AGKE,
            attn_mask=visible_A11K,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self._drop(self.attention_out(mixed_AGKE.transpose(1, 2).flatten(2)))

    def _mlp(self, x_AKH: Tensor) -> Tensor:
        return self._drop(self.mlp_out(self._drop(functional.gelu(self.mlp_in(x_AKH)))))

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, self.training)


def sinusoids(length: int, width: int, device: torch.device) -> Tensor:
    """fp32 [length, width] of Vaswani et al. 2017 (arXiv:1706.03762), sines first; any length."""
    pairs = (width + 1) // 2
    rates = torch.exp(torch.arange(pairs, device=device) * (-math.log(10_000.0) / max(pairs, 1)))
    angles = torch.arange(length, device=device)[:, None] * rates
    return torch.cat((angles.sin(), angles.cos()), dim=1)[:, :width]
