"""Connectors: counts, who sees whom, and the options of the transformer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

import pytest
from pydantic import TypeAdapter
from speech_models import CONNECTORS

from speechllm.config import model as schema
from speechllm.model.connector import (
    TransformerConnector,
    build_connector,
    out_length,
    sinusoids,
)

IN, OUT = 16, 24
BASE = CONNECTORS["transformer"]


def config(**fields: Any) -> schema.Connector:
    return TypeAdapter(schema.Connector).validate_python(fields)


def build(cfg: schema.Connector) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_connector(cfg, IN, OUT).eval()


def frames(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", CONNECTORS)
@torch.no_grad()
def test_out_length_is_what_comes_out(kind: str) -> None:
    cfg = config(**CONNECTORS[kind])
    connector = build(cfg)
    lengths = np.arange(1, 51)
    expected = -(-lengths // cfg.downsampling_factor)
    assert [out_length(cfg, int(n)) for n in lengths] == expected.tolist()
    assert out_length(cfg, lengths).tolist() == expected.tolist()
    assert out_length(cfg, torch.from_numpy(lengths)).tolist() == expected.tolist()
    _, counts = connector(frames(50, 50, IN), torch.from_numpy(lengths))
    assert counts.tolist() == expected.tolist()
    for n in lengths.tolist():
        tokens, _ = connector(frames(1, n, IN), torch.tensor([n]))
        assert tokens.shape == (1, expected[n - 1], OUT)


@pytest.mark.parametrize("kind", CONNECTORS)
@torch.no_grad()
def test_batch_mates_and_what_lies_beyond_change_nothing(kind: str) -> None:
    connector = build(config(**CONNECTORS[kind]))
    lengths = torch.tensor([40, 1, 7, 23, 30])
    batch = frames(5, 40, IN)
    junk = batch.clone()
    for row, n in zip(junk, lengths, strict=True):
        row[n:] = torch.nan
    tokens, counts = connector(batch, lengths)
    tokens_of_junk, _ = connector(junk, lengths)
    for i, (n, k) in enumerate(zip(lengths, counts, strict=True)):
        alone, _ = connector(batch[i : i + 1, :n], lengths[i : i + 1])
        torch.testing.assert_close(tokens[i, :k], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(tokens_of_junk[i, :k], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [True, False])
@torch.no_grad()
def test_self_attention_sees_every_frame_and_none_beyond(norm_first: bool) -> None:
    connector = build(config(**{**BASE, "norm_first": norm_first}))
    length = torch.tensor([21])
    batch = frames(1, 30, IN)
    before, counts = connector(batch, length)
    assert counts.item() == 4
    for frame in (0, 8, 20):
        changed = batch.clone()
        changed[0, frame] += 1.0
        after, _ = connector(changed, length)
        moved = (after - before)[0, :4].abs().amax(-1)
        assert (moved > 1e-4).all(), f"frame {frame} reaches only some tokens: {moved}"
    changed = batch.clone()
    changed[0, 21:] += 1.0
    after, _ = connector(changed, length)
    assert torch.equal(after[0, :4], before[0, :4])


@torch.no_grad()
def test_stacking_keeps_frames_in_order() -> None:
    cfg = config(kind="linear", downsampling_factor=3)
    connector = build_connector(cfg, 2, 6)
    connector.out.weight.copy_(torch.eye(6))
    connector.out.bias.zero_()
    batch = torch.arange(1.0, 9.0).view(1, 4, 2)
    tokens, counts = connector(batch, torch.tensor([4]))
    assert counts.tolist() == [2]
    assert tokens.tolist() == [[[1, 2, 3, 4, 5, 6], [7, 8, 0, 0, 0, 0]]]


@torch.no_grad()
def test_convolution_windows_are_where_the_docstring_says() -> None:
    cfg = config(kind="conv1d", downsampling_factor=3, kernel_size=7, hidden_size=8)
    connector = build(cfg)
    batch = frames(1, 20, IN)
    before, _ = connector(batch, torch.tensor([20]))
    for token in range(7):
        seen = range(3 * token - 2, 3 * token + 5)
        for frame in range(20):
            changed = batch.clone()
            changed[0, frame] += 1.0
            after, _ = connector(changed, torch.tensor([20]))
            assert bool((after != before)[0, token].any()) == (frame in seen), (token, frame)


@torch.no_grad()
def test_transformer_equals_torchs_own_layers() -> None:
    for norm_first in (True, False):
        cfg = config(**{**BASE, "norm_first": norm_first, "add_final_norm": True})
        connector = build(cfg)
        assert isinstance(connector, TransformerConnector)
        x = connector.hidden(frames(2, 5, 6 * IN))
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        expected = x
        for layer in connector.layers:
            reference = torch.nn.TransformerEncoderLayer(
                32, 4, 64, 0.0, "gelu", batch_first=True, norm_first=norm_first
            ).train()
            pairs = {
                "self_attn.in_proj_": layer.qkv, "self_attn.out_proj.": layer.attention_out,
                "linear1.": layer.mlp_in, "linear2.": layer.mlp_out,
                "norm1.": layer.attention_norm, "norm2.": layer.mlp_norm,
            }  # fmt: skip
            reference.load_state_dict(
                {f"{k}{n}": p for k, part in pairs.items() for n, p in part.named_parameters()}
            )
            expected = reference(expected, src_key_padding_mask=padding)
        for layer in connector.layers:
            x = layer(x, ~padding[:, None, None])
        torch.testing.assert_close(x[~padding], expected[~padding], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_final_norm_normalises_what_goes_out() -> None:
    cfg = config(**{**BASE, "add_final_norm": True})
    with_norm, without = build(cfg), build(config(**BASE))
    assert isinstance(with_norm, TransformerConnector)
    assert isinstance(without, TransformerConnector)
    without.load_state_dict(with_norm.state_dict(), strict=False)
    batch, lengths = frames(1, 12, IN), torch.tensor([12])
    for connector in (with_norm, without):
        connector.out = torch.nn.Identity()  # type: ignore[assignment]
    hidden, _ = without(batch, lengths)
    expected = torch.nn.functional.layer_norm(hidden, (32,))
    torch.testing.assert_close(with_norm(batch, lengths)[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_positions_tell_equal_frames_apart_at_any_length() -> None:
    plain = build(config(**BASE))
    positional = build(config(**{**BASE, "use_positional_embeddings": True}))
    batch, length = torch.ones(1, 6 * 900, IN), torch.tensor([6 * 900])
    tokens, counts = plain(batch, length)
    assert counts.item() == 900
    torch.testing.assert_close(tokens[0, 0], tokens[0, -1], atol=1e-5, rtol=1e-5)
    tokens, _ = positional(batch, length)
    nearest = torch.cdist(tokens[0], tokens[0]).fill_diagonal_(torch.inf).min()
    assert nearest > 1e-4


def test_sinusoids_of_the_paper() -> None:
    table = sinusoids(4, 6, torch.device("cpu"))
    rate = 10_000 ** (-1 / 3)
    torch.testing.assert_close(table[3, 1].item(), float(np.sin(3 * rate)), atol=1e-6, rtol=0)
    torch.testing.assert_close(table[3, 4].item(), float(np.cos(3 * rate)), atol=1e-6, rtol=0)
    assert sinusoids(4, 5, torch.device("cpu")).shape == (4, 5)


@pytest.mark.parametrize("kind", ["transformer", "mlp", "conv1d"])
def test_dropout_acts_in_training_only(kind: str) -> None:
    connector = build(config(**{**CONNECTORS[kind], "dropout": 0.5}))
    batch, lengths = frames(2, 30, IN), torch.tensor([30, 20])
    assert torch.equal(connector(batch, lengths)[0], connector(batch, lengths)[0])
    connector.train()
    assert not torch.equal(connector(batch, lengths)[0], connector(batch, lengths)[0])
    without = build(config(**{**CONNECTORS[kind], "dropout": 0.0})).train()
    assert torch.equal(without(batch, lengths)[0], without(batch, lengths)[0])


@pytest.mark.parametrize("kind", CONNECTORS)
@torch.no_grad()
def test_output_starts_at_the_scale_asked_for(kind: str) -> None:
    torch.manual_seed(0)
    connector = build_connector(config(**CONNECTORS[kind]), IN, OUT, out_rms=0.02)
    assert connector.training
    tokens, _ = connector.eval()(frames(4, 60, IN), torch.full((4,), 60))
    assert 0.015 < tokens.square().mean().sqrt() < 0.025
