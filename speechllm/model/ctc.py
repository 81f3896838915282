"""CTC between audio tokens and the LLM's own token embeddings: a start for the connector.

Shape legend: A audio segments, K audio tokens, W width of the LLM's embeddings, V vocabulary,
N audio tokens that are no padding, U columns: blank, different target ids, all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from speechllm.types import LossSums

# A cosine of one is a logit of SHARPNESS; the blank's logit is what a cosine of a half gets.
SHARPNESS = 20.0
BLANK_LOGIT = SHARPNESS / 2


# While training, the ids that do not occur are represented by so many, drawn for each microbatch.
# With 49,152 ids the CTC steps of the demo ran 33 utterances a second in place of 17.
SAMPLED = 4096
# Logits are made for so many elements at a time.
CHUNK_ELEMENTS = 1 << 24


class _OthersLogSumExp(torch.autograd.Function):
    """[N]: log of the sum of exp(SHARPNESS * x @ directions.T) over all columns but `left_out`.

    The gradient is found with the value, while a chunk of logits is at hand and in its place: no
    [N, V] matrix outlives its chunk (autograd would keep two and copy more).
    """

    @staticmethod
    def forward(ctx: Any, x_NW: Tensor, directions_VW: Tensor, left_out: Tensor) -> Tensor:
        values, slopes = [], []
        for x_CW in x_NW.split(max(1, CHUNK_ELEMENTS // len(directions_VW))):
            logits_CV = functional.linear(x_CW * SHARPNESS, directions_VW).float()
            logits_CV.index_fill_(1, left_out, -torch.inf)
            value_C = logits_CV.logsumexp(1)
            shares_CV = logits_CV.sub_(value_C[:, None]).exp_()
            slopes.append(SHARPNESS * (shares_CV.to(directions_VW.dtype) @ directions_VW))
            values.append(value_C)
        ctx.save_for_backward(torch.cat(slopes))
        return torch.cat(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope_NW,) = ctx.saved_tensors
        return grads[0][:, None] * slope_NW, None, None


class CTCHead(nn.Module):
    """CTC (Graves et al. 2006) whose output matrix is the LLM's input embeddings, frozen.

    The logit of a token is the cosine between the audio token and the token's embedding, both
    without the mean of all embeddings, which they share; a blank is whatever lies near no
    embedding. So audio tokens come to lie where the words that they carry lie in the LLM's own
    input, before the LLM is run at all.
    """

    directions_VW: Tensor
    mean_W: Tensor

    def __init__(self, embeddings_VW: Tensor) -> None:
        super().__init__()
        embeddings_VW = embeddings_VW.detach()
        mean_W = embeddings_VW.float().mean(0)
        directions_VW = functional.normalize(embeddings_VW.float() - mean_W, dim=1)
        self.register_buffer("mean_W", mean_W, persistent=False)
        self.register_buffer(
            "directions_VW", directions_VW.to(embeddings_VW.dtype), persistent=False
        )

    def _others(self, x_NW: Tensor, directions_VW: Tensor, ids_U: Tensor) -> Tensor:
        """[N]: log of the summed exponentials of the logits of all ids but `ids_U`.

        In training the sum over a uniform sample, scaled up (a sampled soft-max, Jean et al. 2015),
        drawn from torch's random state on the CPU; otherwise over all of them.
        """
        size = len(directions_VW)
        if not self.training or size <= 2 * SAMPLED:
            return _OthersLogSumExp.apply(x_NW, directions_VW, ids_U)
        drawn = torch.randint(size, (SAMPLED,)).unique().to(ids_U.device)
        drawn = drawn[~torch.isin(drawn, ids_U)]
        total = _OthersLogSumExp.apply(x_NW, directions_VW[drawn], drawn[:0])
        return total + math.log((size - len(ids_U)) / len(drawn))

    def forward(self, tokens_AKW: Tensor, counts_A: Tensor, targets: Sequence[Tensor]) -> LossSums:
        """The sum of CTC losses in nats over all audio segments, each with its own target ids.

        In training the soft-max is sampled, see `_others`. A target that does not fit into its
        audio tokens adds nothing. `correct` is zero: CTC aligns no token to a position.
        """
        inside_AK = torch.arange(tokens_AKW.shape[1], device=tokens_AKW.device) < counts_A[:, None]
        x_NW = functional.normalize(tokens_AKW[inside_AK].float() - self.mean_W, dim=1)
        directions_VW = self.directions_VW.to(x_NW.dtype)
        # CTC runs over the blank, the ids that occur, and one column for all the others: the same
        # loss, and the dynamic programme does not walk through 50 to 130 thousand columns. The
        # columns must make a whole distribution: torch's gradient of CTC takes that for granted.
        ids_U, labels = torch.unique(torch.cat(list(targets)), return_inverse=True)
        blank_N1 = x_NW.new_full((len(x_NW), 1), BLANK_LOGIT)
        logits_NU = SHARPNESS * functional.linear(x_NW, directions_VW[ids_U]).float()
        others_N1 = self._others(x_NW, directions_VW, ids_U)[:, None]
        scores_NU = torch.cat((blank_N1, logits_NU, others_N1), dim=1).log_softmax(1)
        scores_AKU = scores_NU.new_zeros(*inside_AK.shape, scores_NU.shape[1])
        scores_AKU[inside_AK] = scores_NU
        lengths = torch.tensor([len(target) for target in targets])
        loss = functional.ctc_loss(
            scores_AKU.transpose(0, 1),
            labels + 1,
            counts_A.cpu(),
            lengths,
            blank=0,
            reduction="sum",
            zero_infinity=True,
        )
        total = lengths.sum().to(loss.device)
        return LossSums(loss, torch.zeros((), device=loss.device), total)
