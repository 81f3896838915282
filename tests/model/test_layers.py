"""Activation checkpointing and compilation: the same numbers under the same names."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import pytest
from speech_models import CPU, END, PAD, PREFIX, asr, batch_of, model_config, noise, tiny_speech_llm

from speechllm.config import model as schema
from speechllm.errors import ConfigError, ModelError
from speechllm.generate import generate
from speechllm.model.build import build_model
from speechllm.model.layers import checkpoint_activations, compile_in_place, transformer_layers
from speechllm.model.speech_llm import SpeechLLM
from speechllm.model.tiny import build_tiny_llm
from speechllm.types import Batch, Example, TextSegment

EXAMPLES = (asr(noise(16_000, seed=1), (10, 11, 12)), asr(noise(9_999, seed=3), (14, 15)))
needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)
ADAPTED: dict[str, dict[str, Any]] = {
    "connector": {},
    "lora": {"lora": {"rank": 4, "targets": ["all-linear"], "dropout": 0.3}},
    "encoder": {"unfreeze_encoder_layers": 1},
}


def adapted(name: str) -> schema.Model:
    return schema.Model.model_validate({**model_config().model_dump(), **ADAPTED[name]})


def gradients(model: SpeechLLM, batch: Batch) -> tuple[Tensor, dict[str, Tensor | None], int]:
    """(loss, gradients, bytes that the forward kept for the backward)."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    torch.manual_seed(0)
    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(batch).loss
    loss.backward()
    return loss, {name: p.grad for name, p in model.trainable_parameters().items()}, kept


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("what", ADAPTED)
def test_checkpointing_keeps_less_and_changes_no_bit(what: str, precision: Any) -> None:
    cfg = adapted(what)
    batch = batch_of(cfg, EXAMPLES)
    plain = tiny_speech_llm(cfg, precision=precision)
    model = build_model(cfg, precision=precision, device=CPU, seed=1, activation_checkpointing=True)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    loss, expected, much = gradients(plain, batch)
    found_loss, found, little = gradients(model, batch)
    assert torch.equal(found_loss, loss)
    for name, gradient in expected.items():
        assert gradient is not None
        assert torch.equal(found[name], gradient), name
    # Measured in fp32: 0.83, 1.17, 1.60 MB without; 0.30, 0.30, 0.40 MB with it.
    assert little < 0.45 * much


def test_checkpointing_is_off_outside_training_and_leaves_the_frozen_parts_in_eval_mode() -> None:
    cfg = adapted("encoder")
    model = build_model(cfg, precision="fp32", device=CPU, seed=1, activation_checkpointing=True)
    inside = {*model.encoder.modules(), *model.llm.modules()}
    layers = [*transformer_layers(model.encoder)[1:], *transformer_layers(model.llm)]
    assert {module for module in inside if module.training} == set(layers)
    model.eval()
    assert not any(module.training for module in model.modules())
    _, _, kept = gradients(model, batch_of(cfg, EXAMPLES))
    _, _, expected = gradients(tiny_speech_llm(cfg).eval(), batch_of(cfg, EXAMPLES))
    assert kept == expected


def test_text_alone_still_needs_no_gradient() -> None:
    cfg = adapted("connector")
    model = build_model(cfg, precision="fp32", device=CPU, seed=1, activation_checkpointing=True)
    text = Example("text", (TextSegment((1, 2, 3)), TextSegment((4, END), trained=True)))
    assert not model(batch_of(cfg, [text])).loss.requires_grad


def test_models_that_would_compute_something_else_are_refused() -> None:
    model = tiny_speech_llm(adapted("connector"))
    model.encoder.encoder.layers[1].dropout = 0.1
    with pytest.raises(ModelError, match=r"dropout=0\.1 in its layers"):
        checkpoint_activations(model.encoder.encoder)
    model.llm.supports_gradient_checkpointing = False
    with pytest.raises(ModelError, match=r"LlamaForCausalLM .*activation_checkpointing=false"):
        checkpoint_activations(model.llm)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no-such-compiler is not there.*train\.compile=false"):
        build_model(adapted("connector"), precision="fp32", device=CPU, seed=1, compile_layers=True)


