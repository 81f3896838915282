"""Output matrix and cross entropy without logits that outlive their use.

Shape legend: L positions with a label, C of them at a time, W width of the LLM, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from transformers import PreTrainedModel

from speechllm.errors import ConfigError
from speechllm.model.families import KNOWN
from speechllm.types import LossSums

MEGABYTE = 1 << 20


def plain_head(llm: PreTrainedModel) -> nn.Linear | None:
    """The output matrix, where logits are nothing else than its product and it is frozen."""
    head = llm.get_output_embeddings()
    known = llm.config.model_type in KNOWN and type(head) is nn.Linear
    if not known or any(parameter.requires_grad for parameter in head.parameters()):
        return None
    assert isinstance(head, nn.Linear)
    return head


class _LabelLoss(torch.autograd.Function):
    """Sum of cross entropies, and right guesses. The gradient is found with the value, while a
    chunk of logits is at hand and in its place."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_LW: Tensor,
        weight_VW: Tensor,
        bias_V: Tensor | None,
        labels_L: Tensor,
        rows: int,
    ) -> tuple[Tensor, Tensor]:
        loss = torch.zeros((), device=hidden_LW.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden_LW.device)
        slopes = []
        chunks = zip(hidden_LW.split(rows), labels_L.split(rows), strict=True)
        for hidden_CW, labels_C in chunks if len(labels_L) else ():
            logits_CV = functional.linear(hidden_CW, weight_VW, bias_V).float()
            # By hand and in place: a quarter faster on a CPU than log_softmax and its exponential.
            largest_C, guesses_C = logits_CV.max(1)
            correct += (guesses_C == labels_C).sum()
            wanted_C = logits_CV.gather(1, labels_C[:, None])[:, 0] - largest_C
            shares_CV = logits_CV.sub_(largest_C[:, None]).exp_()
            totals_C = shares_CV.sum(1)
            loss += (totals_C.log() - wanted_C).sum()
            if ctx.needs_input_grad[0]:
                shares_CV.mul_(totals_C.reciprocal_()[:, None])
                shares_CV.scatter_add_(1, labels_C[:, None], -torch.ones_like(shares_CV[:, :1]))
                slopes.append(shares_CV.to(weight_VW.dtype) @ weight_VW)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(torch.cat(slopes) if slopes else torch.zeros_like(hidden_LW))
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        (slope_LW,) = ctx.saved_tensors
        return grads[0] * slope_LW, None, None, None, None


def chunked_loss(
    hidden_LW: Tensor, head: nn.Linear, labels_L: Tensor, *, megabytes: int
) -> LossSums:
    """As `speechllm.model.loss.label_loss` of the head's logits, of which no more than `megabytes`
    (fp32) are there at a time.

    The head must be frozen: only `hidden_LW` gets a gradient.
    """
    weight_VW: Tensor = head.weight
    bias_V: Tensor | None = head.bias
    rows = max(1, megabytes * MEGABYTE // (4 * len(weight_VW)))
    device = hidden_LW.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        weight_VW = weight_VW.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
    with torch.autocast(device, enabled=False):
        loss, correct = _LabelLoss.apply(
            hidden_LW.to(weight_VW.dtype), weight_VW, bias_V, labels_L, rows
        )
    return LossSums(loss, correct, torch.full((), len(labels_L), device=hidden_LW.device))


def liger_loss(hidden_LW: Tensor, head: nn.Linear, labels_L: Tensor) -> LossSums:
    """As `chunked_loss`, by the kernels of liger-kernel. Never run here: it wants CUDA."""
    output = _liger()(head.weight, hidden_LW.to(head.weight.dtype), labels_L, head.bias)
    correct = (output.predicted_tokens == labels_L).sum()
    return LossSums(output.loss, correct, torch.full((), len(labels_L), device=hidden_LW.device))


def _liger() -> Any:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss(reduction="sum", return_predicted_tokens=True)


def refuse_liger(device: torch.device, head: nn.Linear | None, model_type: str) -> None:
    """Raise ConfigError unless `performance.head: liger` can be had."""
    if device.type != "cuda":
        raise ConfigError(
            f"performance.head=liger: the kernels of liger-kernel run on CUDA only, and this is "
            f"{device.type}; set performance.head=torch"
        )
    if head is None:
        raise ConfigError(
            f"performance.head=liger: the logits of this {model_type} model are not known to be "
            "the product with a frozen output matrix and no more; set performance.head=torch"
        )
    try:
        _liger()
    except (ImportError, TypeError) as error:
        raise ConfigError(
            f'performance.head=liger: {error}; pip install -U "speechllm[liger]" (0.8.0 is the '
            "first liger-kernel that will do), or set performance.head=torch"
        ) from error
