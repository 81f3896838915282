from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

import pytest

from speechllm.model.ctc import BLANK_LOGIT, SAMPLED, SHARPNESS, CTCHead

VOCABULARY, WIDTH = 50, 16


def head() -> tuple[CTCHead, Tensor]:
    torch.manual_seed(3)
    embeddings = nn.Embedding(VOCABULARY, WIDTH).weight + 0.5
    return CTCHead(embeddings), embeddings.detach()


def plain(tokens: Tensor, target: Tensor, embeddings: Tensor) -> Tensor:
    """One utterance: log-softmax over the whole vocabulary and the blank, then CTC."""
    mean = embeddings.mean(0)
    logits = SHARPNESS * functional.cosine_similarity(
        (tokens - mean)[:, None], (embeddings - mean)[None], dim=-1
    )
    blank = torch.full((len(tokens), 1), BLANK_LOGIT)
    scores = torch.cat((blank, logits), 1).log_softmax(1)
    return functional.ctc_loss(
        scores[:, None], target[None] + 1, (len(tokens),), (len(target),), reduction="sum"
    )


def test_equals_ctc_over_the_whole_vocabulary_whatever_the_batch_mates() -> None:
    ctc, embeddings = head()
    tokens = torch.randn(3, 9, WIDTH, requires_grad=True)
    counts = torch.tensor([9, 6, 4])
    targets = [torch.tensor(t) for t in ([4, 4, 7], [1, 2, 3], [49])]
    sums = ctc(tokens, counts, targets)
    alone = [
        plain(tokens[i, : int(n)], t, embeddings)
        for i, (n, t) in enumerate(zip(counts, targets, strict=True))
    ]
    torch.testing.assert_close(sums.loss, torch.stack(alone).sum(), rtol=1e-5, atol=1e-5)
    assert int(sums.tokens) == 7
    (gradient,) = torch.autograd.grad(sums.loss, tokens)
    (expected,) = torch.autograd.grad(torch.stack(alone).sum(), tokens)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
    assert (gradient[2, 4:] == 0).all()


def test_a_target_longer_than_its_audio_adds_nothing() -> None:
    ctc, _ = head()
    tokens = torch.randn(2, 3, WIDTH, requires_grad=True)
    possible = [torch.tensor([5]), torch.tensor([1, 2, 3, 4])]
    both = ctc(tokens, torch.tensor([3, 3]), possible).loss
    one = ctc(tokens[:1], torch.tensor([3]), possible[:1]).loss
    torch.testing.assert_close(both, one)
    both.backward()
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()


def test_silence_without_a_target_has_a_gradient_of_its_own() -> None:
    """The stand-in for a microbatch in which nothing could be read."""
    ctc, _ = head()
    tokens = torch.randn(1, 2, WIDTH, requires_grad=True)
    sums = ctc(tokens, torch.tensor([2]), [torch.zeros(0, dtype=torch.int64)])
    assert int(sums.tokens) == 0
    (sums.loss * 0).backward()
    assert tokens.grad is not None


def test_embeddings_of_the_target_are_a_better_guess_than_others() -> None:
    ctc, embeddings = head()
    target = torch.tensor([3, 8])
    right = embeddings[[3, 8]][None]
    wrong = embeddings[[8, 3]][None]
    counts = torch.tensor([2])
    assert float(ctc(right, counts, [target]).loss) < 0.1
    assert float(ctc(wrong, counts, [target]).loss) > 10


def test_nothing_of_the_head_trains_or_is_saved() -> None:
    ctc, _ = head()
    assert not list(ctc.parameters())
    assert not ctc.state_dict()
    assert ctc.directions_VW.norm(dim=1) == pytest.approx(torch.ones(VOCABULARY), abs=1e-5)


def loss_and_gradient(ctc: CTCHead, tokens: Tensor, targets: list[Tensor]) -> tuple[float, Tensor]:
    tokens = tokens.detach().requires_grad_()
    loss = ctc(tokens, torch.tensor([tokens.shape[1]] * len(tokens)), targets).loss
    return float(loss.detach()), torch.autograd.grad(loss, tokens)[0]


def test_the_sample_of_a_large_vocabulary_stands_for_all_of_it() -> None:
    torch.manual_seed(5)
    ctc = CTCHead(torch.randn(4 * SAMPLED, WIDTH))
    tokens, targets = torch.randn(2, 12, WIDTH), [torch.tensor([3, 9_000]), torch.tensor([17])]
    loss, gradient = loss_and_gradient(ctc.eval(), tokens, targets)
    ctc.train()
    sampled = []
    for seed in range(20):
        torch.manual_seed(seed)
        sampled.append(loss_and_gradient(ctc, tokens, targets))
        torch.manual_seed(seed)
        again = loss_and_gradient(ctc, tokens, targets)
        assert again[0] == sampled[-1][0]
        assert torch.equal(again[1], sampled[-1][1])
    losses = torch.tensor([value for value, _ in sampled])
    assert losses.std() > 0
    torch.testing.assert_close(losses.mean(), torch.tensor(loss), rtol=0.01, atol=0)
    mean_gradient = torch.stack([g for _, g in sampled]).mean(0)
    assert functional.cosine_similarity(mean_gradient.flatten(), gradient.flatten(), dim=0) > 0.98
