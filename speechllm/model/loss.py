"""Cross entropy over the positions that are trained.

Shape legend: L positions with a label, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from speechllm.types import LossSums


def label_loss(logits_LV: Tensor, labels_L: Tensor) -> LossSums:
    """Sums over L positions; no mean, since the divisor is the target tokens of the whole step.

    logits_LV: any float type, computed on in fp32. labels_L: int64, none ignored. Nothing is
    trained when L is 0: the loss is then a zero that still has a gradient function.
    """
    loss = functional.cross_entropy(logits_LV.float(), labels_L, reduction="sum")
    with torch.no_grad():
        correct = (logits_LV.argmax(-1) == labels_L).sum()
    return LossSums(loss, correct, torch.tensor(len(labels_L), device=logits_LV.device))
