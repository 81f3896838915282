"""From the configuration to the model: weights, types, counts, identity, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch

from safetensors.torch import load_file, save_file
from transformers import WhisperModel

import pytest
from speech_models import CONNECTORS, CPU, asr, batch_of, model_config, noise, tiny_speech_llm
from worker_copy import worker_copy

from speechllm.config import model as schema
from speechllm.errors import ModelError
from speechllm.model.build import audio_token_counter, bf16_is_fast, build_model
from speechllm.model.hub import resolve
from speechllm.model.identity import identity, missing
from speechllm.model.pretrained import load_tokenizer

WHISPER, LLAMA = "random:whisper", "random:llama"


def copy(id: str, to: Path) -> Path:
    return Path(shutil.copytree(resolve(id), to))


def rename_weights(directory: Path, old: str, new: str) -> None:
    file = directory / "model.safetensors"
    tensors = {name.replace(old, new): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("connector", CONNECTORS)
@torch.no_grad()
def test_one_function_counts_audio_tokens(connector: str) -> None:
    cfg = model_config(connector=connector)
    count = worker_copy(audio_token_counter(cfg))
    model = tiny_speech_llm(cfg)
    lengths = [1, 319, 321, 1_600, 7_777, 16_000, 16_001]
    assert count(np.array(lengths)).tolist() == [count(n) for n in lengths]
    audio_AN = torch.zeros(len(lengths), max(lengths), dtype=torch.int16)
    _, counts_A = model.audio_tokens(audio_AN, torch.tensor(lengths))
    assert counts_A.tolist() == [count(n) for n in lengths]


def test_weights_come_from_the_files() -> None:
    model = tiny_speech_llm(model_config(llm="random:olmo2"))
    stored = load_file(resolve(WHISPER) / "model.safetensors")
    for name, parameter in model.encoder.encoder.named_parameters():
        assert torch.equal(parameter, stored[f"model.encoder.{name}"])
    stored = load_file(resolve("random:olmo2") / "model.safetensors")
    for name, parameter in model.llm.named_parameters():
        assert torch.equal(parameter, stored[name])
    assert not any("decoder" in name for name, _ in model.encoder.named_parameters())


@pytest.mark.parametrize(
    ("precision", "frozen_dtype", "stored", "computed"),
    [
        ("bf16", "auto", torch.bfloat16, torch.bfloat16),
        ("bf16", "fp32", torch.float32, torch.bfloat16),
        ("fp32", "auto", torch.float32, torch.float32),
    ],
)
@torch.no_grad()
def test_precision(precision, frozen_dtype, stored, computed) -> None:  # type: ignore[no-untyped-def]
    cfg = model_config().model_copy(update={"frozen_dtype": frozen_dtype})
    model = tiny_speech_llm(cfg, precision=precision)
    assert {p.dtype for p in model.llm.parameters()} == {stored}
    assert {p.dtype for p in model.encoder.parameters()} == {stored}
    assert {p.dtype for p in model.connector.parameters()} == {torch.float32}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    tokens_AKW, _ = model.connector(torch.zeros(1, 5, 64, dtype=stored).float(), torch.tensor([5]))
    assert tokens_AKW.dtype == torch.float32
    with model.autocast():
        tokens_AKW, _ = model.connector(torch.zeros(1, 5, 64), torch.tensor([5]))
    assert tokens_AKW.dtype == computed
    loss = model(batch_of(cfg, [asr(noise(3_000), (1, 2))])).loss
    assert loss.isfinite()
    assert loss.dtype == torch.float32


def test_fresh_weights_are_a_function_of_the_seed() -> None:
    cfg = model_config(connector="transformer", encoder={"kind": "fbank"})
    torch.manual_seed(9)
    expected = torch.rand(2)
    torch.manual_seed(9)
    first = tiny_speech_llm(cfg, seed=3).trainable_parameters()
    assert torch.equal(torch.rand(2), expected)
    again = tiny_speech_llm(cfg, seed=3).trainable_parameters()
    other = tiny_speech_llm(cfg, seed=4).trainable_parameters()
    assert all(torch.equal(p, again[n]) for n, p in first.items())
    assert not any(torch.equal(p, other[n]) for n, p in first.items() if "norm" not in n)


@torch.no_grad()
def test_audio_tokens_start_about_as_large_as_text_embeddings() -> None:
    cfg = model_config(encoder={"kind": "fbank", "mels": 80, "hidden_size": 64})
    for name in ("mlp", "transformer"):
        model = tiny_speech_llm(cfg.model_copy(update={"connector": schema.Model.model_validate(
            {**cfg.model_dump(), "connector": CONNECTORS[name]}).connector}))  # fmt: skip
        audio = torch.from_numpy(noise(16_000))[None]
        tokens_AKW, _ = model.audio_tokens(audio, torch.tensor([16_000]))
        text_rms = model.llm.get_input_embeddings().weight.square().mean().sqrt()
        assert 0.5 < tokens_AKW.square().mean().sqrt() / text_rms < 2.0


def test_attention_on_cpu_is_eager_in_bf16_and_sdpa_in_fp32_unless_asked_otherwise() -> None:
    def kernel(attention: str, precision: str) -> str:
        cfg = model_config()
        llm = cfg.llm.model_copy(update={"attention": attention})
        model = tiny_speech_llm(cfg.model_copy(update={"llm": llm}), precision=precision)
        return model.llm.config._attn_implementation

    assert kernel("auto", "bf16") == "eager"
    assert kernel("auto", "fp32") == "sdpa"
    assert kernel("sdpa", "bf16") == "sdpa"
    assert kernel("eager", "fp32") == "eager"


@pytest.mark.parametrize("capability", [None, "avx512_bf16", "amx_bf16", "bf16"])
def test_a_cpu_without_bf16_instructions_is_warned_of(
    capability: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, capability: True})
    assert bf16_is_fast(CPU) is (capability is not None)
    assert bf16_is_fast(torch.device("cuda"))
    with caplog.at_level("WARNING", logger="speechllm"):
        tiny_speech_llm(model_config(), precision="fp32")
        assert "bf16" not in caplog.text
        tiny_speech_llm(model_config(), precision="bf16")
    assert ("precision=fp32" in caplog.text) is (capability is None)


def test_whisper_files_of_either_class_are_read(tmp_path: Path) -> None:
    WhisperModel.from_pretrained(resolve(WHISPER)).save_pretrained(tmp_path / "base")
    assert "encoder.conv1.weight" in load_file(tmp_path / "base" / "model.safetensors")
    model = tiny_speech_llm(model_config(encoder={"id": str(tmp_path / "base")}))
    expected = tiny_speech_llm(model_config())
    for name, parameter in model.encoder.named_parameters():
        assert torch.equal(parameter, expected.encoder.get_parameter(name))


@pytest.mark.parametrize(
    ("id", "old", "new"),
    [
        (WHISPER, "model.encoder.", "speech.encoder."),
        (WHISPER, "encoder.layers.1.fc1.bias", "encoder.layers.1.fc1.offset"),
        (LLAMA, "model.layers.1", "model.blocks.1"),
        (LLAMA, "lm_head", "head"),
    ],
)
def test_weights_that_would_stay_random_are_refused(
    tmp_path: Path, id: str, old: str, new: str
) -> None:
    directory = copy(id, tmp_path / "renamed")
    rename_weights(directory, old, new)
    cfg = (
        model_config(encoder={"id": str(directory)})
        if id == WHISPER
        else model_config(llm=str(directory))
    )
    with pytest.raises(ModelError, match=r"would stay random.*" + old.split(".")[-1]) as error:
        tiny_speech_llm(cfg)
    assert str(directory) in str(error.value)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    directory = copy(LLAMA, tmp_path / "wider")
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**config, "intermediate_size": 96}), encoding="utf-8")
    with pytest.raises(ModelError, match="wider"):
        tiny_speech_llm(model_config(llm=str(directory)))


def test_unusable_directories_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a Whisper"):
        tiny_speech_llm(model_config(encoder={"id": LLAMA}))
    with pytest.raises(ModelError, match="whisper model with an encoder"):
        tiny_speech_llm(model_config(llm=WHISPER))
    broken = copy(LLAMA, tmp_path / "broken")
    with open(broken / "model.safetensors", "r+b") as stream:
        stream.truncate(10_000)
    with pytest.raises(ModelError, match="broken"):
        tiny_speech_llm(model_config(llm=str(broken)))
    (broken / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match="broken"):
        tiny_speech_llm(model_config(llm=str(broken)))
    with pytest.raises(ModelError, match="nowhere"):
        build_model(
            model_config(llm="./nowhere"), precision="fp32", device=CPU, seed=1
        )  # fmt: skip


def test_tokenizer_always_pads(tmp_path: Path) -> None:
    directory = copy(LLAMA, tmp_path / "llm")
    file = directory / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    del config["pad_token"]
    file.write_text(json.dumps(config), encoding="utf-8")
    tokenizer = load_tokenizer(schema.LLM(id=str(directory)))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 257
    assert load_tokenizer(schema.LLM(id=LLAMA)).pad_token_id == 258
    (directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(schema.LLM(id=str(directory)))


def test_identity_is_the_content(tmp_path: Path) -> None:
    cfg = model_config()
    expected = identity(cfg, load_tokenizer(cfg.llm))
    assert list(expected) == ["encoder", "llm", "tokenizer", "chat_template"]
    assert expected["encoder"]["id"] == WHISPER
    assert all(len(part["hash"]) == 64 for part in expected.values())

    moved = model_config(
        llm=str(copy(LLAMA, tmp_path / "a")), encoder={"id": str(copy(WHISPER, tmp_path / "b"))}
    )
    tokenizer = load_tokenizer(moved.llm)
    found = identity(moved, tokenizer)
    assert {k: v["hash"] for k, v in found.items()} == {k: v["hash"] for k, v in expected.items()}

    tokenizer.chat_template = tokenizer.get_chat_template() + " "
    rename_weights(tmp_path / "a", "lm_head", "head")
    rename_weights(tmp_path / "b", "fc1", "fc3")
    (tmp_path / "a" / "tokenizer.json").write_text("{}", encoding="utf-8")
    changed = identity(moved, tokenizer)
    assert not any(changed[part]["hash"] == expected[part]["hash"] for part in expected)

    fbank = identity(model_config(encoder={"kind": "fbank"}), tokenizer)["encoder"]
    wider = identity(model_config(encoder={"kind": "fbank", "mels": 90}), tokenizer)["encoder"]
    assert fbank["id"] == "fbank"
    assert fbank["hash"] != wider["hash"]


def test_missing_names_what_would_be_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert missing(model_config()) == []
    assert missing(model_config(encoder={"kind": "fbank"})) == []
    lines = missing(model_config(llm="some/llm", encoder={"id": "some/whisper"}))
    assert len(lines) == 2
    assert lines[0].startswith("model.encoder.id: ")
    assert "some/whisper" in lines[0]
    assert lines[1].startswith("model.llm.id: ")
