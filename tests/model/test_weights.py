"""Reading single weights and rows of them, and models whose weights are left to be read so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import pytest
from speech_models import CPU, model_config

from speechllm.config import model as schema
from speechllm.errors import ModelError
from speechllm.model.hub import resolve
from speechllm.model.pretrained import load_llm, load_whisper_encoder
from speechllm.model.weights import FrozenWeights, WeightFiles


def write(directory: Path, tensors: dict[str, Tensor]) -> WeightFiles:
    save_file(tensors, directory / "model.safetensors")
    return WeightFiles(directory)


def copy(id: str, to: Path, **changes: Any) -> Path:
    """A model's directory with other entries in config.json."""
    directory = Path(shutil.copytree(resolve(id), to))
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}), encoding="utf-8")
    return directory


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64]
)
def test_rows_are_those_of_the_whole(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {
        "before": torch.arange(3.0),
        "cube": torch.randn(7, 3, 2).mul(9).to(dtype),
        "line": torch.arange(11).to(dtype),
        "number": torch.tensor(4).to(dtype),
        "nothing": torch.empty(0, 5).to(dtype),
        "sliver": torch.empty(4, 0).to(dtype),
    }
    files = write(tmp_path, tensors)
    for name, whole in tensors.items():
        assert files.shape(name) == tuple(whole.shape)
        assert torch.equal(files.read(name), whole)
        assert files.read(name).dtype == whole.dtype
    for start, stop in [(0, 7), (2, 5), (6, 9), (7, 9), (3, 3), (5, 2)]:
        for name in ("cube", "line"):
            assert torch.equal(files.read(name, start, stop), tensors[name][start:stop])
    assert torch.equal(files.read("cube", 4), tensors["cube"][4:])
    assert torch.equal(files.read("cube", step=3), tensors["cube"][::3])
    assert torch.equal(files.read("cube", 1, 6, step=2), tensors["cube"][1:6:2])


def test_a_name_is_found_under_the_prefixes_of_the_classes_that_write_files(
    tmp_path: Path,
) -> None:
    stored = ["a", "model.b", "encoder.c", "model.encoder.d", "layers.e"]
    files = write(tmp_path, {name: torch.tensor([float(i)]) for i, name in enumerate(stored)})
    for i, name in enumerate(["a", "b", "c", "d", "model.layers.e"]):
        assert name in files
        assert files.read(name).item() == i
    assert "decoder.d" not in files
    with pytest.raises(ModelError, match=rf"{tmp_path}: no weight decoder\.d"):
        files.read("decoder.d")


def test_several_files_are_one(tmp_path: Path) -> None:
    llm = AutoModelForCausalLM.from_pretrained(resolve("random:llama"))
    llm.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    files = WeightFiles(tmp_path)
    for name, parameter in llm.named_parameters():
        assert torch.equal(files.read(name, 1, 3), parameter[1:3])


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    write(tmp_path, {"a": torch.ones(100)})
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole + b"x", whole[:20], b"", b"\xff" * 100):
        file.write_bytes(damaged)
        with pytest.raises(ModelError, match=str(file)):
            WeightFiles(tmp_path)
    file.write_bytes(whole)
    files = WeightFiles(tmp_path)
    file.write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=f"{file} ends before"):
        files.read("a")


def test_types_that_are_no_numbers_by_themselves_are_refused(tmp_path: Path) -> None:
    files = write(tmp_path, {"a": torch.ones(3, dtype=torch.int8)})
    with pytest.raises(ModelError, match=r"stored as I8.*not quantised"):
        files.read("a")


