"""Every shortcut, and every pair of them, gives the loss and the gradients of the plain path."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

import pytest
from speech_models import (
    CPU,
    END,
    PAD,
    PREFIX,
    asr,
    batch_of,
    model_config,
    noise,
)

from speechllm.config.model import Model
from speechllm.config.performance import Performance
from speechllm.errors import ConfigError
from speechllm.model.build import build_model
from speechllm.model.layout import MASK_KINDS
from speechllm.model.shortcuts import Shortcuts, choose
from speechllm.model.speech_llm import SpeechLLM
from speechllm.types import AudioSegment, Batch, Example, LossSums, TextSegment

RUN_PREFIX = (*PREFIX, 40)  # longer than what the examples share with it
OFF: dict[str, Any] = {"prefix_cache": "off", "packing": "off", "label_logits": False}
SWITCHES: tuple[dict[str, Any], ...] = (
    {"prefix_cache": "auto"},
    {"packing": "on"},
    {"label_logits": True},
    {"label_logits": True, "logits_megabytes": 1},
)
EXAMPLES = (
    asr(noise(16_000, seed=1), (10, 11, 12)),
    asr(noise(1, seed=2), (13,)),
    asr(noise(9_999, seed=3), (14, 15, 16, 17, 18, 19)),
)
# The label at position 1 is predicted from position 0, which therefore cannot be left out.
TEXT = Example("text", (TextSegment(PREFIX[:1]), TextSegment((4, END), trained=True)))
SEVERAL = Example(
    "several",
    (
        TextSegment(PREFIX[:2]),
        AudioSegment(noise(5_000, seed=4)),
        TextSegment((20, END), trained=True),
        AudioSegment(noise(400, seed=6)),
        TextSegment((21, 22, END), trained=True),
    ),
)
# Its first label is predicted from nothing.
TRAINED = Example("trained", (TextSegment((23, 24), trained=True), AudioSegment(noise(999))))
BATCHES = {
    "asr": EXAMPLES,
    "cut": (*EXAMPLES, SEVERAL),
    "none": (*EXAMPLES, SEVERAL, TEXT, TRAINED),
}


def tiny(llm: str, attention: str = "sdpa", **performance: Any) -> tuple[Model, SpeechLLM]:
    cfg = model_config(llm=llm)
    cfg = cfg.model_copy(update={"llm": cfg.llm.model_copy(update={"attention": attention})})
    asked = Performance.model_validate(performance)
    model = build_model(
        cfg, precision="fp32", device=CPU, seed=1, performance=asked, prefix=RUN_PREFIX
    )
    return cfg, model


def gradients(model: SpeechLLM, batch: Any) -> tuple[LossSums, dict[str, torch.Tensor]]:
    model.zero_grad()
    sums = model(batch)
    (sums.loss / sums.tokens).backward()
    found = {
        n: p.grad.clone() for n, p in model.trainable_parameters().items() if p.grad is not None
    }
    return sums, found


def assert_equal(found: Any, expected: Any) -> None:
    (sums, grads), (wanted_sums, wanted) = found, expected
    torch.testing.assert_close(sums.loss, wanted_sums.loss, atol=1e-5, rtol=1e-5)
    assert sums.correct.item() == wanted_sums.correct.item()
    assert sums.tokens.item() == wanted_sums.tokens.item()
    assert grads.keys() == wanted.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("llm", "attention"),
    [("random:llama", "sdpa"), ("random:olmo2", "eager"), ("random:qwen2", "grouped")],
)
def test_every_pair_of_shortcuts_equals_the_plain_path(llm: str, attention: str) -> None:
    cfg, plain = tiny(llm, attention, preset="plain")
    batches = [
        batch_of(cfg, examples, pad_left=left)
        for examples, left in itertools.product(BATCHES.values(), (False, True))
    ]
    expected = [gradients(plain, batch) for batch in batches]
    for one, other in itertools.combinations_with_replacement(SWITCHES, 2):
        _, model = tiny(llm, attention, **(OFF | one | other))
        for batch, wanted in zip(batches, expected, strict=True):
            assert_equal(gradients(model, batch), wanted)


def columns_run(model: SpeechLLM) -> list[tuple[int, ...]]:
    """Rows and columns of every forward of the LLM from now on."""
    shapes: list[tuple[int, ...]] = []
    model.llm.base_model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["inputs_embeds"].shape[:2])),
        with_kwargs=True,
    )
    return shapes


@pytest.mark.parametrize("packing", ["off", "on"])
@torch.no_grad()
def test_the_prefix_is_run_once_and_padding_not_at_all(packing: str) -> None:
    cfg, model = tiny("random:llama", packing=packing)
    shapes = columns_run(model)
    state = set(model.state_dict())
    shared = {"asr": 3, "cut": 2, "none": 0}
    for name, examples in BATCHES.items():
        batch = batch_of(cfg, examples)
        rows, columns = batch.tokens_BS.shape
        model(batch)
        used = sum(batch.lengths) - rows * shared[name]
        expected = (1, used) if packing == "on" else (rows, columns - shared[name])
        assert shapes.pop() == expected
    assert shapes == [(1, len(RUN_PREFIX))]
    assert set(model.state_dict()) == state


@pytest.mark.parametrize("left", [False, True])
@torch.no_grad()
def test_the_plain_path_runs_30_seconds_of_every_audio(left: bool) -> None:
    cfg, plain = tiny("random:llama", preset="plain")
    shapes = columns_run(plain)
    batch = batch_of(cfg, EXAMPLES, pad_left=left)
    text = [n - int(k) for n, k in zip(batch.lengths, batch.audio_mask_BS.sum(1), strict=True)]
    plain(batch)
    assert shapes == [(len(text), 375 + max(text))]  # 1,500 frames, four to a token
    several = batch_of(cfg, BATCHES["cut"], pad_left=left)
    plain(several)
    assert shapes[1] == tuple(several.tokens_BS.shape)


def test_keys_and_values_of_the_prefix_have_no_graph() -> None:
    cfg, model = tiny("random:llama")
    model(batch_of(cfg, EXAMPLES)).loss.backward()
    layers = model.shortcuts.prefix.keys_values(3)
    assert len(layers) == model.llm.config.num_hidden_layers
    assert not any(part.requires_grad for layer in layers for part in layer)


@pytest.mark.parametrize("packing", ["off", "on"])
def test_positions_that_are_one_off_are_noticed(
    packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, plain = tiny("random:llama", preset="plain")
    batch = batch_of(cfg, EXAMPLES)
    expected = gradients(plain, batch)
    _, model = tiny("random:llama", packing=packing)
    assert_equal(gradients(model, batch), expected)
    right = Shortcuts.lay_out

    def one_off(self: Shortcuts, batch: Batch) -> Any:
        layout, cache = right(self, batch)
        return replace(layout, position_ids_RC=layout.position_ids_RC + 1), cache

    monkeypatch.setattr(Shortcuts, "lay_out", one_off)
    with pytest.raises(AssertionError):
        assert_equal(gradients(model, batch), expected)


@pytest.mark.parametrize("packing", ["off", "on"])
def test_layers_that_are_run_again_read_the_prefix_again(packing: str) -> None:
    cfg, plain = tiny("random:olmo2", preset="plain")
    batch = batch_of(cfg, EXAMPLES)
    model = build_model(
        cfg, precision="fp32", device=CPU, seed=1, prefix=RUN_PREFIX, activation_checkpointing=True,
        performance=Performance.model_validate({"packing": packing}),
    )  # fmt: skip
    assert_equal(gradients(model, batch), gradients(plain, batch))


def test_where_the_llm_trains_the_prefix_is_run_in_every_row(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    cfg = model_config()
    cfg = Model.model_validate(cfg.model_dump() | {"lora": {"rank": 2, "targets": ["k_proj"]}})
    model = build_model(cfg, precision="fp32", device=CPU, seed=1, prefix=RUN_PREFIX)
    assert len(model.shortcuts.prefix) == 0
    assert "something of the LLM trains" in caplog.text
    plain = build_model(
        cfg, precision="fp32", device=CPU, seed=1,
        performance=Performance.model_validate({"preset": "plain"}),
    )  # fmt: skip
    batch = batch_of(cfg, EXAMPLES)
    assert_equal(gradients(model, batch), gradients(plain, batch))


def of_kind(kind: str, performance: dict[str, Any], **settings: Any) -> tuple[Model, SpeechLLM]:
    """The parts of the tiny Llama's model around another tiny LLM."""
    cfg, parts = tiny("random:llama")
    torch.manual_seed(5)
    about = AutoConfig.for_model(
        kind, vocab_size=260, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        head_dim=16, num_attention_heads=4, num_key_value_heads=2, pad_token_id=PAD, **settings,
    )  # fmt: skip
    llm = AutoModelForCausalLM.from_config(about, attn_implementation="eager")
    return cfg, SpeechLLM(
        parts.encoder, parts.connector, llm.requires_grad_(False).eval(),
        compute_dtype=torch.float32, prefix=RUN_PREFIX,
        performance=Performance.model_validate(performance),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "settings", "most"),
    [
        ("mistral", {"sliding_window": 8}, 8),
        ("gemma2", {"final_logit_softcapping": 0.5, "sliding_window": 4096}, 4096),
        ("granite", {"logits_scaling": 4.0}, None),
    ],
)
@pytest.mark.parametrize("packing", ["off", "on"])
def test_what_is_special_about_an_llm_is_not_lost(
    kind: str, settings: dict[str, Any], most: int | None, packing: str
) -> None:
    """Windows shorter than the rows, logits that are capped or scaled."""
    cfg, plain = of_kind(kind, {"preset": "plain"}, **settings)
    _, model = of_kind(kind, {"packing": packing}, **settings)
    assert model.shortcuts.longest_row == most
    batch = batch_of(cfg, EXAMPLES)
    assert_equal(gradients(model, batch), gradients(plain, batch))


