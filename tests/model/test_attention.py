"""Grouped attention gives what transformers' eager attention gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from transformers.models.llama.modeling_llama import eager_attention_forward

import pytest

from speechllm.errors import ModelError
from speechllm.model.attention import grouped_attention

WIDTH, NEW, KEYS = 16, 7, 11


def states(heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """Laid out as a model has them: heads were split off from the last axis."""
    draw = torch.Generator().manual_seed(3)
    return [
        torch.randn(2, columns, count, WIDTH, generator=draw)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for columns, count in ((NEW, heads), (KEYS, groups), (KEYS, groups))
    ]


def mask_of(dtype: torch.dtype) -> Tensor:
    seen = torch.ones(2, 1, NEW, KEYS, dtype=torch.bool).tril(KEYS - NEW)
    seen[1, 0, :, 2:4] = False
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def attended(function: Any, inputs: list[Tensor], mask: Tensor | None, groups: int) -> list[Tensor]:
    module: Any = SimpleNamespace(num_key_value_groups=groups, training=False)
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out, _ = function(module, *leaves, mask, 0.3)
    weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
    (out * weights).sum().backward()
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    assert len(gradients) == 3
    return [out.detach(), *gradients]


@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("masked", [True, False])
def test_output_and_gradients_are_those_of_eager_attention(
    heads: int, groups: int, masked: bool
) -> None:
    inputs = states(heads, groups, torch.float32)
    mask = mask_of(torch.float32) if masked else None
    found = attended(grouped_attention, inputs, mask, heads // groups)
    expected = attended(eager_attention_forward, inputs, mask, heads // groups)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)


def test_bf16_is_as_near_to_the_truth_as_eager_attention() -> None:
    inputs = states(6, 2, torch.bfloat16)
    truth = attended(
        eager_attention_forward, [x.float() for x in inputs], mask_of(torch.float32), 3
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attended(grouped_attention, inputs, mask_of(torch.bfloat16), 3)
        eager = attended(eager_attention_forward, inputs, mask_of(torch.bfloat16), 3)
    for one, other, true in zip(found, eager, truth, strict=True):
        assert one.dtype == torch.bfloat16
        distance = (one.float() - true).norm()
        assert distance < 1.5 * (other.float() - true).norm()


@pytest.mark.parametrize("unknown", [{"softcap": 30.0}, {"dropout": 0.1}, {"s_aux": torch.ones(6)}])
def test_what_it_does_not_know_is_refused(unknown: dict[str, Any]) -> None:
    module: Any = SimpleNamespace()
    query, key, value = states(6, 2, torch.float32)
    with pytest.raises(ModelError, match="set it to eager"):
        grouped_attention(module, query, key, value, None, 0.3, **unknown)
