"""The loss is a sum in nats, and counts what it says."""

from __future__ import annotations

import math

import torch

from speechllm.model.loss import label_loss


def test_sums_in_nats() -> None:
    logits_LV = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7], [0.3, 0.3, 0.4]]))
    sums = label_loss(logits_LV, torch.tensor([0, 1, 2]))
    expected = -math.log(0.5) - math.log(0.2) - math.log(0.4)
    torch.testing.assert_close(sums.loss.item(), expected, atol=1e-6, rtol=1e-6)
    assert (sums.correct.item(), sums.tokens.item()) == (2, 3)


def test_bf16_logits_are_summed_in_fp32() -> None:
    logits_LV = torch.randn(700, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels_L = torch.arange(700) % 50
    sums = label_loss(logits_LV, labels_L)
    assert sums.loss.dtype == torch.float32
    torch.testing.assert_close(sums.loss, label_loss(logits_LV.double(), labels_L).loss)


def test_no_labels_give_a_zero_with_a_gradient() -> None:
    logits_LV = torch.zeros(0, 5, requires_grad=True)
    sums = label_loss(logits_LV, torch.zeros(0, dtype=torch.int64))
    sums.loss.backward()
    assert (sums.loss.item(), sums.correct.item(), sums.tokens.item()) == (0, 0, 0)
    assert logits_LV.grad is not None