def test_frozen_weights_go_by_the_names_of_the_whole_model() -> None:
    frozen = FrozenWeights(model_config(llm="random:qwen2"))
    whisper = WeightFiles(resolve("random:whisper"))
    qwen = WeightFiles(resolve("random:qwen2"))
    found = frozen.read(["encoder.encoder.layers.1.fc1.weight"], 2, 4)
    assert torch.equal(found, whisper.read("layers.1.fc1.weight", 2, 4))
    tied = ["llm.lm_head.weight", "llm.model.embed_tokens.weight"]
    assert torch.equal(frozen.read(tied, 0, 9), qwen.read("model.embed_tokens.weight", 0, 9))
    with_lora = ["llm.model.layers.0.self_attn.q_proj.base_layer.weight"]
    found = frozen.read(with_lora, 0, 9)
    assert torch.equal(found, qwen.read("model.layers.0.self_attn.q_proj.weight", 0, 9))
    with pytest.raises(ModelError, match=r"no weight model\.other"):
        frozen.read(["llm.model.other", "llm.model.another"], 0, 1)


ROPE = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}  # fmt: skip


@pytest.mark.parametrize(
    ("id", "changes"),
    [
        ("random:llama", {}),
        ("random:llama", {"rope_parameters": ROPE}),
        ("random:olmo2", {}),
        ("random:qwen2", {}),
    ],
    ids=["llama", "llama3", "olmo2", "qwen2"],
)
def test_without_its_weights_an_llm_is_the_same(
    tmp_path: Path, id: str, changes: dict[str, Any]
) -> None:
    cfg = schema.LLM(id=str(copy(id, tmp_path / "llm", **changes)))
    whole = load_llm(cfg, torch.bfloat16, CPU)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    empty = load_llm(cfg, torch.bfloat16, CPU, weights_on_meta=True)
    assert torch.equal(torch.rand(2), expected)
    assert type(empty) is type(whole)
    assert empty.generation_config.to_dict() == whole.generation_config.to_dict()
    assert empty.config.to_dict() == whole.config.to_dict()
    assert empty.config._attn_implementation == whole.config._attn_implementation == "eager"
    theirs = dict(whole.named_parameters(remove_duplicate=False))
    ours = dict(empty.named_parameters(remove_duplicate=False))
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.is_meta
        assert not parameter.requires_grad
        assert parameter.shape == theirs[name].shape
        assert parameter.dtype == theirs[name].dtype
    same = {name: ours["lm_head.weight"] is parameter for name, parameter in ours.items()}
    assert same == {name: theirs["lm_head.weight"] is p for name, p in theirs.items()}
    buffers = dict(empty.named_buffers())
    assert buffers.keys() == dict(whole.named_buffers()).keys()
    for name, buffer in whole.named_buffers():
        assert torch.equal(buffers[name], buffer), name
        assert buffers[name].dtype == buffer.dtype
    assert not any(module.training for module in empty.modules())


def test_without_its_weights_a_whisper_is_the_same() -> None:
    cfg = schema.WhisperEncoder(id="random:whisper")
    whole = load_whisper_encoder(cfg, torch.float32, CPU)
    empty = load_whisper_encoder(cfg, torch.float32, CPU, weights_on_meta=True)
    theirs, ours = dict(whole.named_parameters()), dict(empty.named_parameters())
    assert {n: p.shape for n, p in ours.items()} == {n: p.shape for n, p in theirs.items()}
    assert all(p.is_meta and not p.requires_grad for p in ours.values())
    assert dict(empty.named_buffers()).keys() == dict(whole.named_buffers()).keys()
    assert empty.config._attn_implementation == whole.config._attn_implementation


def test_a_tied_matrix_may_be_stored_under_either_name(tmp_path: Path) -> None:
    directory = copy("random:qwen2", tmp_path / "llm")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    load_llm(schema.LLM(id=str(directory)), torch.float32, CPU, weights_on_meta=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size": 96}, r"6 weights of LlamaForCausalLM.*strategy\.kind=ddp"),
        ({"num_hidden_layers": 3}, r"layers\.2.*strategy\.kind=ddp"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantised.*strategy\.kind=ddp"),
    ],
)
def test_what_its_files_do_not_hold_is_refused_with_the_way_out(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    cfg = schema.LLM(id=str(copy("random:llama", tmp_path / "llm", **changes)))
    with pytest.raises(ModelError, match=message) as error:
        load_llm(cfg, torch.float32, CPU, weights_on_meta=True)
    assert cfg.id in str(error.value)
