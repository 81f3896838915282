"""The output matrix in chunks gives the loss, the guesses and the gradient of whole logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import pytest

from speechllm.errors import ConfigError
from speechllm.model import head as heads
from speechllm.model.attention import register
from speechllm.model.families import KNOWN
from speechllm.model.head import chunked_loss, plain_head, refuse_liger
from speechllm.model.loss import label_loss

SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "moe_intermediate_size": 12, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 12,
    "max_position_embeddings": 64, "initializer_range": 0.5,
}  # fmt: skip


def tiny(kind: str, **settings: Any) -> PreTrainedModel:
    torch.manual_seed(1)
    config = AutoConfig.for_model(kind, **SMALL, **settings)
    llm = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return llm.requires_grad_(False).eval()


@pytest.mark.parametrize("kind", sorted(KNOWN))
@torch.no_grad()
def test_a_known_family_has_a_plain_head_and_takes_grouped_attention(kind: str) -> None:
    llm = tiny(kind)
    embeds = torch.randn(2, 9, 16)
    seen = torch.ones(2, 9, dtype=torch.int64)
    seen[1, 6:] = 0
    expected = llm(inputs_embeds=embeds, attention_mask=seen, use_cache=False).logits
    head = plain_head(llm)
    assert head is not None
    register()
    llm.set_attn_implementation("grouped")
    hidden = llm.base_model(inputs_embeds=embeds, attention_mask=seen, use_cache=False)
    found = head(hidden.last_hidden_state)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(found[seen > 0], expected[seen > 0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("gemma2", {}), ("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 0.1})],
)
def test_logits_that_are_more_than_a_product_come_from_the_model(
    kind: str, settings: dict[str, Any]
) -> None:
    assert plain_head(tiny(kind, **settings)) is None


def test_a_head_that_trains_is_left_to_the_model() -> None:
    llm = tiny("llama")
    llm.get_output_embeddings().weight.requires_grad_()
    assert plain_head(llm) is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_chunks_give_what_all_logits_give(
    bias: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(2)
    head = nn.Linear(8, 50, bias=bias).requires_grad_(False)
    labels = torch.randint(50, (7,))
    one, other = (x.requires_grad_() for x in torch.randn(7, 8).expand(2, 7, 8).clone().unbind())
    expected = label_loss(head(one), labels)
    (expected.loss * 0.3).backward()
    sizes = []
    product = heads.functional.linear

    def counted(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return product(x, *weights)

    monkeypatch.setattr(heads.functional, "linear", counted)
    monkeypatch.setattr(heads, "MEGABYTE", 4 * 50 * chunk)
    found = chunked_loss(other, head, labels, megabytes=1)
    (found.loss * 0.3).backward()
    assert max(sizes) == min(chunk, 7)
    torch.testing.assert_close(found.loss, expected.loss)
    assert (found.correct.item(), found.tokens.item()) == (expected.correct.item(), 7)
    torch.testing.assert_close(other.grad, one.grad)


def test_no_labels_give_a_zero_with_a_gradient() -> None:
    head = nn.Linear(8, 50).requires_grad_(False)
    hidden = torch.randn(0, 8, requires_grad=True)
    sums = chunked_loss(hidden, head, torch.zeros(0, dtype=torch.int64), megabytes=1)
    sums.loss.backward()
    assert (sums.loss.item(), sums.correct.item(), sums.tokens.item()) == (0, 0, 0)
    assert hidden.grad is not None


def test_liger_is_refused_where_it_cannot_be_had() -> None:
    head = nn.Linear(2, 3)
    with pytest.raises(ConfigError, match=r"run on CUDA only.*performance.head=torch"):
        refuse_liger(torch.device("cpu"), head, "llama")
    with pytest.raises(ConfigError, match=r"logits of this gemma2 model.*performance.head=torch"):
        refuse_liger(torch.device("cuda"), None, "gemma2")
    with pytest.raises(ConfigError, match=r"speechllm\[liger\].*performance.head=torch"):
        refuse_liger(torch.device("cuda"), head, "llama")
