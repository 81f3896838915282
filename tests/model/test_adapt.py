"""LoRA and unfrozen encoder layers: what trains, from which values, and what stays as it was."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from safetensors.torch import load_file

import pytest
from speech_models import CPU, asr, batch_of, model_config, noise, tiny_speech_llm

from speechllm.config import model as schema
from speechllm.errors import ModelError
from speechllm.model.adapt import add_lora, lora_dropouts
from speechllm.model.build import build_model
from speechllm.model.hub import resolve
from speechllm.model.pretrained import load_llm
from speechllm.model.speech_llm import SpeechLLM

LLMS = ("random:llama", "random:olmo2", "random:qwen2")
EXAMPLES = (asr(noise(8_000, seed=1), (10, 11)), asr(noise(5_000, seed=2), (14, 15, 16)))
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
UNFROZEN = {"unfreeze_encoder_layers": 1}


def adapted(changes: dict[str, Any], llm: str = "random:llama") -> schema.Model:
    plain = model_config(llm=llm, connector="linear").model_dump()
    return schema.Model.model_validate({**plain, **changes})


def lora(*targets: str, rank: int = 4, dropout: float = 0.0) -> dict[str, Any]:
    return {"lora": {"rank": rank, "targets": targets, "dropout": dropout, "alpha": 8}}


def trained(model: SpeechLLM, part: str) -> dict[str, Tensor]:
    return {n: p for n, p in model.trainable_parameters().items() if n.startswith(f"{part}.")}


@pytest.mark.parametrize("llm", LLMS)
def test_lora_trains_beside_the_layers_named_and_changes_nothing_at_first(llm: str) -> None:
    plain, cfg = adapted({}, llm), adapted(lora("q_proj", "layers.1.mlp.up_proj"), llm)
    model = tiny_speech_llm(cfg)
    sides = ("lora_A.default.weight", "lora_B.default.weight")
    layers = [f"layers.{number}.self_attn.q_proj" for number in (0, 1)] + ["layers.1.mlp.up_proj"]
    assert trained(model, "llm").keys() == {f"llm.model.{n}.{s}" for n in layers for s in sides}
    up = model.llm.get_submodule("model.layers.1.mlp.up_proj")
    assert up.lora_A["default"].weight.shape == (4, 64)
    assert up.lora_B["default"].weight.shape == (128, 4)
    assert up.scaling == {"default": 2.0}
    before = tiny_speech_llm(plain)
    batch = batch_of(cfg, EXAMPLES)
    assert torch.equal(model(batch).loss, before(batch).loss)
    with torch.no_grad():
        up.lora_B["default"].weight.fill_(0.1)
    assert not torch.equal(model(batch).loss, before(batch).loss)


@pytest.mark.parametrize("llm", LLMS)
def test_all_linear_takes_all_but_the_output_matrix(llm: str) -> None:
    names = trained(tiny_speech_llm(adapted(lora("all-linear"), llm)), "llm")
    found = {name.removeprefix("llm.model.").split(".lora_")[0] for name in names}
    linear = [*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP)]
    assert found == {f"layers.{number}.{name}" for number in (0, 1) for name in linear}


def test_unknown_targets_are_refused_with_the_names_there_are() -> None:
    with pytest.raises(ModelError, match=r"called query, mlp; there are down_proj, .*all-linear"):
        tiny_speech_llm(adapted(lora("q_proj", "query", "mlp")))


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"speechllm\[lora\]"):
        tiny_speech_llm(adapted(lora("q_proj")))


@pytest.mark.parametrize("changes", [lora("all-linear"), UNFROZEN])
def test_first_values_depend_on_neither_the_frozen_weights_nor_the_precision(
    changes: dict[str, Any],
) -> None:
    cfg = adapted(changes)
    expected = tiny_speech_llm(cfg).trainable_parameters()
    on_meta = build_model(cfg, precision="bf16", device=CPU, seed=1, frozen_on_meta=True)
    assert on_meta.llm.get_input_embeddings().weight.is_meta
    for model in (tiny_speech_llm(cfg, precision="bf16"), on_meta):
        found = model.trainable_parameters()
        assert found.keys() == expected.keys()
        assert all(p.dtype == torch.float32 for p in found.values())
        assert all(torch.equal(p, expected[name]) for name, p in found.items())


def test_values_of_lora_are_a_function_of_the_seed_and_leave_those_of_the_connector() -> None:
    first, other = (tiny_speech_llm(adapted(lora("q_proj")), seed=seed) for seed in (1, 2))
    for name, weight in trained(first, "llm").items():
        assert torch.equal(weight, trained(other, "llm")[name]) is ("lora_B" in name)
    plain = trained(tiny_speech_llm(adapted({}), seed=1), "connector")
    assert all(torch.equal(w, plain[n]) for n, w in trained(first, "connector").items())


def test_sizes_are_right_where_another_rank_has_the_weights() -> None:
    cfg = adapted(lora("gate_proj", "down_proj"))
    llm = load_llm(cfg.llm, torch.bfloat16, CPU)
    for parameter in llm.parameters():
        parameter.data = torch.empty(0, dtype=torch.bfloat16)
    add_lora(llm, cfg.lora, CPU)
    shapes = {n.split(".", 4)[4]: p.shape for n, p in llm.named_parameters() if p.requires_grad}
    assert shapes == {
        "gate_proj.lora_A.default.weight": (4, 64), "gate_proj.lora_B.default.weight": (128, 4),
        "down_proj.lora_A.default.weight": (4, 128), "down_proj.lora_B.default.weight": (64, 4),
    }  # fmt: skip


def test_only_the_dropout_of_lora_is_on_and_only_in_training() -> None:
    cfg = adapted(lora("q_proj", dropout=0.5))
    model = tiny_speech_llm(cfg)
    with torch.no_grad():
        for name, weight in trained(model, "llm").items():
            weight.fill_(0.5 if "lora_B" in name else 0.1)
    batch = batch_of(cfg, EXAMPLES)

    def losses() -> list[float]:
        return [model(batch).loss.item() for _ in range(2)]

    assert len(set(losses())) == 2
    switched = {m for dropout in lora_dropouts(model.llm) for m in dropout.modules()}
    assert switched
    assert {m for m in model.llm.modules() if m.training} == switched
    model.eval()
    assert len(set(losses())) == 1
    assert not any(m.training for m in model.modules())


def test_the_last_encoder_layers_train_in_fp32_from_the_files() -> None:
    model = tiny_speech_llm(adapted(UNFROZEN), precision="bf16")
    stored = load_file(resolve("random:whisper") / "model.safetensors")
    encoder = trained(model, "encoder")
    tops = {name.removeprefix("encoder.encoder.").rpartition(".")[0] for name in encoder}
    assert {top.split(".self_attn.")[0].split(".fc")[0] for top in tops} == {
        "layers.1", "layers.1.self_attn_layer_norm", "layers.1.final_layer_norm", "layer_norm"
    }  # fmt: skip
    for name, weight in encoder.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, stored[f"model.{name.removeprefix('encoder.')}"])
    frozen = [p for n, p in model.encoder.named_parameters() if f"encoder.{n}" not in encoder]
    assert frozen
    assert {p.dtype for p in frozen} == {torch.bfloat16}
    assert not any(m.training for m in model.encoder.modules())


def test_the_graph_starts_at_the_first_unfrozen_layer() -> None:
    cfg = adapted(UNFROZEN)
    model = tiny_speech_llm(cfg)
    seen: list[bool] = []
    for layer in model.encoder.encoder.layers:
        layer.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
    model(batch_of(cfg, EXAMPLES))
    assert seen == [False, True]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_step_moves_all_that_trains_and_nothing_else(precision: Any) -> None:
    cfg = adapted({**lora("all-linear"), "unfreeze_encoder_layers": 2})
    model = tiny_speech_llm(cfg, precision=precision)
    weights = model.trainable_parameters()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model(batch_of(cfg, EXAMPLES)).loss.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in weights.values())
    torch.optim.SGD(weights.values(), lr=1e-2).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    # At first B is zero, and so is the gradient of A.
    assert moved == {name for name in weights if "lora_A" not in name}


def test_ctc_gives_lora_a_gradient_of_zero() -> None:
    cfg = adapted(lora("q_proj"))
    model = build_model(cfg, precision="fp32", device=CPU, seed=1, ctc=True)
    batch = batch_of(cfg, EXAMPLES)
    expected = build_model(adapted({}), precision="fp32", device=CPU, seed=1, ctc=True)
    loss = model(batch, "ctc").loss
    assert torch.equal(loss, expected(batch, "ctc").loss)
    loss.backward()
    for name, weight in trained(model, "llm").items():
        assert weight.grad is not None, name
        assert not weight.grad.any()


def test_what_cannot_be_unfrozen_is_refused() -> None:
    with pytest.raises(ModelError, match=r"unfreeze_encoder_layers is 3, .* has only 2"):
        tiny_speech_llm(adapted({"unfreeze_encoder_layers": 3}))
    with pytest.raises(ModelError, match="fbank"):
        tiny_speech_llm(adapted({**UNFROZEN, "encoder": {"kind": "fbank"}}))