@pytest.fixture
def one_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> schema.Model:
    """Compiled only as far as the graphs, which takes seconds in place of minutes."""
    only_traced = partial(compile_in_place, backend="eager")
    monkeypatch.setattr("speechllm.model.build.compile_in_place", only_traced)
    llm = build_tiny_llm(tmp_path / "llm", layers=1)
    encoder = {"kind": "fbank", "mels": 20, "hidden_size": 16}
    return model_config(llm=str(llm), connector="linear", encoder=encoder)


@needs_compiler
def test_compiled_layers_compute_the_same_and_decode_uncompiled(one_layer: schema.Model) -> None:
    plain = tiny_speech_llm(one_layer)
    model = build_model(one_layer, precision="fp32", device=CPU, seed=1, compile_layers=True)
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    compiled = [m for m in model.modules() if m._compiled_call_impl or "forward" in vars(m)]
    assert compiled == [model.connector, *transformer_layers(model.llm)]
    longer = [asr(noise(4_000, seed=5), (7, 8, 9, 10)), *EXAMPLES]
    for examples in (EXAMPLES, longer):
        batch = batch_of(one_layer, examples)
        loss, expected, _ = gradients(plain, batch)
        with torch._dynamo.config.patch(error_on_recompile=examples is longer):
            found_loss, found, _ = gradients(model, batch)
        torch.testing.assert_close(found_loss, loss, atol=0, rtol=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    prompts = batch_of(one_layer, [asr(noise(4_000), ()), asr(noise(900), ())], pad_left=True)
    written = []
    for either in (plain.eval(), model.eval()):
        with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
            assert torch.equal(either(batch).loss, plain(batch).loss)
            written.append(generate(
                either, prompts, max_new_tokens=5, num_beams=1, end_token_ids=(END,), pad_id=PAD
            ))  # fmt: skip
    assert written[0] == written[1]


@needs_compiler
def test_layers_share_their_machine_code_though_each_reads_its_own_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = CompileCounter()
    monkeypatch.setattr(
        "speechllm.model.build.compile_in_place", partial(compile_in_place, backend=graphs)
    )
    encoder = {"kind": "fbank", "mels": 20, "hidden_size": 16}
    llm = build_tiny_llm(tmp_path / "llm", layers=6)
    cfg = model_config(llm=str(llm), connector="linear", encoder=encoder)
    plain = tiny_speech_llm(cfg)
    model = build_model(
        cfg, precision="fp32", device=CPU, seed=1, prefix=PREFIX, compile_layers=True,
        activation_checkpointing=True,
    )  # fmt: skip
    for rows in (2, 3):
        examples = [asr(noise(3_000 + 999 * row, seed=row), (7,) * rows) for row in range(rows)]
        batch = batch_of(cfg, examples)
        loss, expected, _ = gradients(plain, batch)
        found_loss, found, _ = gradients(model, batch)
        torch.testing.assert_close(found_loss, loss, atol=0, rtol=1e-5)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)
    assert graphs.frame_count < 6  # of connector and layer: fewer kinds of calls than layers


@needs_compiler
def test_machine_code_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Inductor else compiles and runs trial programs for each set of vector instructions, and all
    # headers once for later, in processes of its own: longer work than what is compiled here.
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    monkeypatch.setattr(torch._inductor.config.cpp, "simdlen", 1)
    monkeypatch.setattr(torch._inductor.config, "cpp_cache_precompile_headers", False)
    connector = tiny_speech_llm(model_config(connector="linear")).connector
    frames_ATD, counts_A = torch.randn(3, 22, 64), torch.tensor([22, 9, 17])
    results = []
    for _ in range(2):
        connector.zero_grad()
        tokens_AKW, _ = connector(frames_ATD, counts_A)
        tokens_AKW.square().sum().backward()
        results.append([tokens_AKW, *(p.grad for p in connector.parameters())])
        compile_in_place([connector])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