def test_an_llm_without_keys_has_no_prefix_and_takes_no_packing() -> None:
    _, plain = of_kind("mamba2", {"preset": "plain"}, num_heads=8, expand=2, n_groups=1)
    assert plain.shortcuts.longest_row == 0
    asked = Performance.model_validate({"packing": "on"})
    with pytest.raises(ConfigError, match=r"Mamba2.*set performance.packing=off"):
        choose(asked, plain.llm, RUN_PREFIX, CPU)
    chosen = choose(Performance(), plain.llm, RUN_PREFIX, CPU)
    assert (len(chosen.prefix), chosen.mask_kind) == (0, "rows")


def attend_by_bounds(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **about: Any
) -> tuple[Tensor, None]:
    """What kernels for rows of any length do: example by example, the last query sees all keys."""
    assert mask is None
    if "cu_seq_lens_q" not in about:  # the prefix alone
        bounds = torch.tensor([0, query.shape[2]])
        about = {f"cu_seq_lens_{letter}": bounds for letter in "qk"}
        about |= {f"max_length_{letter}": query.shape[2] for letter in "qk"}
    queries, keys = about["cu_seq_lens_q"].tolist(), about["cu_seq_lens_k"].tolist()
    parts = []
    for i in range(len(queries) - 1):
        q = query[:, :, queries[i] : queries[i + 1]]
        k, v = (x[:, :, keys[i] : keys[i + 1]].repeat_interleave(2, dim=1) for x in (key, value))
        assert q.shape[2] <= about["max_length_q"]
        assert k.shape[2] <= about["max_length_k"]
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        parts.append(
            functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scaling)
        )
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("prefix_cache", ["auto", "off"])
def test_bounds_for_kernels_of_any_length_equal_the_plain_path(
    prefix_cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels themselves want CUDA and were never run."""
    _, plain = tiny("random:llama", preset="plain")
    AttentionInterface.register("by_bounds", attend_by_bounds)
    monkeypatch.setitem(MASK_KINDS, "by_bounds", "varlen")
    cfg, parts = tiny("random:llama")
    parts.llm.set_attn_implementation("by_bounds")
    asked = Performance.model_validate({"packing": "on", "prefix_cache": prefix_cache})
    model = SpeechLLM(
        parts.encoder, parts.connector, parts.llm, compute_dtype=torch.float32, prefix=RUN_PREFIX,
        performance=asked,
    )  # fmt: skip
    for left in (False, True):
        batch = batch_of(cfg, BATCHES["cut"], pad_left=left)
        assert_equal(gradients(model, batch), gradients(plain, batch))
