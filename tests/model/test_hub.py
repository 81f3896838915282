"""Ids to directories, and hashes that tell other contents from these."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from safetensors.torch import load_file, save_file

import pytest

from speechllm.errors import ModelError
from speechllm.model.hub import (
    WHOLE_FILE,
    hash_vocabulary,
    hash_weights,
    resolve,
    weight_files,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's local cache, empty, with the hub out of reach."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def copy(tmp_path: Path, id: str = "random:llama") -> Path:
    return Path(shutil.copytree(resolve(id), tmp_path / "copy"))


def test_unreachable_hub_names_the_model_and_the_remedies(offline: Path) -> None:
    with pytest.raises(ModelError) as error:
        resolve("openai/whisper-small.en", "v1")
    for part in ("openai/whisper-small.en", "v1", "hf download", "HF_HOME", "local directory"):
        assert part in str(error.value)
    with pytest.raises(ModelError, match="neither a local directory"):
        resolve("not a model id")


def test_a_snapshot_in_the_hubs_cache_is_found_offline(offline: Path) -> None:
    model = offline / "models--some--llm"
    shutil.copytree(resolve("random:llama"), model / "snapshots" / COMMIT)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    assert resolve("some/llm") == model / "snapshots" / COMMIT
    assert resolve("some/llm", COMMIT, download=False) == model / "snapshots" / COMMIT


def test_local_directories(tmp_path: Path) -> None:
    assert resolve(str(copy(tmp_path))) == tmp_path / "copy"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        resolve(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="no such directory"):
        resolve(str(tmp_path / "nowhere"))


def test_unknown_random_model_lists_the_known() -> None:
    with pytest.raises(ModelError, match="random:olmo2"):
        resolve("random:gpt")


def test_weights_in_parts_need_every_part(tmp_path: Path) -> None:
    directory = copy(tmp_path)
    whole = hash_weights(directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="save_pretrained"):
        weight_files(directory)
    index: dict[str, str] = {}
    for i, name in enumerate(sorted(tensors)):
        index[name] = f"model-{i % 2}.safetensors"
    for part in set(index.values()):
        save_file({n: tensors[n] for n in tensors if index[n] == part}, directory / part)
    file = directory / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index}), encoding="utf-8")
    assert [f.name for f in weight_files(directory)] == [
        "model-0.safetensors",
        "model-1.safetensors",
    ]
    assert hash_weights(directory) != whole
    (directory / "model-1.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model-1\.safetensors is missing"):
        hash_weights(directory)


def test_hash_changes_with_the_weights_and_not_with_the_path(tmp_path: Path) -> None:
    directory = copy(tmp_path)
    before = hash_weights(directory)
    assert before == hash_weights(resolve("random:llama"))
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][0] += 1e-3
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    assert hash_weights(directory) != before


def test_large_files_are_sampled_over_their_whole_length(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    weights = torch.zeros(3 * WHOLE_FILE // 4)
    save_file({"w": weights}, file)
    before = hash_weights(tmp_path)
    for part in weights.chunk(9):  # what training changes is no smaller than this
        part += 1.0
        save_file({"w": weights}, file)
        part -= 1.0
        assert hash_weights(tmp_path) != before
    save_file({"w": weights}, file)
    assert hash_weights(tmp_path) == before
    save_file({"v": weights}, file)
    assert hash_weights(tmp_path) != before


def test_vocabulary_hash(tmp_path: Path) -> None:
    directory = copy(tmp_path)
    before = hash_vocabulary(directory)
    assert before == hash_vocabulary(resolve("random:llama"))
    text = (directory / "tokenizer.json").read_text(encoding="utf-8")
    (directory / "vocab.json").write_text("{}", encoding="utf-8")
    assert hash_vocabulary(directory) == before
    (directory / "tokenizer.json").write_text(text + " ", encoding="utf-8")
    assert hash_vocabulary(directory) != before
    (directory / "tokenizer.json").unlink()
    assert hash_vocabulary(directory) != before
    (directory / "vocab.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        hash_vocabulary(directory)
